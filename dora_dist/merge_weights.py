"""The tensors of a merged model, read, merged and written one at a time.

Memory: one output file, one tensor with its copies (read, cast, merged) and the adapter; safetensors before 0.8
copies a file once more while writing it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_dist.adapter import load_adapter
from dora_dist.build import Blueprint, materialize
from dora_dist.errors import UserError
from dora_dist.functional import merge_, norm_ratio, squared_norms
from dora_dist.layers import DoraLayer
from dora_dist.quant import Nf4, dequantize, quantize
from dora_dist.shards import Rectangle, Whole
from dora_dist.weights import SafetensorsFiles, aliases, base_tensors, missing_from, packed_layers

_TILE_ELEMENTS = 1 << 20  # quantized or compared at a time


@dataclass(frozen=True)
class Entry:
    """One tensor of the merged model: its name, where it comes from, and what is done to it."""

    name: str
    source: str  # its name in the base's files
    parameter: Tensor  # on the meta device unless it is trained in full
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: DoraLayer | None  # what adapts it
    layout: Nf4 | None  # how the run holds it in 4 bits

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _TrainedAlone(Whole):
    """One process that has the adapter's tensors and has left the base on the meta device."""

    def rectangles(self, parameter: Tensor) -> list[Rectangle]:
        return [] if parameter.is_meta else super().rectangles(parameter)


def read_plan(blueprint: Blueprint, adapter: Path) -> tuple[list[Entry], bool]:
    """What to write, and whether tied weights part in it. Reads the adapter into the blueprint's meta model."""
    model, files = blueprint.model, blueprint.files
    assert files is not None
    trained = {name for name, tensor in base_tensors(model).items() if tensor.requires_grad}
    missing = [name for name in missing_from(files, model) if name not in trained]
    if missing:
        raise UserError(
            f"model.path: {str(files.directory)!r} has no tensor {missing[0]!r} ({len(missing)} missing): merge "
            "needs files whose names are the model's own (load the model with transformers and save it anew)"
        )
    materialize(model, lambda p: _empty(p) if p.requires_grad else p, torch.device("cpu"))
    load_adapter(model, adapter, _TrainedAlone())
    groups, packed = aliases(model), packed_layers(model)
    dtype = getattr(torch, blueprint.config.model.dtype)
    entries, unties = [], False
    for first, tensor in base_tensors(model).items():
        layers = {name: _adapting(model, name) for name in groups[first]}
        layout = packed[tensor].layout if tensor in packed else None
        shape = (layout.rows, layout.columns) if layout else tuple(tensor.shape)
        kind = layout.dtype if layout else dtype if tensor.requires_grad else tensor.dtype
        source = next((name for name in layers if name in files.shapes), first)
        if not tensor.requires_grad and files.shapes[source] != shape:  # a base that is stored in 4 bits, say
            raise UserError(
                f"model.path: merge reads 16-bit weights: {str(files.directory)!r} has {source!r} as "
                f"{list(files.shapes[source])}, the model as {list(shape)}"
            )
        parts = len(set(layers.values())) > 1
        unties |= parts
        for name in layers if parts else [source]:
            entries.append(Entry(name, source, tensor, shape, kind, layers[name], layout))
    return entries, unties


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="cpu"))


def _adapting(model: nn.Module, name: str) -> DoraLayer | None:
    """The layer that adapts the tensor `name`."""
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    return module if isinstance(module, DoraLayer) and attribute == "weight" else None


@torch.no_grad()
def write_weights(entries: list[Entry], blueprint: Blueprint, out: Path, base: str, limit: int) -> int:
    """Write the safetensors files and their index, and return how many files there are."""
    assert blueprint.files is not None
    groups, drift = list(_by_file(entries, limit)), Drift()
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {entry.name: _values(entry, blueprint.files, base, drift) for entry in group}
        save_file(tensors, out / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        del tensors  # before the next file's are read
    index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if drift.weights:
        print(
            f"original against dequantized base: {drift.weights} merged weights differ by "
            f"{drift.ratio:.3g} of their norm"
        )
    return len(groups)


def _by_file(entries: list[Entry], limit: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.bytes for e in group) + entry.bytes > limit:
            yield group
            group = []
        group.append(entry)
    yield group


def _values(entry: Entry, files: SafetensorsFiles, base: str, drift: "Drift") -> Tensor:
    """The merged tensor."""
    if not entry.parameter.is_meta:
        return entry.parameter.detach().to(entry.dtype, copy=True)
    if not entry.shape:
        return files.read(entry.source, Rectangle(torch.empty(1, 1))).reshape(()).to(entry.dtype)
    read = files.rows(entry.source, slice(None))
    if entry.layout is None:
        return _merged(entry, read.to(entry.dtype, copy=True))
    trained_on = _merged(entry, _through_4_bits(read, entry.layout))
    if base == "dequantized":
        return trained_on
    values = _merged(entry, read.to(entry.dtype, copy=True))
    drift.add(values, trained_on)
    return values


def _merged(entry: Entry, weight: Tensor) -> Tensor:
    """(m/n) * (W + s B A), written over `weight` [N, K]."""
    layer = entry.layer
    if layer is not None:
        scaling, dim = layer.spec.scaling, layer.magnitude_dim
        ratio = None
        if layer.magnitude is not None:
            ratio = norm_ratio(layer.magnitude, squared_norms(weight, *layer.factors, scaling, dim).sqrt_())
        merge_(weight, *layer.factors, scaling, ratio, dim)
    return weight


def _through_4_bits(weight: Tensor, layout: Nf4) -> Tensor:
    """What the run computes with in place of `weight` [N, K], in the layout's dtype."""
    out = torch.empty(layout.rows, layout.columns, dtype=layout.dtype)
    step = max(1, _TILE_ELEMENTS // layout.columns)
    for rows, made in zip(weight.split(step), out.split(step), strict=True):
        made.copy_(dequantize(quantize(rows, layout), layout))
    return out


class Drift:
    """The norm of the difference of two models' weights over that of the second's."""

    def __init__(self) -> None:
        self.weights = 0
        self._squares = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Tensor, reference: Tensor) -> None:
        self.weights += 1
        step = max(1, _TILE_ELEMENTS // values.shape[1])
        for a, b in zip(values.split(step), reference.split(step), strict=True):
            a, b = a.double(), b.double()
            self._squares += torch.stack([(a - b).square().sum(), b.square().sum()])

    @property
    def ratio(self) -> float:
        difference, reference = self._squares.sqrt().tolist()
        return difference / reference if reference else 0.0
