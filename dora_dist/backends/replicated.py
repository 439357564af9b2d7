"""Strategies whose ranks hold the whole model: `single` (one process) and `ddp` (data parallel)."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dora_dist.backends.process import Processes
from dora_dist.shards import Shards, Whole


class Single:
    """One process: nothing is sharded, nothing is sent."""

    name = "single"
    needs_group = False

    def __init__(self, processes: Processes):
        self.processes = processes

    def shard(self, model: nn.Module) -> None:
        """Called while the model is on the meta device, before any weight is read."""

    def parameter_device(self) -> torch.device:
        return self.processes.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call for a training forward; called once the weights are there."""
        return model

    def shards(self, model: nn.Module) -> Shards:
        return Whole(is_writer=self.processes.is_main)

    def accumulating(self, module: nn.Module) -> AbstractContextManager:
        """Around the micro-batches whose gradients are not exchanged yet."""
        return nullcontext()


class Ddp(Single):
    """Each rank holds the whole model; the gradients of A, B and m are averaged."""

    name = "ddp"
    needs_group = True

    def wrap(self, model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():  # torch 2.13 names no replacement that leaves buffers alone at first
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulating(self, module: nn.Module) -> AbstractContextManager:
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()
