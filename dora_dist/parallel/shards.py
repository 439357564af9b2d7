"""The shard protocol: what the norms, the adapters and the weights need to know of a sharding, and nothing more.

A matrix parameter is, on this rank, a few rectangles of itself (one for a whole or row-sharded weight; up to three
for a flat range, which may begin and end inside a row). One process is the degenerate case: one rectangle, and
collectives that do nothing.
"""

import hashlib
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13


@dataclass(frozen=True)
class Rectangle:
    """This rank's own part of a matrix [N, K]: `values` [n, k] are rows `row`.. and columns `col`.. of it.
    A vector [N] is seen as a matrix [N, 1]. Writing to `values` writes to the parameter."""

    values: Tensor
    row: int = 0
    col: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.values.shape[0])

    @property
    def cols(self) -> slice:
        return slice(self.col, self.col + self.values.shape[1])


class Shards(Protocol):
    """How one model's parameters lie across the ranks. Every rank calls each method at the same point."""

    is_writer: bool
    """True on the one rank that writes files."""

    device: torch.device
    """Where tensors lie in collectives."""

    def reshard(self, model: nn.Module) -> None:
        """Bring every parameter into its sharded state."""
        return

    def shape(self, parameter: Tensor) -> torch.Size:
        """The whole tensor's shape."""

    def rectangles(self, parameter: Tensor) -> list[Rectangle]:
        """What this rank holds of a parameter or buffer; may be nothing."""

    def after_write(self, parameter: Tensor) -> None:
        """Called once the rectangles of `parameter` were written to: what was made from them is old now."""
        return

    def owns(self, parameter: Tensor) -> bool:
        """Whether what this rank holds counts in a sum over the ranks: a whole copy does on one of them only."""

    def rows_aligned(self, weight: Tensor, factor: Tensor, groups: int) -> bool:
        """Whether each rank's rows of `factor` go with its rows of `weight`: both consist of `groups` equal parts,
        one below the other, and have them on the same ranks. The same answer on every rank."""

    def gather(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The whole tensors, by one collective for all of them."""

    def sum_(self, flat: Tensor) -> None:
        """Sum a vector over the ranks that share one copy of the model, in place, by one collective."""

    def split_rows(self) -> "Shards":
        """The same for reading alone, where ranks that hold whole copies share the work: each has some rows."""


class Whole(Shards):
    """Every parameter is whole on this rank: one process, or data parallelism without sharding (`by_rows`: how its
    ranks share work)."""

    def __init__(self, is_writer: bool = True, by_rows: "RowsOfCopies | None" = None):
        self.is_writer, self._by_rows = is_writer, by_rows
        self.device = torch.device("cpu")  # sends nothing

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def rectangles(self, parameter: Tensor) -> list[Rectangle]:
        whole = parameter.detach()
        if whole.dim() <= 2 or whole.is_contiguous():
            return [Rectangle(as_matrix(whole))]
        # A convolution's in channels_last, say, is no view of a matrix, but each of its lines is.
        lines = itertools.product(*map(range, whole.shape[1:-1]))
        places: list[tuple[Any, ...]] = [(slice(None), *at) for at in lines]
        return [Rectangle(whole[place], col=n * whole.shape[-1]) for n, place in enumerate(places)]

    def owns(self, parameter: Tensor) -> bool:
        return True

    def rows_aligned(self, weight: Tensor, factor: Tensor, groups: int) -> bool:
        return True

    def gather(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [p.detach() for p in parameters]

    def sum_(self, flat: Tensor) -> None:
        pass

    def split_rows(self) -> Shards:
        return self._by_rows or self


class RowsOfCopies(Whole):
    """Whole copies on `size` ranks seen as if each held its share of the rows. `sum_` sums over these ranks."""

    def __init__(self, index: int, size: int, sum_: Callable[[Tensor], object]):
        super().__init__(is_writer=False)
        self.index, self.size, self._sum = index, size, sum_

    def rectangles(self, parameter: Tensor) -> list[Rectangle]:
        whole = as_matrix(parameter.detach())
        step = -(-whole.shape[0] // self.size)
        own = whole[self.index * step : (self.index + 1) * step]
        return [Rectangle(own, row=self.index * step)] if own.numel() else []

    def rows_aligned(self, weight: Tensor, factor: Tensor, groups: int) -> bool:
        return groups == weight.shape[0]

    def sum_(self, flat: Tensor) -> None:
        self._sum(flat)


class GroupShards(Shards):
    """What FSDP and ZeRO-3 share: each rank of `group` has a part of every split parameter, the others whole."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.index, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.is_writer = dist.get_rank() == 0

    @abstractmethod
    def is_split(self, parameter: Tensor) -> bool: ...

    @abstractmethod
    def _gather_split(self, parameters: list[Any]) -> list[Tensor]: ...

    def split_between(self, rows: int, groups: int) -> bool:
        """Whether `rows` of `groups` equal parts, split evenly among the ranks, are split between parts alone."""
        return rows % groups == 0 and groups % self.size == 0

    def must_gather(self, parameter: Tensor) -> bool:
        return self.is_split(parameter)

    def owns(self, parameter: Tensor) -> bool:
        return self.is_split(parameter) or self.index == 0

    def gather(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        split = [p for p in parameters if self.must_gather(p)]
        whole = iter(self._gather_split(split) if split else ())
        return [next(whole) if self.must_gather(p) else p.detach() for p in parameters]

    def sum_(self, flat: Tensor) -> None:
        dist.all_reduce(flat, group=self.group)

    def split_rows(self) -> Shards:
        return self

    def _all_gather(self, parts: list[Tensor], slots: list[int], shapes: list[torch.Size]) -> list[Tensor]:
        """The whole tensors of `shapes` by one collective. This rank holds `parts`, each padded to its slot, which
        has as many elements on every rank."""
        dtype = common_dtype(parts)
        flat = [part.reshape(-1).to(self.device, dtype) for part in parts]
        short = [slot - part.numel() for slot, part in zip(slots, flat, strict=True)]
        own = torch.cat([F.pad(part, (0, n)) if n else part for part, n in zip(flat, short, strict=True)])
        everyone = torch.empty(self.size * own.numel(), dtype=own.dtype, device=self.device)
        all_gather(everyone, own, group=self.group)
        columns = everyone.view(self.size, -1).split(slots, dim=1)
        return [
            column.reshape(-1)[: shape.numel()].view(shape).to(part.dtype)
            for column, shape, part in zip(columns, shapes, parts, strict=True)
        ]


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What tensors of several dtypes are sent in: exact for each of them."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What a sharding gathers at a time: the elements of outermost ModuleLists that have parameters."""
    for blocks in outermost_lists(model):
        yield from (block for block in blocks if any(True for _ in block.parameters()))


def outermost_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            yield module


def as_matrix(tensor: Tensor) -> Tensor:
    """[N] as [N, 1]; [N, ...] as [N, K]; a scalar as [1, 1]. Always a view, or an error: callers write to it."""
    if tensor.dim() == 0:
        return tensor.view(1, 1)
    if tensor.dim() == 2:
        return tensor
    return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:]))


def flat_rectangles(values: Tensor, start: int, shape: Sequence[int]) -> list[Rectangle]:
    """The elements `start`.. of a flattened tensor of `shape` as rectangles of it: the end of a row, whole rows,
    the beginning of a row, whichever there are. Views of `values` [n]."""
    columns = math.prod(shape[1:])
    rectangles = []
    stop = start + values.numel()
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        rows = (stop - position) // columns if column == 0 else 0
        taken = rows * columns or min(columns - column, stop - position)
        part = values[position - start : position - start + taken]
        rectangles.append(Rectangle(part.view(max(1, rows), -1), row, column))
        position += taken
    return rectangles


@torch.no_grad()
def write_whole(parameter: Tensor, values: Tensor, shards: Shards) -> None:
    """Write a whole tensor into this rank's part of a parameter."""
    matrix = as_matrix(values)
    for own in shards.rectangles(parameter):
        own.values.copy_(matrix[own.rows, own.cols])
    shards.after_write(parameter)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one tensor: its values depend on the run's seed and the name, not on who asks."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
