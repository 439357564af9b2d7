"""The tensors of a merged model, read, merged and written one at a time, and each adapted one checked in its file.
They are written as the base has them: under its names, one for each expert where it has one for each.

Memory: one output file, one tensor with its copies (read, cast, merged) and the adapter; safetensors before 0.8
copies a file once more while writing it.
"""

import json
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_dist.adapters.adapter import load_adapter
from dora_dist.dora.inject import injection_of
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_math import norm_ratio
from dora_dist.models.build import Blueprint, materialize
from dora_dist.models.files import Weights
from dora_dist.models.origins import Box, Traced
from dora_dist.models.weights import aliases, base_tensors, packed_layers, stands_for
from dora_dist.parallel.shards import Rectangle, Shards, Whole, named_generator
from dora_dist.quant.nf4 import TILE_ELEMENTS, Nf4, dequantize, pieces, quantize

# A weight changes by at most this part of itself when it is rounded; fp32 sums are rounded, too.
_ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Entry:
    """One tensor of the merged model: its name, where it comes from, and what is done to it."""

    name: str
    source: str  # the one of its names that the base has it under
    parameter: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: DoraLayer | None  # what adapts it
    layout: Nf4 | None  # how the run holds it in 4 bits


@dataclass(frozen=True)
class Output:
    """One tensor of the merged files: which boxes of the model's tensors it is made of."""

    name: str
    shape: tuple[int, ...]
    transposed: bool  # the boxes lie in it with its last two dimensions swapped
    dtype: torch.dtype
    parts: list[tuple[Entry, Box]]

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
    return base_entries(model, weights.shapes, _TrainedAlone())


def base_entries(model: nn.Module, held: Container[str], shards: Shards) -> tuple[list[Entry], bool]:
    """The tensors of an injected model once it is merged, and whether tied ones part. `held`: the base's names."""
    groups, packed = aliases(model), packed_layers(model)
    trained_in_full = injection_of(model).saved_dtypes
    entries, unties = [], False
    for first, tensor in base_tensors(model).items():
        layers = {name: _adapting(model, name) for name in groups[first]}
        layout = packed[tensor].layout if tensor in packed else None
        shape, dtype = stands_for(tensor, packed, shards)
        dtype = trained_in_full.get(first, dtype)
        source = next((name for name in layers if name in held), first)
        parts = len(set(layers.values())) > 1
        unties |= parts
        for name in layers if parts else [source]:
            entries.append(Entry(name, source, tensor, shape, dtype, layers[name], layout))
    return entries, unties


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="cpu"))


def _adapting(model: nn.Module, name: str) -> DoraLayer | None:
    """The layer that adapts the tensor `name`."""
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    return module if isinstance(module, DoraLayer) and attribute == "weight" else None


def outputs(entries: list[Entry], weights: Weights) -> list[Output]:
    """What the files will hold: what the base's files hold, in the order of the model's tensors."""
    found: dict[str, Output] = {}
    for entry in entries:
        made_of, published = Traced.of_file(entry.name, entry.shape), (entry.name, entry.shape, False)
        is_published = entry.name == entry.source in weights.origins and entry.source not in weights.four_bit
        for box in (weights.origins[entry.name] if is_published else made_of).boxes:
            if is_published:
                published = weights.published(box.source)
            found.setdefault(box.source, Output(*published, entry.dtype, [])).parts.append((entry, box))
    return list(found.values())


