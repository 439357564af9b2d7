"""The tensors of a merged model, read, merged and written one at a time, and each adapted one checked in its file.

Memory: one output file, one tensor with its copies (read, cast, merged) and the adapter; safetensors before 0.8
copies a file once more while writing it.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_dist.adapters.adapter import load_adapter
from dora_dist.dora.inject import injection_of
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_math import norm_ratio
from dora_dist.models.build import Blueprint, materialize
from dora_dist.models.weights import aliases, base_tensors, packed_layers
from dora_dist.parallel.shards import Rectangle, Whole, named_generator
from dora_dist.quant.bitsandbytes_files import FourBit
from dora_dist.quant.nf4 import Nf4, dequantize, quantize

_TILE_ELEMENTS = 1 << 20  # quantized or compared at a time
# A weight changes by at most this part of itself when it is rounded; fp32 sums are rounded, too.
_ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-10, torch.float32: 1e-5}


class Weights(Protocol):
    """A base's tensors: its files, or the model that transformers made of them."""

    shapes: dict[str, tuple[int, ...]]
    four_bit: dict[str, FourBit]

    def read(self, name: str, own: Rectangle) -> Tensor:
        """The rows and columns of one tensor that `own` covers, as a matrix."""

    def rows(self, name: str, rows: slice) -> Tensor: ...


@dataclass(frozen=True)
class Entry:
    """One tensor of the merged model: its name, where it comes from, and what is done to it."""

    name: str
    source: str  # its name in the base's files
    parameter: Tensor
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


