"""The weight files of a model's directory: which tensors they hold, and any part of each on demand.

A tensor goes by its name in the files or, once the files were given a model, by the model's (origins.py).
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dora_dist.dora.experts import ExpertsForward
from dora_dist.errors import UserError
from dora_dist.io.headers import Stored, check_link, read_header, read_json
from dora_dist.models.origins import Box, Traced, declared_origins
from dora_dist.models.scaled import Fp8, Mxfp4, find_scaled
from dora_dist.parallel.shards import Rectangle
from dora_dist.quant.bitsandbytes_files import FourBit

_PICKLE = "pytorch_model.bin"  # or its index: what transformers reads


class Weights:
    """A base's tensors, by their names in the files or, once these were given a model, by the model's."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.scaled: dict[str, Fp8 | Mxfp4] = {}
        self.four_bit: dict[str, FourBit] = {}
        self._sources = dict(shapes)
        self._take({name: Traced.of_file(name, shape) for name, shape in shapes.items()})

    def published(self, source: str) -> tuple[str, tuple[int, ...], bool]:
        """As what a source stands in files that are not quantized: name, shape, and whether its last two
        dimensions are swapped."""
        scaled = self.scaled.get(source)
        if isinstance(scaled, Mxfp4):
            experts, rows, columns = scaled.shape
            return source.removesuffix("_blocks"), (experts, columns, rows), True
        return source, self._sources[source], False

    @abstractmethod
    def mapped(self, source: str) -> Tensor:
        """All of a source's tensor; of a file it is mapped and not read."""

    def _take(self, origins: dict[str, Traced]) -> None:
        self.origins = origins
        self.shapes = {name: tuple(traced.shape) for name, traced in origins.items()}

    def take_stacks(self, model: nn.Module) -> None:
        """Give experts' tensors the form that they have in an injected model: all experts' rows in one matrix."""
        for name, module in model.named_modules():
            for key in module.layout.shapes if isinstance(module, ExpertsForward) else ():
                own = self.origins.pop(f"{name}.{key}", None)
                if own is not None:
                    stack = self.origins[f"{name}.{key}.weight"] = module.layout.stacked(own)
                    self.shapes[f"{name}.{key}.weight"] = tuple(stack.shape)

    def read(self, name: str, own: Rectangle) -> Tensor:
        """The rows and columns of one tensor that `own` covers, as a matrix, in the file's dtype."""
        traced = self.origins[name]
        if not traced.dim():
            return self._elements(traced.boxes[0]).view(1, 1)
        parts = [
            self._part(traced, (own.row, *start), (own.rows.stop, *stop)).reshape(own.values.shape[0], -1)
            for start, stop in flat_boxes(own.col, own.cols.stop, traced.shape[1:])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def whole(self, name: str) -> Tensor:
        traced = self.origins[name]
        return self._part(traced, [0] * traced.dim(), traced.shape)

    def rows(self, name: str, rows: slice) -> Tensor:
        traced = self.origins[name]
        start, stop, _ = rows.indices(traced.shape[0])
        return self._part(traced, (start, *[0] * (traced.dim() - 1)), (stop, *traced.shape[1:]))

    def _part(self, traced: Traced, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """The elements between these indices of a tensor. Of the files nothing else is read."""
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        whole = torch.empty(0)
        for box in traced.within(start, stop):
            part = self._elements(box)
            if part.shape == size:
                return part
            if not whole.numel():
                whole = part.new_empty(size)
            whole = whole.to(torch.promote_types(whole.dtype, part.dtype))
            whole[box.places(start)] = part
        return whole

    def _elements(self, box: Box) -> Tensor:
        if box.source in self.scaled:
            scaled = self.scaled[box.source]
            last = box.offset + sum((n - 1) * step for n, step in zip(box.size, box.stride, strict=True))
            columns = scaled.shape[-1]
            first = box.offset // columns
            tensor = scaled.rows(self, first, last // columns + 1)
            return tensor.as_strided(box.size, box.stride, box.offset - first * columns)
        tensor = self.mapped(box.source)
        return tensor.as_strided(box.size, box.stride, tensor.storage_offset() + box.offset)


class SafetensorsFiles(Weights):
    """The safetensors files of a Hugging Face directory: names and shapes from the headers, rows on demand.

    allow_pickle: where there are none, hold the names of the files of pickles, which transformers can load whole.
    """

    def __init__(self, directory: Path, allow_pickle: bool = False):
        self.directory = directory
        self.stored: dict[str, Stored] = {}
        self.pickled: list[Path] = []
        for path, indexed in self._files("model.safetensors").items():
            found = read_header(path).tensors
            # Of a tensor that two files hold the index names one.
            self.stored |= {name: t for name, t in found.items() if name not in self.stored or name in indexed}
        if not self.stored:
            self.pickled = self._pickles(allow_pickle)
        super().__init__({name: tensor.shape for name, tensor in self.stored.items()})

    def _files(self, single: str) -> dict[Path, set[str]]:
        """The files of the index of `single`, each with the tensors that it is named for, or `single` itself."""
        index = self.directory / f"{single}.index.json"
        if not index.is_file():
            path = self.directory / single
            return {check_link(path): set()} if path.is_file() else {}
        tree = read_json(check_link(index))
        where = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(where, dict) or not where:
            raise UserError(f"{index}: not an index of weight files (no 'weight_map')")
        named: dict[Path, set[str]] = {}
        for tensor, name in sorted(where.items(), key=lambda item: str(item[1])):
            if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
                raise UserError(f"{index}: {name!r} is not the name of a file beside it")
            named.setdefault(self.directory / name, set()).add(tensor)
        for path in named:
            if not path.is_file():
                raise UserError(f"{index}: names the file {path.name!r}, which is missing")
            check_link(path)
        return named

    def _pickles(self, allowed: bool) -> list[Path]:
        """Raises UserError: there are none, or they are not allowed."""
        found = list(self._files(_PICKLE))
        others = sorted(p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if not found and not others:
            raise UserError(
                f"model.path: {str(self.directory)!r} holds neither model.safetensors nor "
                "model.safetensors.index.json (other weight formats must be converted to safetensors)"
            )
        if not found or not allowed:
            hint = f", or set model.allow_pickle=true to read {_PICKLE} without running code" if found else ""
            raise UserError(
                f"model.path: {str(self.directory)!r} holds weights as pickles only ({others[0]!r}), which can "
                f"run code when they are loaded; convert them to safetensors{hint}"
            )
        return found

    @property
    def bytes(self) -> int:
        """Of all of the files."""
        return sum(path.stat().st_size for path in {*self.pickled, *(t.path for t in self.stored.values())})

    def take_four_bit(self, found: Mapping[str, FourBit]) -> None:
        """Take these for the matrices that they stand for."""
        self.four_bit = dict(found)
        self.shapes.update({name: (stored.rows, stored.columns) for name, stored in found.items()})

    def block_sizes(self) -> dict[str, int]:
        """Of the weights that are in 4 bits here."""
        return {name: stored.block_size for name, stored in self.four_bit.items()}

    def take_scaled(self, about: Mapping[str, Any]) -> None:
        """Widen what is in FP8 or MXFP4, as config.json says in its quantization_config."""
        self.scaled, origins = find_scaled(self.stored, about)
        self._take(origins)

    def take_names(self, model: nn.Module) -> None:
        """Give the tensors the names that they have in `model`, as transformers declares what becomes of them."""
        self._take(declared_origins(model, self.origins))

    def mapped(self, source: str) -> Tensor:
        """All of a file's tensor, mapped and not read."""
        with safe_open(self.stored[source].path, framework="pt") as file:
            return file.get_slice(source)[...]


class LoadedWeights(Weights):
    """A loaded model's tensors, to be read as weight files are."""

    def __init__(self, model: nn.Module):
        self._tensors = model.state_dict()
        super().__init__({name: tuple(tensor.shape) for name, tensor in self._tensors.items()})

    def mapped(self, source: str) -> Tensor:
        return self._tensors[source].contiguous()


def flat_boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start` to `stop` of a flattened tensor of `shape` as boxes of it: the first and the last index of
    each, in the same order."""
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    while start < stop:
        index, rest = divmod(start, inner)
        count = (stop - start) // inner if rest == 0 else 0
        if count:
            yield (index, *[0] * (len(shape) - 1)), (index + count, *shape[1:])
            start += count * inner
            continue
        end = min(stop, (index + 1) * inner)
        for low, high in flat_boxes(rest, rest + end - start, shape[1:]):
            yield (index, *low), (index + 1, *high)
        start = end
