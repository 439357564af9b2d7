"""What a run needs, before it is started: does it fit, as `train` asks first, how long does a step take, and what
to change.

The numbers come from a rehearsal of the run's own code (rehearse.py) and a model of the hardware (cost.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dora_dist.config import ParallelConfig, RunConfig
from dora_dist.errors import RunFailed, UserError
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.planning.cost import StepTime, step_time
from dora_dist.planning.hardware import ASSUMPTIONS, BALANCED, GB, GPUS, Cluster
from dora_dist.planning.rehearse import Job, Rehearsals, Rehearsed
from dora_dist.planning.trace import HOST


@dataclass(frozen=True)
class Change:
    """Other settings, and what a GPU holds and a step takes with them; by their names in JSON."""

    settings: Mapping[str, Any]
    peak_bytes: float
    fits: bool
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """What is known of a run. Bytes are those of one GPU, or of one process's host memory; seconds a step's."""

    cluster: Cluster
    rehearsed: Rehearsed
    time: StepTime
    changes: Sequence[Change] = ()
    faster: Change | None = None  # sharded inside machines only, where that fits, too

    @property
    def parallel(self) -> ParallelConfig:
        return self.rehearsed.job.config.parallel

    @property
    def tokens(self) -> int:
        """Of a step, over all GPUs, every row full."""
        config = self.rehearsed.job.config
        rows = config.sequences * config.train.accumulation * self.cluster.gpus
        return rows * config.data.seq_len

    @property
    def memory(self) -> dict[str, float]:
        """What a GPU holds at its fullest, the largest first."""
        return self.rehearsed.fullest()[1]

    @property
    def host_memory(self) -> dict[str, float]:
        held = self.rehearsed.fullest(on_host=True)[1]
        return {tag.removeprefix(HOST): size for tag, size in held.items()}

    @property
    def loading_on_host(self) -> float:
        """What a process holds there while it loads, of files that can be read by rows."""
        return sum(self.rehearsed.peaks().get((Phase.LOADING, True), {}).values())

    @property
    def assumptions(self) -> list[str]:
        return [*ASSUMPTIONS, BALANCED] if self.rehearsed.experts else list(ASSUMPTIONS)

    @property
    def peak(self) -> float:
        return self.rehearsed.peak()

    @property
    def fits(self) -> bool:
        return self.peak <= self.cluster.device.usable()

    def as_change(self, settings: Mapping[str, Any]) -> Change:
        return Change(dict(settings), self.peak, self.fits, self.time.total)


def make_plan(
    config: RunConfig,
    directory: Path,
    cluster: Cluster,
    rehearse: Rehearsals,
    compare: bool = False,
    gpu: bool = True,
) -> Plan:
    """Rehearse a run on a cluster, and what would fit, where it does not; with `compare` also what would be faster
    over several machines. Without `gpu` on CPUs.

    Raises:
        UserError: the configuration is refused, as training would.
    """

    def planned(settings: Mapping[str, Any]) -> Plan:
        job = Job(_with(config, settings), directory, cluster.gpus, cluster.per_node, gpu, cluster.device.memory)
        found = rehearse(job)
        return Plan(cluster, found, step_time(found, cluster))

    plan = planned({})
    strategy = plan.rehearsed.strategy
    changes: list[Change] = []
    chosen: dict[str, Any] = {}
    for settings in () if plan.fits else _smaller(config, strategy, cluster):
        try:
            found = planned({**chosen, **settings})
        except UserError:  # another setting rules it out
            continue
        chosen |= settings
        changes.append(found.as_change(chosen))
        if found.fits:
            break
    faster = None
    if compare and plan.fits and strategy == "fsdp" and cluster.nodes > 1 and plan.parallel.replicas == 1:
        settings = {"parallel.replicas": cluster.nodes}
        found = planned(settings)
        if found.fits and found.time.total < plan.time.total:
            faster = found.as_change(settings)
    return replace(plan, changes=changes, faster=faster)


def _smaller(config: RunConfig, strategy: str, cluster: Cluster) -> list[dict[str, Any]]:
    """What to change, one thing after the other, the cheapest first."""
    train, parallel, sharded = config.train, config.parallel, strategy in ("fsdp", "zero3")
    rows = {"train.micro_batch_size": 1, "train.accumulation": train.accumulation * train.micro_batch_size}
    steps: list[tuple[bool, dict[str, Any]]] = [
        (not train.activation_checkpointing, {"train.activation_checkpointing": True}),
        (train.micro_batch_size > 1, rows),
        (cluster.gpus > 1 and not sharded, {"parallel.strategy": "fsdp"}),
        (sharded and parallel.replicas > 1, {"parallel.replicas": 1}),
        (config.quant.scheme == "none", {"quant.scheme": "nf4"}),
        (not parallel.cpu_offload and (cluster.gpus > 1 or strategy == "fsdp"), {"parallel.cpu_offload": True}),
        (config.data.seq_len > 512, {"data.seq_len": max(512, config.data.seq_len // 4)}),
    ]
    wanted = [settings for needed, settings in steps if needed]
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


def check_fits(
    config: RunConfig, directory: Path, model: nn.Module, processes: Processes, memory: float
) -> list[str]:
    """UserError, on every rank: `plan` says that a device of `memory` bytes, the same on all ranks, cannot hold
    this run, and what would fit. Returns a warning where it has nothing to say."""
    if config.parallel.force or certainly_fits(model, config, memory):
        return []
    return processes.on_main(lambda: _refuse_misfit(config, directory, processes, memory))


def _refuse_misfit(config: RunConfig, directory: Path, processes: Processes, memory: float) -> list[str]:
    print("looking whether this run fits (not with parallel.force=true) ...", flush=True)
    gpu, kind = processes.device.type == "cuda", processes.device.type
    device = replace(GPUS["h100"], name=kind, memory=memory)  # rates do not matter here
    if not gpu:
        device = replace(device, reserved=0.0)
    nodes, uneven = divmod(processes.world_size, processes.local_world_size)
    cluster = Cluster(device, processes.world_size, 1 if uneven else nodes)
    try:
        with Rehearsals() as rehearse:
            plan = make_plan(config, directory, cluster, rehearse, gpu=gpu)
    except RunFailed as error:
        return [f"warning: {error}"]
    if plan.fits:
        return []
    line = _verdict(plan).rstrip(":")
    if plan.changes and plan.changes[-1].fits:
        line = f"{line.partition('. ')[0]}; it would with {_as_overrides(plan.changes[-1].settings)}"
    raise UserError(f"parallel.strategy: {_strategy(plan)}: {line}. parallel.force=true trains all the same")


def certainly_fits(model: nn.Module, config: RunConfig, memory: float) -> bool:
    """Whether a run is so small that no rehearsal is needed to say that it fits: a bound far above what it
    holds."""
    weights = 2 * sum(t.nbytes for t in base_tensors(model).values())
    trained = 20 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    widths = sum(sum(p.shape) for p in model.parameters() if p.dim() == 2)
    tokens = config.sequences * config.data.seq_len
    heads = getattr(model.config, "num_attention_heads", 64) * config.data.seq_len  # attention by its definition
    blocks = sum(1 for m in model.modules() if isinstance(m, nn.ModuleList) for _ in m)
    return weights + trained + tokens * 4 * (6 * widths + blocks * heads * 2) < memory / 2


def as_text(plan: Plan) -> str:
    """The table that `dora-dist plan` prints."""
    device, time = plan.cluster.device, plan.time
    rate = plan.tokens / time.total
    lines = [
        f"{plan.cluster}: {device.usable() / GB:.1f} of {device.memory / GB:.1f} GB of each are for the run",
        f"strategy: {_strategy(plan)} ({plan.rehearsed.reason})",
        *plan.rehearsed.coverage,
        "",
        f"memory of a GPU at its fullest ({plan.rehearsed.fullest()[0].value})",
        *_rows(plan.memory, plan.peak),
    ]
    if plan.host_memory:
        total = sum(plan.host_memory.values())
        lines += ["", "host memory of a process at its fullest", *_rows(plan.host_memory, total)]
    here, all_here = (_size(plan.loading_on_host * count) for count in (1, plan.cluster.per_node))
    lines += ["", f"loading takes {here} of host memory for a process, {all_here} for a machine"]
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
    for change in plan.changes:
        told = f"{_size(change.peak_bytes)}, {change.step_seconds:.2f} s a step"
        lines.append(f"  {_as_overrides(change.settings)}: {told}")
    if (found := plan.faster) is not None:
        told = f"{found.step_seconds:.3f} s a step, {_size(found.peak_bytes)}"
        lines.append(f"faster: {_as_overrides(found.settings)}: {told}")
    lines += ["", "counted by a rehearsal on fake tensors; times from published rates, not measured:"]
    return "\n".join([*lines, *(f"  - {assumption}" for assumption in plan.assumptions)])


def _rows(held: Mapping[str, float], total: float) -> list[str]:
    rest = sum(size for size in held.values() if size < 0.002 * total)
    rows = [f"  {size / GB:10.2f} GB  {tag}" for tag, size in held.items() if size >= 0.002 * total]
    if rest:
        rows.append(f"  {rest / GB:10.2f} GB  smaller ones")
    return [*rows, f"  {total / GB:10.2f} GB  together"]


def _strategy(plan: Plan) -> str:
    parallel = plan.parallel
    replicas = f", {parallel.replicas} replicas" if parallel.replicas > 1 else ""
    return f"{plan.rehearsed.strategy}{replicas}{', offloaded to the host' if parallel.cpu_offload else ''}"


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


def _as_overrides(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in settings.items())


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as numbers: bytes, seconds, tokens."""
    time, cluster = plan.time, plan.cluster
    return {
        "cluster": {
            "gpu": cluster.device.name, "gpus": cluster.gpus, "nodes": cluster.nodes,
            "net_bytes_per_second": cluster.net.rate, "memory_bytes": cluster.device.memory,
            "usable_bytes": cluster.device.usable(),
        },
        "strategy": plan.rehearsed.strategy,
        "reason": plan.rehearsed.reason,
        "coverage": list(plan.rehearsed.coverage),
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "fullest": plan.rehearsed.fullest()[0].value,
        "memory_bytes": plan.memory,
        "host_memory_bytes": plan.host_memory,
        "loading_peak_bytes": plan.rehearsed.peak(loading=True),
        "loading_host_bytes": plan.loading_on_host,
        "step_seconds": time.total,
        "exposed_seconds": time.exposed,
        "seconds_by_phase": {phase.value: seconds for phase, seconds in time.phases.items()},
        "tokens_per_step": plan.tokens,
        "tokens_per_second": plan.tokens / time.total,
        "sent_bytes": {f"{phase.value}: {kind}": size for (phase, kind), size in time.sent.items()},
        "collectives": {f"{phase.value}: {kind}": round(n) for (phase, kind), n in time.messages.items()},
        "changes": [asdict(change) for change in plan.changes],
        "faster": None if plan.faster is None else asdict(plan.faster),
        "assumptions": plan.assumptions,
    }  # fmt: skip
