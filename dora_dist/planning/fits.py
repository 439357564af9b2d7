"""What `train` asks before it reads a weight: does this run fit?"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from dora_dist.config import RunConfig
from dora_dist.errors import RunFailed, UserError
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.process import Processes
from dora_dist.planning.hardware import GPUS, Cluster
from dora_dist.planning.plan import as_overrides, make_plan, strategy_of, verdict
from dora_dist.planning.rehearse import Rehearsals


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
    line = verdict(plan).rstrip(":")
    if plan.changes and plan.changes[-1].fits:
        line = f"{line.partition('. ')[0]}; it would with {as_overrides(plan.changes[-1].settings)}"
    raise UserError(f"parallel.strategy: {strategy_of(plan)}: {line}. parallel.force=true trains all the same")


def certainly_fits(model: nn.Module, config: RunConfig, memory: float) -> bool:
    """Whether a run is so small that no rehearsal is needed to say that it fits: a bound far above what it
    holds."""
    weights = 2 * sum(t.nbytes for t in base_tensors(model).values())
    trained = 20 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    widths = sum(sum(p.shape) for p in model.parameters() if p.dim() == 2)
    tokens = config.train.micro_batch_size * config.data.seq_len
    heads = getattr(model.config, "num_attention_heads", 64) * config.data.seq_len  # attention by its definition
    blocks = sum(1 for m in model.modules() if isinstance(m, nn.ModuleList) for _ in m)
    return weights + trained + tokens * 4 * (6 * widths + blocks * heads * 2) < memory / 2
