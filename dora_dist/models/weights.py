"""Weights into a sharded model: each rank reads its own rows of each tensor and nothing else.

Where the files' keys are the model's own names, rows are sliced straight out of the safetensors files. Where they
are not (older names, tensors that transformers fuses or renames while loading), no mapping is guessed:
transformers loads the checkpoint on rank 0, which hands the tensors out one by one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dora_dist.dora.experts import ExpertsForward, complete
from dora_dist.dora.layers import DoraLayer
from dora_dist.errors import UserError
from dora_dist.io.headers import Stored, check_link, read_header, read_json
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, Shards, as_matrix, named_generator, write_whole
from dora_dist.quant.bitsandbytes_files import FourBit
from dora_dist.quant.modules import BaseWeight
from dora_dist.quant.nf4 import PackedMatrix

_READ_ELEMENTS = 1 << 24  # read at a time
_PICKLE = "pytorch_model.bin"  # or its index: what transformers reads


class SafetensorsFiles:
    """The safetensors files of a Hugging Face directory: names and shapes from the headers, rows on demand.

    allow_pickle: where there are none, hold the names of the files of pickles, which transformers can load whole.
    """

    def __init__(self, directory: Path, allow_pickle: bool = False):
        self.directory = directory
        self.stored: dict[str, Stored] = {}
        self.four_bit: dict[str, FourBit] = {}
        self.pickled: list[Path] = []
        for path, indexed in self._files("model.safetensors").items():
            found = read_header(path).tensors
            # Of a tensor that two files hold the index names one.
            self.stored |= {name: t for name, t in found.items() if name not in self.stored or name in indexed}
        if not self.stored:
            self.pickled = self._pickles(allow_pickle)
        self.shapes = {name: tensor.shape for name, tensor in self.stored.items()}

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

    def read(self, name: str, own: Rectangle) -> Tensor:
        """The rows and columns of one tensor that `own` covers, as a matrix, in the file's dtype."""
        with safe_open(self.stored[name].path, framework="pt") as file:
            tensor = file.get_slice(name)
            rows = tensor[own.rows] if self.shapes[name] else tensor[...]
        return as_matrix(rows)[:, own.cols]

    def take_four_bit(self, found: Mapping[str, FourBit]) -> None:
        """Take these for the matrices that they stand for."""
        self.four_bit = dict(found)
        self.shapes.update({name: (stored.rows, stored.columns) for name, stored in found.items()})

    def block_sizes(self) -> dict[str, int]:
        """Of the weights that are in 4 bits here."""
        return {name: stored.block_size for name, stored in self.four_bit.items()}

    def rows(self, name: str, rows: slice) -> Tensor:
        with safe_open(self.stored[name].path, framework="pt") as file:
            return file.get_slice(name)[rows]


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


def missing_from(files: SafetensorsFiles, model: nn.Module) -> list[str]:
    """The base tensors of `model` that no file holds under any of their names."""
    groups = aliases(model)
    return [n for n in base_tensors(model) if not any(alias in files.shapes for alias in groups[n])]


def packed_layers(model: nn.Module) -> dict[Tensor, BaseWeight]:
    """The layers of 4-bit weights, by the parameter that holds the codes."""
    return {m.weight: m for m in model.modules() if isinstance(m, BaseWeight) and m.layout is not None}


def check_shapes(files: SafetensorsFiles, model: nn.Module) -> None:
    for name, tensor in base_tensors(model).items():
        found = files.shapes.get(name)
        if found is not None and found != tuple(tensor.shape):
            raise UserError(
                f"model.path: {str(files.directory)!r} does not fit its config.json: the file's {name!r} is "
                f"{list(found)}, the model's {list(tensor.shape)}"
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
    """Rows of a rectangle, few enough to be held twice."""
    row = own.row
    for values in own.values.split(max(1, _READ_ELEMENTS // max(1, own.values.shape[1]))):
        yield Rectangle(values, row, own.col)
        row += values.shape[0]


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
    source: dict[str, Tensor] = {}
    failure: str | None = None
    if processes.is_main:
        try:
            loaded = load()
            stack_experts(loaded, model)
            source = loaded.state_dict()
        except UserError as error:
            failure = str(error)
    failure = processes.from_main(failure)  # which may take any time; all ranks end alike
    if failure is not None:
        raise UserError(failure)
    packed = packed_layers(model)
    for name, tensor in base_tensors(model).items():
        layout = packed[tensor].layout if tensor in packed else None
        shape = layout.shape if layout else shards.shape(tensor)
        whole = torch.empty(shape, dtype=layout.dtype if layout else tensor.dtype, device=processes.device)
        if processes.is_main:
            whole.copy_(source[name])
        _write(tensor, processes.broadcast_(whole), shards, packed)


def stack_experts(loaded: nn.Module, model: nn.Module) -> None:
    """Have the bare `loaded` hold its experts as `model` does."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertsForward):
            complete(loaded.get_submodule(name), module.layout)


@torch.no_grad()
def fill_random(model: nn.Module, names: Iterable[str], seed: int, std: float, shards: Shards) -> None:
    """Random values: matrices normal, vectors 1 where they scale and 0 where they shift. Each tensor depends on
    the seed and its name alone, so every sharding gets the same."""
    tensors, packed = base_tensors(model), packed_layers(model)
    for name in names:
        tensor = tensors[name]
        layout = packed[tensor].layout if tensor in packed else None
        shape = layout.shape if layout else shards.shape(tensor)
        whole = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        if whole.dim() > 1:
            whole.normal_(0, std, generator=named_generator(seed, name))
        _write(tensor, whole if layout is None else whole.to(layout.dtype), shards, packed)


def _write(tensor: Tensor, whole: Tensor, shards: Shards, packed: dict[Tensor, BaseWeight]) -> None:
    if tensor in packed:
        packed[tensor].write_rows(shards, lambda rows: whole[rows])
    else:
        write_whole(tensor, whole, shards)
