"""Tensors that lie in pieces on the ranks, brought together and spread out again in batches.

One way for every sharding: it needs only the rectangles of a tensor that a rank holds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dora_dist.errors import UserError
from dora_dist.io.durable import SAFETENSORS, TensorHead
from dora_dist.io.headers import read_header
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, as_matrix

_BATCH_BYTES = 64 << 20  # of whole tensors at a time


@dataclass(frozen=True)
class Stacked:
    """`count` matrices of one size, here one below the other. In a file they are one matrix, too, with their axes
    (number, row, column) in another `order`: the first two are its rows if the number is first, else the last two
    its columns."""

    count: int
    order: tuple[int, int, int]

    def to_file(self, here: Tensor) -> Tensor:
        axes = here.view(self.count, -1, here.shape[1]).permute(self.order)
        return axes.flatten(0, 1) if self.order[0] == 0 else axes.flatten(1, 2)

    def from_file(self, stored: Tensor, rows: slice | None = None) -> Tensor:
        """These `rows` (None: all) as they are here. Of the file's tensor their matrices alone are read."""
        first = self.order[0] == 0
        axes = stored.unflatten(0, (self.count, -1)) if first else stored.unflatten(1, (-1, self.count))
        axes = axes.permute([self.order.index(axis) for axis in range(3)])
        each = axes.shape[1]
        rows = rows or slice(0, self.count * each)
        begin = rows.start // each
        found = axes[begin : -(-rows.stop // each)].flatten(0, 1)
        return found[rows.start - begin * each : rows.stop - begin * each]

    def file_shape(self, here: Sequence[int]) -> torch.Size:
        return self.to_file(torch.empty(*here, device="meta")).shape


@dataclass(frozen=True)
class ShardedTensor:
    """One tensor of a file, and this rank's part of it: rectangles to read from or to write to."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # here
    own: list[Rectangle]
    owned: bool  # in a sum over the ranks: a whole copy does on one of them only
    stacked: Stacked | None = None  # in the file as it says; None: as here

    @property
    def head(self) -> TensorHead:
        shape = self.shape if self.stacked is None else tuple(self.stacked.file_shape(self.shape))
        return self.name, self.dtype, shape

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def gathered(
    pieces: Iterable[ShardedTensor], sum_: Callable[[Tensor], object], device: torch.device
) -> Iterator[Tensor]:
    """The whole tensors, on the host. Each rank lays its part into zeros, and the bytes of all are summed: exact
    for any dtype, one collective for many tensors, whatever the sharding."""
    for batch in _batches(pieces):
        flat, wholes = _buffer(batch, device)
        for piece, whole in zip(batch, wholes, strict=True):
            for own in piece.own if piece.owned else ():
                as_matrix(whole)[own.rows, own.cols].copy_(own.values)
        sum_(flat)
        for piece, whole in zip(batch, wholes, strict=True):
            yield piece.stacked.to_file(whole.cpu()) if piece.stacked else whole.cpu()


def finish(values: Iterator[Tensor]) -> None:
    """Take part in the rest of a gathering: on ranks that do not write, and on one that failed to."""
    for _ in values:
        pass


@torch.no_grad()
def spread(path: Path, pieces: Sequence[ShardedTensor], processes: Processes) -> None:
    """Fill each rank's part from a file that rank 0 reads."""
    processes.on_main(lambda: _check_fits(path, pieces))
    file = safe_open(path, framework="pt") if processes.is_main else None
    for batch in _batches(pieces):
        flat, wholes = _buffer(batch, processes.device)
        if file is not None:
            for piece, whole in zip(batch, wholes, strict=True):
                stored = file.get_tensor(piece.name)
                whole.copy_(piece.stacked.from_file(stored) if piece.stacked else stored)
        processes.broadcast_(flat)
        for piece, whole in zip(batch, wholes, strict=True):
            for own in piece.own:
                own.values.copy_(as_matrix(whole)[own.rows, own.cols])


def _check_fits(path: Path, pieces: Sequence[ShardedTensor]) -> None:
    tensors = read_header(path).tensors
    for piece in pieces:
        stored = tensors.get(piece.name)
        if stored is None:
            raise UserError(f"{path}: holds no {piece.name!r}, which this run trains")
        _, dtype, shape = piece.head
        found, needed = (stored.dtype, list(stored.shape)), (SAFETENSORS[dtype], list(shape))
        if found != needed:
            raise UserError(
                f"{path}: {piece.name!r} is {found[0]} {found[1]}, this run's is {needed[0]} {needed[1]}"
            )


def _batches(pieces: Iterable[ShardedTensor]) -> Iterator[list[ShardedTensor]]:
    batch: list[ShardedTensor] = []
    held = 0
    for piece in pieces:
        if batch and held + piece.bytes > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += piece.bytes
    if batch:
        yield batch


def _buffer(batch: Sequence[ShardedTensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Zero bytes for a batch, and each tensor's place in them."""
    lengths = [-(-piece.bytes // 8) * 8 for piece in batch]  # as views of other dtypes must begin
    flat = torch.zeros(sum(lengths), dtype=torch.uint8, device=device)
    places = zip(batch, flat.split(lengths), strict=True)
    return flat, [part[: piece.bytes].view(piece.dtype).view(piece.shape) for piece, part in places]
