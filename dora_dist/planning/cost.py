"""How long a step takes: a trace's kernels by a roofline, its collectives by latency and rate, overlapped as
streams and data dependences let them.

Kernels run one after the other. A collective runs beside them on its own stream, after what it sends was
written; a kernel that reads what a collective writes waits for it. One gather is under way ahead of the kernels
at a time, as FSDP2 and ZeRO-3 keep it; those inside machines and those between machines do not hinder each
other. On CPUs (`Device.blocking`) the cores that compute send, too: a collective begins when they come to it, they
stand still where they wait for it, and computing loses `Cluster.lost` to it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dora_dist.parallel.phases import Phase
from dora_dist.planning.hardware import Cluster, Link
from dora_dist.planning.rehearse import Rehearsed, Short
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

    def measure(run: Short) -> dict[tuple, float]:
        return _flat(_accumulated(run.calls, cluster, accumulation))

    flat = rehearsed.at_full_depth(measure)
    parts: dict[str, dict] = {"sent": {}, "messages": {}, "phases": {}}
    for (kind, *key), value in flat.items():
        if kind in parts:
            parts[kind][key[0] if kind == "phases" else tuple(key)] = value
    return StepTime(flat[("total",)], flat[("kernels",)], **parts)


def _flat(time: StepTime) -> dict[tuple, float]:
    found: dict[tuple, float] = {("total",): time.total, ("kernels",): time.kernels}
    found |= {("sent", *key): value for key, value in time.sent.items()}
    found |= {("messages", *key): value for key, value in time.messages.items()}
    return found | {("phases", phase): value for phase, value in time.phases.items()}


def _accumulated(calls: Sequence[Call], cluster: Cluster, accumulation: int) -> StepTime:
    """Of a trace of at most two micro-batches, the first of which stands for all but the last."""
    whole = simulate(calls, cluster)
    if accumulation <= 2:
        return whole
    first = simulate([call for call in calls if call.micro == 1], cluster)
    more = accumulation - 2

    def add(a: dict, b: dict) -> dict:
        return {key: a.get(key, 0.0) + more * b.get(key, 0.0) for key in dict.fromkeys([*a, *b])}

    return StepTime(
        whole.total + more * first.total,
        whole.kernels + more * first.kernels,
        add(whole.sent, first.sent),
        add(whole.messages, first.messages),
        add(whole.phases, first.phases),
    )


def simulate(calls: Sequence[Call], cluster: Cluster) -> StepTime:
    """The time of a trace's calls, in their order, from one moment at which nothing runs."""
    device = cluster.device
    now = host = kernels = gate = last = 0.0
    free = {False: 0.0, True: 0.0}  # by whether it crosses machines: when the last collective there is done
    written: dict[int, float] = {}  # when a storage's last writer is done
    gathered: set[int] = set()  # written by gathers that nothing has read
    sent: Counter[tuple[Phase, str]] = Counter()
    messages: Counter[tuple[Phase, str]] = Counter()
    phases: dict[Phase, float] = {}
    for call in calls:
        host += device.launch_s
        before = now
        ready = max((written.get(number, 0.0) for number in call.reads), default=0.0)
        if call.collective is not None:
            sent[call.phase, call.collective.kind] += call.collective.bytes
            messages[call.phase, call.collective.kind] += 1
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
            takes = kernel_time(call, cluster)
            kernels += takes
            now = max(now, ready, host if not device.blocking else 0.0) + takes
            written.update(dict.fromkeys(call.writes, now))
            if not gathered.isdisjoint(call.reads):
                gathered.difference_update(call.reads)
                gate = now
        phases[call.phase] = phases.get(call.phase, 0.0) + now - before
    return StepTime(max(now, last), kernels, dict(sent), dict(messages), phases)


def kernel_time(call: Call, cluster: Cluster) -> float:
    """Seconds: the slower of its arithmetic and its memory, or the least that a kernel takes."""
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
