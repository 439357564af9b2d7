"""What a run needs, before it is started: does it fit, how long does a step take, what to change.

The numbers come from a rehearsal of the run's own code (rehearse.py) and a model of the hardware (cost.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_dist.config import ParallelConfig, RunConfig
from dora_dist.errors import UserError
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.planning.cost import StepTime, step_time
from dora_dist.planning.hardware import ASSUMPTIONS, GB, GPUS, Cluster
from dora_dist.planning.rehearse import Job, Rehearsals, Rehearsed
from dora_dist.planning.trace import HOST


@dataclass(frozen=True)
class Change:
    """Other settings, and what a GPU holds and a step takes with them."""

    settings: Mapping[str, Any]
    peak: float
    fits: bool
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What is known of a run. Bytes are those of one GPU, or of one process's host memory; seconds a step's."""

    cluster: Cluster
    strategy: str
    reason: str
    rehearsed: Rehearsed
    time: StepTime
    tokens: int  # of a step, over all GPUs, every row full
    changes: Sequence[Change] = ()
    faster: Change | None = None  # sharded inside machines only, where that fits, too

    @property
    def moment(self) -> Phase:
        """When the most is held."""
        return self._fullest(False)

    @property
    def memory(self) -> dict[str, float]:
        """What a GPU holds then, the largest first."""
        held = self.rehearsed.peaks()[self.moment, False]
        return dict(sorted(held.items(), key=lambda item: -item[1]))

    @property
    def host_memory(self) -> dict[str, float]:
        held = self.rehearsed.peaks().get((self._fullest(True), True), {})
        return {tag.removeprefix(HOST): size for tag, size in sorted(held.items(), key=lambda item: -item[1])}

    @property
    def peak(self) -> float:
        return self.rehearsed.peak()

    @property
    def fits(self) -> bool:
        return self.peak <= self.cluster.device.usable()

    def _fullest(self, on_host: bool) -> Phase:
        totals = {
            phase: sum(held.values()) for (phase, host), held in self.rehearsed.peaks().items() if host == on_host
        }
        return max(totals, key=lambda phase: totals[phase], default=Phase.LOADING)


def make_plan(
    config: RunConfig,
    directory: Path,
    cluster: Cluster,
    rehearse: Rehearsals,
    advise: bool = True,
    compare: bool = False,
    gpu: bool = True,
) -> Plan:
    """Rehearse a run on a cluster; with `advise` also what would fit, where it does not; with `compare` also what
    would be faster over several machines. Without `gpu` on CPUs.

    Raises:
        UserError: the configuration is refused, as training would.
    """

    def planned(config: RunConfig) -> Plan:
        return _plan(rehearse(_job(config, directory, cluster, gpu)), cluster)

    plan = planned(config)
    changes: list[Change] = []
    chosen: dict[str, Any] = {}
    for settings in _smaller(config, plan.strategy, cluster) if advise and not plan.fits else ():
        try:
            found = planned(_with(config, {**chosen, **settings}))
        except UserError:  # another setting rules it out
            continue
        chosen |= settings
        changes.append(Change(dict(chosen), found.peak, found.fits, found.time.total))
        if found.fits:
            break
    faster = None
    if compare and plan.fits and _could_be_hybrid(plan):
        settings = {"parallel.replicas": cluster.nodes}
        found = planned(_with(config, settings))
        if found.fits and found.time.total < plan.time.total:
            faster = Change(settings, found.peak, True, found.time.total)
    return replace(plan, changes=changes, faster=faster)


def _could_be_hybrid(plan: Plan) -> bool:
    return plan.strategy == "fsdp" and plan.cluster.nodes > 1 and parallel_of(plan).replicas == 1


def _job(config: RunConfig, directory: Path, cluster: Cluster, gpu: bool) -> Job:
    return Job(config, directory, cluster.gpus, cluster.per_node, gpu, cluster.device.memory)


