"""Which strategy a run takes."""

import os

import torch

from dora_dist.config import ParallelConfig, TrainConfig
from dora_dist.device import is_gpu
from dora_dist.errors import UserError
from dora_dist.parallel.deepspeed_config import Sizes, deepspeed_config
from dora_dist.parallel.fsdp import Fsdp
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Ddp, Single
from dora_dist.parallel.zero import Zero

Strategy = Single | Ddp | Fsdp | Zero


def strategy_for(parallel: ParallelConfig, weight_bytes: int, world: int, device_memory: float) -> tuple[str, str]:
    """The name of the strategy that a run of `world` processes takes, and why: what `parallel.strategy` says;
    `auto`: one process alone, else ddp where the weights take at most half of `device_memory` bytes, else fsdp."""
    if parallel.strategy != "auto":
        return parallel.strategy, "parallel.strategy says so"
    if parallel.cpu_offload or parallel.replicas > 1:
        return "fsdp", "parallel.cpu_offload and parallel.replicas need it"
    if world == 1:
        return "single", "there is one process"
    sizes = f"the weights, {weight_bytes / 1e9:.1f} GB, take {{}} half of a device's {device_memory / 1e9:.0f} GB"
    fits = weight_bytes <= device_memory / 2
    return ("ddp", sizes.format("at most")) if fits else ("fsdp", sizes.format("more than"))


def choose_strategy(
    parallel: ParallelConfig, train: TrainConfig, sizes: Sizes, processes: Processes, memory: float | None = None
) -> Strategy:
    """The strategy that `strategy_for` names. `memory`: a device's bytes; None: as found here."""
    world = processes.world_size
    if parallel.strategy == "single" and world > 1:
        raise UserError(
            f"parallel.strategy: single runs in one process, but {world} were launched; use ddp, fsdp or zero3"
        )
    name, _ = strategy_for(parallel, sizes.weight_bytes, world, memory or device_memory(processes))
    if train.optimizer != "adamw" and name == "fsdp":  # as chosen by auto
        raise UserError(
            f"train.optimizer: {train.optimizer} does not work with fsdp, which parallel.strategy: auto "
            "chose for this run; use adamw, or set zero1, zero2 or zero3"
        )
    if name == "fsdp":
        return Fsdp(processes, parallel.replicas, parallel.cpu_offload)
    if name.startswith("zero"):
        settings = deepspeed_config(parallel, train, sizes, world, on_gpu=is_gpu(processes.device))
        return Zero(processes, settings)
    return Ddp(processes) if name == "ddp" else Single(processes)


def device_memory(processes: Processes) -> float:
    """Bytes that one process may count on."""
    if processes.device.type == "cuda":
        return torch.cuda.get_device_properties(processes.device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host / processes.local_world_size