def read_plan(blueprint: Blueprint, adapter: Path, weights: Weights) -> tuple[list[Entry], bool]:
    """What to write, and whether tied weights part in it. Reads the adapter into the blueprint's meta model."""
    model = blueprint.model
    materialize(model, lambda p: _empty(p) if p.requires_grad else p, torch.device("cpu"))
    load_adapter(model, adapter, _TrainedAlone(), blueprint.config.dora.accept_other_base)
    groups, packed = aliases(model), packed_layers(model)
    trained_in_full = injection_of(model).saved_dtypes
    entries, unties = [], False
    for first, tensor in base_tensors(model).items():
        layers = {name: _adapting(model, name) for name in groups[first]}
        layout = packed[tensor].layout if tensor in packed else None
        shape = layout.shape if layout else tuple(tensor.shape)
        kind = layout.dtype if layout else trained_in_full.get(first, tensor.dtype)
        source = next((name for name in layers if name in weights.shapes), first)
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
    """Write the safetensors files and their index, and return how many files there are.

    Raises:
        RuntimeError: an adapted weight, read back, does not act on vectors as base and adapter do.
    """
    assert blueprint.files is not None
    groups, drift = list(_by_file(entries, limit)), Drift()
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        probes: dict[str, Probe] = {}
        tensors = {entry.name: merged_values(entry, blueprint.files, base, drift, probes) for entry in group}
        save_file(tensors, out / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        del tensors  # before the next file's are read
        with safe_open(out / name, framework="pt") as file:
            for key, probe in probes.items():
                probe.check(key, file.get_tensor(key))
    index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    drift.tell()
    return len(groups)


def _by_file(entries: list[Entry], limit: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.bytes for e in group) + entry.bytes > limit:
            yield group
            group = []
        group.append(entry)
    yield group


def merged_values(entry: Entry, files: Weights, base: str, drift: "Drift", probes: "dict[str, Probe]") -> Tensor:
    """The merged tensor. Of an adapted one its probe is left in `probes`."""
    if entry.parameter.requires_grad:
        return entry.parameter.detach().to(entry.dtype, copy=True)
    if not entry.shape:
        return files.read(entry.source, Rectangle(torch.empty(1, 1))).reshape(()).to(entry.dtype)
    if entry.source in files.four_bit:
        return _merged(entry, _stored_in_4_bits(entry, files), probes)
    read = files.rows(entry.source, slice(None))
    if entry.layout is None:
        return _merged(entry, read.to(entry.dtype, copy=True), probes)
    trained_on = _merged(entry, _through_4_bits(read, entry.layout), probes)
    if base == "dequantized":
        return trained_on
    values = _merged(entry, read.to(entry.dtype, copy=True), probes)
    drift.add(values, trained_on)
    return values


def _merged(entry: Entry, weight: Tensor, probes: "dict[str, Probe]") -> Tensor:
    """(m/n) * (W + s B A), written over `weight` [N, K]."""
    layer = entry.layer
    if layer is not None:
        ratio = None
        if layer.magnitude is not None:
            ratio = norm_ratio(layer.magnitude, layer.norm_over(weight))
        probes[entry.name] = Probe(entry.name, weight, layer, ratio)
        layer.merge_into(weight, ratio)
    return weight


class Probe:
    """What base and adapter make of a few random vectors, to be compared with what the merged weight makes."""

    def __init__(self, name: str, weight: Tensor, layer: DoraLayer, ratio: Tensor | None):
        self.vectors = torch.randn(weight.shape[1], 4, generator=named_generator(0, name))
        dim, columns, expected = layer.magnitude_dim, slice(0, weight.shape[1]), []
        for block, (L_NR, U_RK) in zip(layer.blocks(), layer.block_factors(), strict=True):
            vectors, own = self.vectors, None if ratio is None else ratio[block.norms(dim, columns), None]
            if own is not None and dim == 1:
                vectors = vectors * own
            made = _product(weight[block.rows], vectors)
            if L_NR is not None and U_RK is not None:
                made += layer.spec.scaling * (L_NR @ (U_RK @ vectors))
            expected.append(made if own is None or dim == 1 else made * own)
        self.expected = torch.cat(expected)

    def check(self, name: str, merged: Tensor) -> None:
        """RuntimeError: more than rounding lies between them."""
        error = (_product(merged, self.vectors) - self.expected).norm()
        if not error <= 1.5 * _ROUNDING[merged.dtype] * _product(merged, self.vectors, squared=True).sum().sqrt():
            raise RuntimeError(
                f"the merged {name!r} does not compute what base and adapter do, so nothing was kept: on random "
                f"vectors it differs by {error / self.expected.norm():.3g}, more than rounding explains"
            )


def _product(weight: Tensor, vectors: Tensor, squared: bool = False) -> Tensor:
    """weight @ vectors in fp32, by tiles of rows; `squared`: of all their elements' squares."""
    step = max(1, _TILE_ELEMENTS // weight.shape[1])
    tiles = (rows.float() for rows in weight.split(step))
    return torch.cat([rows.square() @ vectors.square() if squared else rows @ vectors for rows in tiles])


def _through_4_bits(weight: Tensor, layout: Nf4) -> Tensor:
    """What the run computes with in place of `weight` [N, K], in the layout's dtype."""
    return _by_tiles(layout, lambda rows: quantize(weight[rows], layout))


def _stored_in_4_bits(entry: Entry, files: Any) -> Tensor:
    """The same of a base that is in 4 bits in its files."""
    assert entry.layout is not None
    stored = files.four_bit[entry.source]
    return _by_tiles(entry.layout, lambda rows: stored.read(files, rows))


def _by_tiles(layout: Nf4, parts: Callable[[slice], list[Tensor]]) -> Tensor:
    out = torch.empty(layout.shape, dtype=layout.dtype)
    step = max(1, _TILE_ELEMENTS // layout.columns)
    for start in range(0, layout.rows, step):
        rows = slice(start, min(start + step, layout.rows))
        out[rows] = dequantize(parts(rows), layout)
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

    def tell(self) -> None:
        if self.weights:
            print(
                f"original against dequantized base: {self.weights} merged weights differ by "
                f"{self.ratio:.3g} of their norm"
            )

    @property
    def ratio(self) -> float:
        difference, reference = self._squares.sqrt().tolist()
        return difference / reference if reference else 0.0