def _plan(found: Rehearsed, cluster: Cluster) -> Plan:
    config = found.job.config
    rows = config.train.micro_batch_size * config.train.accumulation * cluster.gpus
    time = step_time(found, cluster)
    return Plan(cluster, found.strategy, found.reason, found, time, rows * config.data.seq_len)


def _smaller(config: RunConfig, strategy: str, cluster: Cluster) -> list[dict[str, Any]]:
    """What to change, one thing after the other, the cheapest first."""
    train = config.train
    wanted: list[dict[str, Any]] = []
    if not train.activation_checkpointing:
        wanted.append({"train.activation_checkpointing": True})
    if train.micro_batch_size > 1:
        more = train.accumulation * train.micro_batch_size
        wanted.append({"train.micro_batch_size": 1, "train.accumulation": more})
    if cluster.gpus > 1 and strategy not in ("fsdp", "zero3"):
        wanted.append({"parallel.strategy": "fsdp"})
    elif config.parallel.replicas > 1:
        wanted.append({"parallel.replicas": 1})
    if config.quant.scheme == "none":
        wanted.append({"quant.scheme": "nf4"})
    if not config.parallel.cpu_offload and (cluster.gpus > 1 or strategy == "fsdp"):
        wanted.append({"parallel.cpu_offload": True})
    if config.data.seq_len > 512:
        wanted.append({"data.seq_len": max(512, config.data.seq_len // 4)})
    if wanted and config.parallel.strategy == "auto":  # which would choose anew
        wanted[0].setdefault("parallel.strategy", strategy)
    return wanted


def _with(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with `section.key` values changed, checked anew."""
    for name, value in settings.items():
        section, key = name.split(".")
        extra: dict[str, Any] = {"deepspeed": {}} if name == "parallel.strategy" else {}
        config = replace(config, **{section: replace(getattr(config, section), **{key: value}, **extra)})
    return config


def why_it_does_not_fit(config: RunConfig, directory: Path, processes: Processes, memory: float) -> str | None:
    """For `train`: one line on what a device of `memory` bytes would have to hold, and what would fit; None where
    it fits."""
    gpu = processes.device.type == "cuda"
    device = replace(GPUS["h100"], name=processes.device.type, memory=memory)  # rates do not matter here
    if not gpu:
        device = replace(device, reserved=0.0)
    nodes, uneven = divmod(processes.world_size, processes.local_world_size)
    nodes = 1 if uneven else nodes
    with Rehearsals() as rehearse:
        plan = make_plan(config, directory, Cluster(device, processes.world_size, nodes), rehearse, gpu=gpu)
    if plan.fits:
        return None
    line = _verdict(plan).rstrip(":")
    if plan.changes and plan.changes[-1].fits:
        line = f"{line.partition('. ')[0]}; it would with {_settings(plan.changes[-1].settings)}"
    return f"parallel.strategy: {_strategy(plan)}: {line}. parallel.force=true trains all the same"


def parallel_of(plan: Plan) -> ParallelConfig:
    return plan.rehearsed.job.config.parallel


def as_text(plan: Plan) -> str:
    """The table that `dora-dist plan` prints."""
    device, time = plan.cluster.device, plan.time
    rate = plan.tokens / time.total
    lines = [
        f"{plan.cluster}: {device.usable() / GB:.1f} of {device.memory / GB:.1f} GB of each are for the run",
        f"strategy: {_strategy(plan)} ({plan.reason})",
        *plan.rehearsed.coverage,
        "",
        f"memory of a GPU at its fullest ({plan.moment.value})",
        *_rows(plan.memory, plan.peak),
    ]
    if plan.host_memory:
        total = sum(plan.host_memory.values())
        lines += ["", "host memory of a process at its fullest", *_rows(plan.host_memory, total)]
    sent = sum(time.sent.values())
    norms = sum(size for (phase, _), size in time.sent.items() if phase is Phase.NORMS)
    lines += [
        "",
        "a step",
        f"  {time.total:10.3f} s, of which {time.exposed:.3f} s wait for collectives or the host",
        f"  {plan.tokens:10,d} tokens, {rate:,.0f} tokens/s, {rate / plan.cluster.gpus:,.0f} a GPU",
    ]
    if sent:
        lines.append(f"  {sent / GB:10.2f} GB gathered and reduced, {100 * norms / sent:.3f} % for the norms")
    lines += ["", _verdict(plan)]
    lines += [f"  {_settings(c.settings)}: {_size(c.peak)}, {c.seconds:.2f} s a step" for c in plan.changes]
    if plan.faster is not None:
        found = plan.faster
        lines.append(f"faster: {_settings(found.settings)}: {found.seconds:.3f} s a step, {_size(found.peak)}")
    lines += ["", "counted by a rehearsal on fake tensors; times from published rates, not measured:"]
    return "\n".join([*lines, *(f"  - {assumption}" for assumption in ASSUMPTIONS)])


def _rows(held: Mapping[str, float], total: float) -> list[str]:
    rest = sum(size for size in held.values() if size < 0.002 * total)
    rows = [f"  {size / GB:10.2f} GB  {tag}" for tag, size in held.items() if size >= 0.002 * total]
    if rest:
        rows.append(f"  {rest / GB:10.2f} GB  smaller ones")
    return [*rows, f"  {total / GB:10.2f} GB  together"]


def _strategy(plan: Plan) -> str:
    parallel = parallel_of(plan)
    replicas = f", {parallel.replicas} replicas" if parallel.replicas > 1 else ""
    return f"{plan.strategy}{replicas}{', offloaded to the host' if parallel.cpu_offload else ''}"


def _verdict(plan: Plan) -> str:
    limit = plan.cluster.device.usable()
    if plan.fits:
        return f"it fits: {_size(plan.peak)} of {_size(limit)}"
    line = f"it does not fit: a device would hold {_size(plan.peak)} of {_size(limit)}"
    if plan.changes and plan.changes[-1].fits:
        return f"{line}. The last of these would:"
    return f"{line}, and none of these changes is enough: take more GPUs, or larger ones"


def _size(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def _settings(settings: Mapping[str, Any]) -> str:
    values = {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in settings.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as numbers: bytes, seconds, tokens."""
    time, cluster = plan.time, plan.cluster
    return {
        "cluster": {
            "gpu": cluster.device.name, "gpus": cluster.gpus, "nodes": cluster.nodes,
            "net_bytes_per_second": cluster.net.rate, "memory_bytes": cluster.device.memory,
            "usable_bytes": cluster.device.usable(),
        },
        "strategy": plan.strategy,
        "reason": plan.reason,
        "coverage": list(plan.rehearsed.coverage),
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "fullest": plan.moment.value,
        "memory_bytes": plan.memory,
        "host_memory_bytes": plan.host_memory,
        "loading_peak_bytes": plan.rehearsed.peak(loading=True),
        "step_seconds": time.total,
        "exposed_seconds": time.exposed,
        "seconds_by_phase": {phase.value: seconds for phase, seconds in time.phases.items()},
        "tokens_per_step": plan.tokens,
        "tokens_per_second": plan.tokens / time.total,
        "sent_bytes": {f"{phase.value}: {kind}": size for (phase, kind), size in time.sent.items()},
        "collectives": {f"{phase.value}: {kind}": round(n) for (phase, kind), n in time.messages.items()},
        "changes": [_change(change) for change in plan.changes],
        "faster": None if plan.faster is None else _change(plan.faster),
        "assumptions": list(ASSUMPTIONS),
    }  # fmt: skip


def _change(change: Change) -> dict[str, Any]:
    return {"settings": dict(change.settings), "peak_bytes": change.peak, "fits": change.fits,
            "step_seconds": change.seconds}  # fmt: skip
