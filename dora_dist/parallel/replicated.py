"""Strategies whose ranks hold the whole model: `single` (one process) and `ddp` (data parallel)."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dora_dist.config import TrainConfig
from dora_dist.parallel.engine import Engine, LossScale, TorchEngine
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import RowsOfCopies, Shards, Whole


class Single:
    """One process: nothing is sharded, nothing is sent."""

    name = "single"
    needs_group = False
    files: Mapping[str, str] = {}  # what a run leaves in its directory for this strategy, by name

    def __init__(self, processes: Processes):
        self.processes = processes

    def shard(self, model: nn.Module) -> None:
        """Called while the model is on the meta device, before any weight is read."""

    def parameter(self, meta: nn.Parameter) -> nn.Parameter:
        """This rank's part of a parameter that is on the meta device, uninitialised."""
        empty = torch.empty_like(meta, device=self.processes.device)
        return nn.Parameter(empty, requires_grad=meta.requires_grad)

    def shards(self, model: nn.Module) -> Shards:
        return Whole(is_writer=self.processes.is_main)

    def engine(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, loss_scale: LossScale
    ) -> Engine:
        """What takes the steps; made once the weights are there."""
        return TorchEngine(model, optimizer, self.shards(model), config, loss_scale, self.processes.device)


class Ddp(Single):
    """Each rank holds the whole model; the gradients of A, B and m are averaged, and each computes some norms."""

    name = "ddp"
    needs_group = True

    def shards(self, model: nn.Module) -> Shards:
        by_rows = RowsOfCopies(self.processes.rank, self.processes.world_size, self.processes.sum_)
        return Whole(self.processes.is_main, by_rows)

    def engine(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, loss_scale: LossScale
    ) -> Engine:
        with warnings.catch_warnings():  # torch 2.13 names no replacement that leaves buffers alone at first
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            ddp = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                init_sync=False,  # every rank has read the same weights: no copy of all of them
            )
        return TorchEngine(
            ddp, optimizer, self.shards(model), config, loss_scale, self.processes.device, ddp.no_sync
        )
