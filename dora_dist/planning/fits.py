"""What `train` asks before it reads a weight: does this run fit?"""

from pathlib import Path

from torch import nn

from dora_dist.config import RunConfig
from dora_dist.errors import RunFailed, UserError
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.process import Processes
from dora_dist.planning.plan import why_it_does_not_fit


def check_fits(
    config: RunConfig, directory: Path, model: nn.Module, processes: Processes, memory: float
) -> list[str]:
    """UserError, on every rank: `plan` says that a device of `memory` bytes, the same on all ranks, cannot hold
    this run, and what would fit. Returns a warning where it has nothing to say."""
    if config.parallel.force or certainly_fits(model, config, memory):
        return []
    refusal = warning = None
    if processes.is_main:
        print("looking whether this run fits (not with parallel.force=true) ...", flush=True)
        try:
            refusal = why_it_does_not_fit(config, directory, processes, memory)
        except UserError as error:
            refusal = str(error)
        except RunFailed as error:
            warning = f"warning: {error}"
    refusal, warning = processes.from_main([refusal, warning])
    if refusal is not None:
        raise UserError(refusal)
    return [warning] if warning else []


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
