"""Files from others, checked before anything in them is used: strict JSON, safetensors headers, links."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dora_dist.errors import UserError


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
    """The header of a safetensors file, which `safe_open` checks against the file's size. Reads no tensor.

    Raises:
        UserError: it is no such file, is cut off, or contradicts itself.
    """
    try:
        # safe_open calls missing what it cannot open, so it is opened here. For torch it would map all bytes.
        with path.open("rb") as file, safe_open(path, framework="np"):
            raw = file.read(int.from_bytes(file.read(8), "little"))
        tree = parse_json(raw)  # safe_open takes the last of two tensors of one name
        metadata = tree.pop("__metadata__", None) or {}
        tensors = {name: _stored(path, name, about, 8 + len(raw)) for name, about in tree.items()}
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a readable safetensors file, or cut off: {reason}; fetch or write it again"
        ) from None
    return Header(tensors, metadata)


def _stored(path: Path, name: str, about: Any, first: int) -> Stored:
    """What a header says of one tensor; `first` is where the file's data begin. Other forms, which safe_open reads
    too, are refused."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(about, dict) or about.keys() != keys or not isinstance(about["dtype"], str):
        raise ValueError(f"{name!r} is no object of dtype, shape and data_offsets alone")
    start, stop = about["data_offsets"]
    return Stored(path, about["dtype"], tuple(about["shape"]), first + start, first + stop)
