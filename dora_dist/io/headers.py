"""Files from others, checked before anything in them is used: strict JSON, safetensors headers, links.

A header is checked by its own numbers, so that no tensor is allocated for a file that lies about itself.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dora_dist.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_DIMENSIONS = 64  # torch's own limit
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


class StrictDecoder(json.JSONDecoder):
    """The standard decoder lets NaN, infinities and keys that stand twice pass; this one remembers having met one.

    `problem()` gives the first since it was last asked, or "".
    """

    def __init__(self) -> None:
        self._problems: list[str] = []
        super().__init__(parse_constant=self._constant, parse_float=self._float, object_pairs_hook=self._object)

    def problem(self) -> str:
        found = self._problems[0] if self._problems else ""
        self._problems.clear()
        return found

    def _constant(self, name: str) -> float:
        self._problems.append(f"{name} is not JSON; valid would be a number or null")
        return float(name)

    def _float(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            self._problems.append(f"the number {text[:30]} is too large")
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self._problems.append(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
        return made


def parse_json(text: bytes | str) -> Any:
    """Raises ValueError: not JSON by the strict rules, or nested too deeply."""
    decoder = StrictDecoder()
    try:
        value = decoder.decode(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    problem = decoder.problem()
    if problem:
        raise ValueError(problem)
    return value


def read_json(path: Path) -> Any:
    """Raises UserError: the file cannot be read, or is not JSON by the strict rules."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None


def check_path(path: str | Path, key: str) -> None:
    """Raise a UserError that names the setting `key` where nobody can tell what `path` is: a name too long, links
    in a circle, no permission. That nothing is there is fine."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {str(path)[:200]!r} cannot be read: {reason}") from None


def check_link(path: Path) -> Path:
    """`path`, unless it is a link out of its directory. The hub's cache links from snapshots/REVISION to blobs/.

    Raises:
        UserError: it leads elsewhere.
    """
    home, target = path.parent.resolve(), path.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise UserError(f"{path}: a link that leads out of its directory, to {str(target)!r}; copy the file here")
    return path


class Stored(NamedTuple):
    """One tensor in a safetensors file; its bytes are [start, stop) of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size. Reads nothing else.

    Raises:
        UserError: it is no such file, is cut off, or contradicts itself.
    """
    try:
        raw, data_bytes = _raw_header(path)
        tree = parse_json(raw)
        if not isinstance(tree, dict):
            raise ValueError("its header is not an object")
        metadata = tree.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("'__metadata__' does not map names to strings")
        tensors = {name: _stored(path, name, about, 8 + len(raw)) for name, about in tree.items()}
        _check_places(tensors, 8 + len(raw), data_bytes)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable safetensors file: {reason}") from None
    return Header(tensors, metadata)


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and how many bytes follow them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header of {length:,} bytes does not fit into its {size:,} bytes")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length:,} bytes is larger than {MAX_HEADER_BYTES:,}")
        return file.read(length), size - 8 - length


def _stored(path: Path, name: str, about: Any, first: int) -> Stored:
    """What a header says of one tensor; `first` is where the file's data begin."""
    if not isinstance(about, Mapping) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} lacks one of dtype, shape and data_offsets, or has more")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has no valid data_offsets")
    start, stop = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"{name!r} is {shape} of {dtype}, which are not its {stop - start:,} bytes")
    return Stored(path, dtype, tuple(shape), first + start, first + stop)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_places(tensors: Mapping[str, Stored], first: int, data_bytes: int) -> None:
    """That the tensors lie one behind the other and fill the file."""
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"{name!r} does not begin where the tensor before it ends")
        end = tensor.stop
        if end > first + data_bytes:
            missing = end - first - data_bytes
            raise ValueError(f"{name!r} ends {missing:,} bytes behind the file's end: it is cut off")
    if end != first + data_bytes:
        raise ValueError(f"{first + data_bytes - end:,} bytes behind its last tensor belong to none")
