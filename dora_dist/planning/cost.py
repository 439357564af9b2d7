"""How long a step takes: a trace's kernels by a roofline, its collectives by latency and rate, overlapped as
streams and data dependences let them.

Kernels run one after the other. A collective runs beside them on its own stream, after what it sends was
written; a kernel that reads what a collective writes waits for it. One gather is under way ahead of the kernels
at a time, as FSDP2 and ZeRO-3 keep it; those inside machines and those between machines do not hinder each
other. On CPUs (`Device.blocking`) the cores that compute send, too: a collective begins when they come to it, they
stand still where they wait for it, and computing loses `Cluster.lost` to it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dora_dist.parallel.phases import Phase
from dora_dist.planning.hardware import Cluster, Link
from dora_dist.planning.rehearse import Rehearsed
from dora_dist.planning.trace import COPY_IN, Call, Collective


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    total: float
    kernels: float  # what it would take if nothing had to be waited for
    sent: dict[tuple[Phase, str], float] = field(default_factory=dict)  # (phase, kind) -> bytes, of whole tensors
    messages: dict[tuple[Phase, str], float] = field(default_factory=dict)  # (phase, kind) -> number
    phases: dict[Phase, float] = field(default_factory=dict)

    @property
    def exposed(self) -> float:
        """Seconds in which kernels wait for collectives or for the host."""
        return max(0.0, self.total - self.kernels)


def step_time(rehearsed: Rehearsed, cluster: Cluster) -> StepTime:
    accumulation = rehearsed.job.config.train.accumulation
    return _from_parts(rehearsed.at_full_depth(lambda run: _accumulated(run.calls, cluster, accumulation)))


def simulate(calls: Sequence[Call], cluster: Cluster) -> StepTime:
    """The time of a trace's calls, in their order, from one moment at which nothing runs."""
    return _from_parts(_parts(calls, cluster))


def _from_parts(parts: Mapping[tuple, float]) -> StepTime:
    by_name: dict[str, dict] = {"sent": {}, "messages": {}, "phases": {}}
    for (name, *key), value in parts.items():
        if name in by_name:
            by_name[name][key[0] if name == "phases" else tuple(key)] = value
    return StepTime(parts["total",], parts["kernels",], **by_name)


def _accumulated(calls: Sequence[Call], cluster: Cluster, accumulation: int) -> Mapping[tuple, float]:
    """Of a trace of at most two micro-batches, the first of which stands for all but the last."""
    whole = _parts(calls, cluster)
    if accumulation <= 2:
        return whole
    first = _parts([call for call in calls if call.micro == 1], cluster)
    return {key: value + (accumulation - 2) * first.get(key, 0.0) for key, value in whole.items()}


def _parts(calls: Sequence[Call], cluster: Cluster) -> Mapping[tuple, float]:
    """A step's seconds, bytes and messages: ("total",), ("kernels",), ("phases", phase), ("sent", phase, kind),
    ("messages", phase, kind)."""
    device = cluster.device
    now = host = kernels = gate = last = 0.0
    free = {False: 0.0, True: 0.0}  # by whether it crosses machines: when the last collective there is done
    written: dict[int, float] = {}  # when a storage's last writer is done
    gathered: set[int] = set()  # written by gathers that nothing has read
    parts: dict[tuple, Any] = defaultdict(int)
    for call in calls:
        host += device.launch_s * call.times
        before = now
        ready = max((written.get(number, 0.0) for number in call.reads), default=0.0)
        if call.collective is not None:
            parts["sent", call.phase, call.collective.kind] += call.collective.bytes
            parts["messages", call.phase, call.collective.kind] += 1
            across = crosses(call.collective, cluster)
            latency, transfer = collective_parts(call.collective, cluster)
            if device.blocking:  # by its own cores, when it comes to it
                start = max(now, ready, free[across])
                free[across] = start + transfer  # others of its threads have the link while one waits
                if call.collective.blocks:
                    now = host = start + latency + transfer
                lost = cluster.lost.get((call.collective.kind, call.collective.blocks))
                if lost is not None and call.collective.ranks > 1:
                    now += lost.seconds(call.collective.bytes)
            else:
                start = max(ready, gate if call.collective.kind == "all_gather" else now, free[across])
                free[across] = start + latency + transfer
            last = max(last, start + latency + transfer)
            written.update(dict.fromkeys(call.writes, start + latency + transfer))
            if call.collective.kind == "all_gather":
                gathered.update(call.writes)
        elif call.name == COPY_IN and not device.blocking:  # on the gather's stream
            takes = kernel_time(call, cluster)
            written.update(dict.fromkeys(call.writes, max(gate, ready) + takes))
        else:
            once = kernel_time(call, cluster)
            takes = call.times * once
            kernels += takes
            launched = host + min(once, takes) if not device.blocking else 0.0  # and the last of its runs done
            now = max(max(now, ready) + takes, launched)
            written.update(dict.fromkeys(call.writes, now))
            if not gathered.isdisjoint(call.reads):
                gathered.difference_update(call.reads)
                gate = now
        parts["phases", call.phase] = parts["phases", call.phase] + now - before
    parts["total",], parts["kernels",] = max(now, last), kernels
    return parts


def kernel_time(call: Call, cluster: Cluster) -> float:
    """Seconds of one run: the slower of its arithmetic and its memory, or the least that a kernel takes."""
    device = cluster.device
    if call.host_bytes and call.phase is Phase.STEP:  # the optimizer, where its tensors lie
        return call.bytes / device.host
    memory = (call.bytes - call.host_bytes) / (device.bandwidth * device.memory_share)
    arithmetic = call.flops / (device.flops(call.dtype) * device.product_share)
    over_host = call.host_bytes / (device.host * device.link_share)
    return max(memory, arithmetic, over_host, device.kernel_s)


def crosses(collective: Collective, cluster: Cluster) -> bool:
    """Whether a group has ranks on more than one machine, ranks being numbered machine by machine."""
    return (collective.ranks - 1) * collective.stride >= cluster.per_node


def collective_parts(collective: Collective, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a ring over the group: of latency, and of bytes on their way. Every byte but a rank's own goes
    over each rank's link once, twice for an all-reduce. Between machines the slower of the two kinds of link
    counts, and every machine is a hop."""
    ranks, device = collective.ranks, cluster.device
    if ranks == 1:
        return 0.0, 0.0
    if collective.kind in cluster.measured:
        link = cluster.measured[collective.kind]
        return link.latency, collective.bytes / link.rate
    passes = 2 if collective.kind == "all_reduce" else 1
    inside: Link = device.link
    rate, hops = inside.rate, (ranks - 1) * inside.latency
    if crosses(collective, cluster):
        on_node = max(1, min(ranks, cluster.per_node // collective.stride))
        machines = -(-ranks // on_node)
        # A machine's ranks each bring their own network link, and share what comes in.
        rate = min(inside.rate, cluster.net.rate * on_node)
        hops = (machines - 1) * cluster.net.latency + (ranks - machines) * inside.latency
    return passes * hops, passes * collective.bytes * (ranks - 1) / ranks / (rate * device.link_share)