@torch.no_grad()
def write_weights(entries: list[Entry], weights: Weights, out: Path, base: str, limit: int) -> str:
    """Write the safetensors files and their index, and say what was written.

    Raises:
        RuntimeError: an adapted weight, read back, does not act on vectors as base and adapter do.
    """
    written, merger = outputs(entries, weights), _Merger(weights, base)
    groups, where = list(_by_file(written, limit)), dict[str, str]()
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        probes: list[tuple[str, Box, Probe]] = []
        tensors = {output.name: merger.tensor(output, probes) for output in group}
        save_file(tensors, out / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        del tensors  # before the next file's are read
        with safe_open(out / name, framework="pt") as file:
            for key, box, probe in probes:
                probe.check(key, file.get_tensor(key), box)
    size, files = sum(output.bytes for output in written), len(groups)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    merger.drift.tell()
    return f"{len(written)} tensors, {size / 1e9:,.2f} GB in {files} file{'s' if files > 1 else ''}"


def _by_file(outputs: list[Output], limit: int) -> Iterator[list[Output]]:
    group: list[Output] = []
    for output in outputs:
        if group and sum(o.bytes for o in group) + output.bytes > limit:
            yield group
            group = []
        group.append(output)
    yield group


class _Merger:
    """Makes the tensors to write. Holds the model's tensor that it merged last: several may be made of it."""

    def __init__(self, weights: Weights, base: str):
        self.weights, self.base, self.drift = weights, base, Drift()
        self._last: tuple[Entry, Tensor, Probe | None] | None = None

    def tensor(self, output: Output, probes: "list[tuple[str, Box, Probe]]") -> Tensor:
        flat = torch.empty(math.prod(output.shape), dtype=output.dtype)
        for entry, box in output.parts:
            values, probe = self._merged(entry)
            flat.as_strided(box.size, box.stride, box.offset).copy_(values[box.places([0] * values.dim())])
            if probe is not None:
                probes.append((output.name, box, probe))
        if not output.transposed:
            return flat.view(output.shape)
        *outer, rows, columns = output.shape
        return flat.view(*outer, columns, rows).mT.contiguous()

    def _merged(self, entry: Entry) -> "tuple[Tensor, Probe | None]":
        if self._last is None or self._last[0] is not entry:
            self._last = None  # frees it
            self._last = entry, *self._merge(entry)
        return self._last[1:]

    def _merge(self, entry: Entry) -> "tuple[Tensor, Probe | None]":
        if entry.parameter.requires_grad:
            return entry.parameter.detach(), None
        layout = entry.layout
        if layout is not None and entry.source in self.weights.four_bit:
            stored = self.weights.four_bit[entry.source]
            return _adapted(entry, _by_tiles(layout, lambda rows: stored.read(self.weights, rows)))
        read = self.weights.whole(entry.source)
        if layout is None:
            return _adapted(entry, read.to(entry.dtype, copy=entry.layer is not None))
        trained_on = _adapted(entry, _by_tiles(layout, lambda rows: quantize(read[rows], layout)))
        if self.base == "dequantized":
            return trained_on
        original = _adapted(entry, read.to(entry.dtype, copy=True))
        self.drift.add(original[0], trained_on[0])
        return original


def _adapted(entry: Entry, weight: Tensor) -> "tuple[Tensor, Probe | None]":
    """(m/n) * (W + s B A), written over `weight` [N, K], and what it should compute."""
    layer = entry.layer
    if layer is None:
        return weight, None
    ratio = None if layer.magnitude is None else norm_ratio(layer.magnitude, layer.norm_over(weight))
    probe = Probe(entry.name, weight, layer, ratio)
    layer.merge_into(weight, ratio)
    return weight, probe


def _by_tiles(layout: Nf4, parts: Callable[[slice], list[Tensor]]) -> Tensor:
    """The dense matrix of what the run holds in 4 bits."""
    out = torch.empty(layout.shape, dtype=layout.dtype)
    for rows in pieces(slice(0, layout.rows), max(1, TILE_ELEMENTS // layout.columns)):
        out[rows] = dequantize(parts(rows), layout)
    return out


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

    def check(self, name: str, written: Tensor, box: Box) -> None:
        """Of the box that lies in a tensor of the files. RuntimeError: more than rounding lies between them."""
        merged = written.as_strided(box.size, box.stride, box.offset)
        expected = self.expected[box.start[0] : box.start[0] + box.size[0]]
        error = (_product(merged, self.vectors) - expected).norm()
        if not error <= 1.5 * _ROUNDING[merged.dtype] * _product(merged, self.vectors, squared=True).sum().sqrt():
            raise RuntimeError(
                f"the merged {name!r} does not compute what base and adapter do, so nothing was kept: on random "
                f"vectors it differs by {error / expected.norm():.3g}, more than rounding explains"
            )


def _product(weight: Tensor, vectors: Tensor, squared: bool = False) -> Tensor:
    """weight @ vectors in fp32, by tiles of rows; `squared`: of all their elements' squares."""
    step = max(1, TILE_ELEMENTS // weight.shape[1])
    tiles = (rows.float() for rows in weight.split(step))
    return torch.cat([rows.square() @ vectors.square() if squared else rows @ vectors for rows in tiles])


class Drift:
    """The norm of the difference of two models' weights over that of the second's."""

    def __init__(self) -> None:
        self.weights = 0
        self._squares = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Tensor, reference: Tensor) -> None:
        self.weights += 1
        step = max(1, TILE_ELEMENTS // values.shape[1])
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
