"""Weights into a sharded model: each rank reads its own part of each tensor and nothing else.

Parts are sliced straight out of the safetensors files, whatever their tensors are called and however transformers
fuses them (files.py). What that cannot say transformers loads on rank 0, which hands the tensors out one by one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dora_dist.dora.layers import DoraLayer
from dora_dist.errors import UserError
from dora_dist.models.files import LoadedWeights, SafetensorsFiles, Weights
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, Shards, named_generator, write_whole
from dora_dist.quant.modules import BaseWeight
from dora_dist.quant.nf4 import PackedMatrix

_READ_ELEMENTS = 1 << 24  # read at a time


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that a checkpoint of the bare model holds; tied ones stand once. Of a
    4-bit weight that is what holds its codes."""
    others = {p for m in model.modules() if isinstance(m, DoraLayer) for p in (m.lora_A, m.lora_B, m.magnitude)}
    others |= {p for m in model.modules() if isinstance(m, BaseWeight) for p in m.weight_parts[1:]}
    first: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in others:
            first.setdefault(tensor, name)
    return {name: tensor for tensor, name in first.items()}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each tied tensor's first name, all its names."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(name)
    return {group[0]: group for group in names.values()}


def missing_from(files: Weights, model: nn.Module) -> list[str]:
    """The base tensors of `model` that no file holds under any of their names."""
    groups = aliases(model)
    return [n for n in base_tensors(model) if not any(alias in files.shapes for alias in groups[n])]


def packed_layers(model: nn.Module) -> dict[Tensor, BaseWeight]:
    """The layers of 4-bit weights, by the parameter that holds the codes."""
    return {m.weight: m for m in model.modules() if isinstance(m, BaseWeight) and m.layout is not None}


def stands_for(
    tensor: Tensor, packed: Mapping[Tensor, BaseWeight], shards: Shards
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a whole base tensor, of a packed one those of what it stands for."""
    layout = packed[tensor].layout if tensor in packed else None
    return (layout.shape, layout.dtype) if layout is not None else (tuple(shards.shape(tensor)), tensor.dtype)


def check_shapes(files: SafetensorsFiles, model: nn.Module) -> None:
    """Raises UserError: the files' tensors are not of the model's shapes."""
    for name, tensor in base_tensors(model).items():
        found = files.shapes.get(name)
        if found is not None and found != tuple(tensor.shape):
            raise UserError(
                f"model.path: {str(files.directory)!r} does not fit its config.json: {files.origins[name].told()} "
                f"is {list(found)}, the model's {name!r} {list(tensor.shape)}"
            )


@torch.no_grad()
def load_slices(model: nn.Module, files: SafetensorsFiles, shards: Shards, device: torch.device) -> None:
    """Fill this rank's part of each tensor that a file holds, a few rows at a time; weights are put into 4 bits
    here, on `device`, or copied where they are already."""
    groups, packed = aliases(model), packed_layers(model)
    for name, tensor in base_tensors(model).items():
        source = next((alias for alias in groups[name] if alias in files.shapes), None)
        if source is None:
            continue
        if source in files.four_bit:
            _copy_four_bit(packed[tensor], files, source, shards)
            continue
        if tensor in packed:
            packed[tensor].write_rows(shards, partial(files.rows, source), device)
            continue
        for own in shards.rectangles(tensor):
            for piece in _pieces(own):
                piece.values.copy_(files.read(source, piece))
        shards.after_write(tensor)


def _pieces(own: Rectangle) -> Iterator[Rectangle]:
    """Rows of a rectangle, or parts of rows, small enough to be held twice."""
    columns = own.values.shape[1]
    rows = max(1, _READ_ELEMENTS // max(1, columns))
    for row in range(0, own.values.shape[0], rows):
        for col in range(0, columns, _READ_ELEMENTS):
            values = own.values[row : row + rows, col : col + _READ_ELEMENTS]
            yield Rectangle(values, own.row + row, own.col + col)


def _copy_four_bit(layer: BaseWeight, files: SafetensorsFiles, source: str, shards: Shards) -> None:
    for matrix, rows, _ in layer.own_rows(shards):
        assert isinstance(matrix, PackedMatrix)
        for part, values in zip(matrix.parts, files.four_bit[source].read(files, rows), strict=True):
            part.copy_(values)
    for part in layer.weight_parts:
        shards.after_write(part)


@torch.no_grad()
def load_whole(model: nn.Module, load: Callable[[], nn.Module], shards: Shards, processes: Processes) -> None:
    """Fill every base tensor from a model that `load` makes on rank 0, which hands the tensors out one by one."""
    source: LoadedWeights | None = None
    failure: str | None = None
    if processes.is_main:
        try:
            source = LoadedWeights(load())
            source.take_stacks(model)
        except UserError as error:
            failure = str(error)
    failure = processes.from_main(failure)  # which may take any time; all ranks end alike
    if failure is not None:
        raise UserError(failure)
    packed = packed_layers(model)
    for name, tensor in base_tensors(model).items():
        shape, dtype = stands_for(tensor, packed, shards)
        whole = torch.empty(shape, dtype=dtype, device=processes.device)
        if source is not None:
            whole.copy_(source.whole(name))
        _write(tensor, processes.broadcast_(whole), shards, packed)


@torch.no_grad()
def fill_random(model: nn.Module, names: Iterable[str], seed: int, std: float, shards: Shards) -> None:
    """Random values: matrices normal, vectors 1 where they scale and 0 where they shift. Each tensor depends on
    the seed and its name alone, so every sharding gets the same."""
    tensors, packed = base_tensors(model), packed_layers(model)
    for name in names:
        tensor = tensors[name]
        shape, dtype = stands_for(tensor, packed, shards)
        whole = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        if whole.dim() > 1:
            whole.normal_(0, std, generator=named_generator(seed, name))
        _write(tensor, whole.to(dtype) if tensor in packed else whole, shards, packed)


def _write(tensor: Tensor, whole: Tensor, shards: Shards, packed: dict[Tensor, BaseWeight]) -> None:
    if tensor in packed:
        packed[tensor].write_rows(shards, lambda rows: whole[rows])
    else:
        write_whole(tensor, whole, shards)
