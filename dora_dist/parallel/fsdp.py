"""FSDP2: weights sharded by rows, one group per block, each gathered for its forward and its backward alone.

A, B and m live in the group of the weight they adapt and are sharded by rows like it, so that the rank holding
rows of W holds the same rows of B and m. Mixed precision is the layer's own business (fp32 A, B, m beside a
16-bit W): FSDP's `param_dtype` would round the magnitudes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from dora_dist.config import TrainConfig
from dora_dist.errors import UserError
from dora_dist.parallel.engine import Engine, LossScale, TorchEngine
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import GroupShards, Rectangle, Shards, as_matrix, blocks, common_dtype


class FsdpShards(GroupShards):
    """The shard protocol over DTensors sharded by rows on the last dimension of `mesh` (the one before it, if
    any, holds replicas). What FSDP does not manage (buffers, modules left outside) is whole on every rank."""

    def __init__(self, mesh: DeviceMesh):
        on_gpu = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
        super().__init__(mesh.get_group(mesh.ndim - 1), device)
        self._managed: tuple[nn.Module, list[FSDPModule]] | None = None  # what FSDP manages of a model

    def reshard(self, model: nn.Module) -> None:
        if self._managed is None or self._managed[0] is not model:
            self._managed = model, list(_managed(model))
        for module in self._managed[1]:
            module.reshard()

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def rectangles(self, parameter: Tensor) -> list[Rectangle]:
        if not isinstance(parameter, DTensor):
            return [Rectangle(as_matrix(parameter.detach()))]
        local = as_matrix(_local(parameter))
        return [Rectangle(local, row=self.index * self._chunk(parameter))] if local.numel() else []

    def is_split(self, parameter: Tensor) -> bool:
        return isinstance(parameter, DTensor)

    def rows_aligned(self, weight: Tensor, factor: Tensor, groups: int) -> bool:
        if isinstance(weight, DTensor) and isinstance(factor, DTensor):
            rows = weight.shape[0]
            alike = groups == rows or self.split_between(rows, groups)
            return alike and weight.placements == factor.placements
        return not isinstance(weight, DTensor) and not isinstance(factor, DTensor)

    def _gather_split(self, parameters: list[DTensor]) -> list[Tensor]:
        """One collective for all parameters.

        Where ranks are few, an all-gather of every rank's rows, each parameter padded to the same number of rows
        on every rank. Where they are more than the rows of many parameters (A has `rank` rows), padding would
        grow with the number of ranks; then each rank's rows go into one exact vector of zeros, and all are summed.
        """
        matrices = [as_matrix(_local(p)) for p in parameters]
        slots = [self._chunk(p) * m.shape[1] for p, m in zip(parameters, matrices, strict=True)]
        sizes = [p.numel() for p in parameters]
        if self.size * sum(slots) <= 2 * sum(sizes):  # a ring's all-reduce moves twice the bytes of its all-gather
            return self._all_gather(matrices, slots, [p.shape for p in parameters])
        whole = torch.zeros(sum(sizes), dtype=common_dtype(matrices), device=self.device)
        parts = whole.split(sizes)
        for matrix, slot, part in zip(matrices, slots, parts, strict=True):
            part[self.index * slot :][: matrix.numel()].copy_(matrix.reshape(-1))
        self.sum_(whole)
        return [part.view(p.shape).to(p.dtype) for p, part in zip(parameters, parts, strict=True)]

    def _chunk(self, parameter: Tensor) -> int:
        return -(-parameter.shape[0] // self.size)  # rows per rank; the last ranks may have fewer, or none


def find_shards(model: nn.Module) -> Shards | None:
    """The shards of a model to which `fully_shard` was applied (by anyone); None if it was not."""
    for module in _managed(model):
        module.reshard()  # after a forward without backward the root stays gathered
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if len(meshes) > 1:
        raise UserError(f"the parameters lie on {len(meshes)} device meshes; DoRA norms need one mesh for all")
    return FsdpShards(meshes.pop()) if meshes else None


def _managed(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def _local(parameter: DTensor) -> Tensor:
    """This rank's rows, for reading and writing."""
    *outer, last = parameter.placements
    if last != Shard(0) or any(p != Replicate() for p in outer):
        raise UserError(
            f"a parameter is placed as {parameter.placements}; DoRA layers need FSDP2's default, Shard(0) on the "
            "mesh's last dimension"
        )
    return parameter.to_local()


class Fsdp:
    """The strategy: each rank holds 1/N of every weight, N = world size / replicas."""

    name = "fsdp"
    needs_group = True
    files: Mapping[str, str] = {}

    def __init__(self, processes: Processes, replicas: int = 1, cpu_offload: bool = False):
        if processes.world_size % replicas:
            raise UserError(
                f"parallel.replicas: {replicas} replica groups do not divide the {processes.world_size} processes"
            )
        self.processes, self.cpu_offload = processes, cpu_offload
        self.shape: tuple[int, ...] = (processes.world_size // replicas,)
        self.names: tuple[str, ...] = ("shard",)
        if replicas > 1:
            self.shape, self.names = (replicas, *self.shape), ("replicate", "shard")

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Made at first use, when the process group is there."""
        return init_device_mesh(self.processes.device.type, self.shape, mesh_dim_names=self.names)

    def shard(self, model: nn.Module) -> None:
        offload = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.processes.device.type == "cuda")
        words = getattr(model, "get_input_embeddings", lambda: None)()
        with _codes_need_no_gradient():
            for module in [*_groups(model), model]:
                fully_shard(module, mesh=self.mesh, offload_policy=offload)
                if module is words and not any(p.requires_grad for p in module.parameters()):
                    module.set_unshard_in_backward(False)  # there is none, but FSDP would prefetch for it

    @staticmethod
    def gather_in_backward_if(module: nn.Module, needed: Callable[[], bool]) -> None:
        """Have each forward of a module ask `needed` whether to gather its weights again for the backward. What is
        not gathered by itself is left as it is."""
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(lambda head, _: head.set_unshard_in_backward(needed()))

    def parameter(self, meta: nn.Parameter) -> nn.Parameter:
        device = torch.device("cpu") if self.cpu_offload else self.processes.device
        return nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)

    def shards(self, model: nn.Module) -> Shards:
        found = find_shards(model)
        assert found is not None
        return found

    def engine(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, loss_scale: LossScale
    ) -> Engine:
        assert isinstance(model, FSDPModule)
        shards, device = self.shards(model), self.processes.device
        return TorchEngine(model, optimizer, shards, config, loss_scale, device, partial(_accumulating, model))


@contextmanager
def _codes_need_no_gradient() -> Iterator[None]:
    """torch 2.11 has every sharded parameter require gradients for a moment, which integers refuse."""
    require: Any = DTensor.requires_grad_

    def where_possible(self: DTensor, requires_grad: bool = True) -> Tensor:
        return require(self, requires_grad and self.is_floating_point())

    DTensor.requires_grad_ = where_possible  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DTensor.requires_grad_ = require  # type: ignore[method-assign]


@contextmanager
def _accumulating(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def _groups(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered by itself: every block, and the embeddings unless they are tied; the rest is the root's."""
    inside: set[nn.Module] = set()
    for block in blocks(model):
        inside.update(block.modules())
        yield block
    embeddings = [getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output")]
    owners = [m for m in embeddings if m is not None and m not in inside]
    if len({id(m.weight) for m in owners}) == len(owners):
        yield from owners
