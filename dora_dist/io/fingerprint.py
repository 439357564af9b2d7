"""What identifies a base model and a tokenizer, so that an adapter or a checkpoint meets no others.

A base is too large to be read as a whole for this: a few windows of each tensor's bytes are. Another model, and
another training of the same one, differs in all of them; a damaged byte elsewhere goes unnoticed.
"""

import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dora_dist.io.headers import Stored

_WINDOWS, _WINDOW_BYTES = 16, 256  # of each tensor
_END_BYTES = 1 << 20  # of a file of which only the ends are read
# Of config.json: what changes with the library that wrote it, and the dtypes of weights that say theirs.
_VOLATILE = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}


class WeightFiles(Protocol):
    """The files of a model's weights."""

    stored: dict[str, Stored]  # the tensors of safetensors files
    pickled: list[Path]  # or the files of pickles


@dataclass(frozen=True)
class Base:
    """What an adapter was trained on."""

    fingerprint: str
    quantization: str = "none"  # or scheme, block size and double quantization


def base_fingerprint(files: WeightFiles | None, directory: Path, seed: int = 0) -> str:
    """Identifies a model: the same however its tensors are spread over files.

    Args:
        files: None: random weights, which config.json and `seed` make.
        directory: holds config.json.
    """
    config = json.loads((directory / "config.json").read_bytes())
    digest = hashlib.sha256(_canonical(_lasting(config)))
    if files is None:
        digest.update(b"random weights %d" % seed)
        return digest.hexdigest()
    with ExitStack() as stack:
        handles: dict[Path, int] = {}
        for name, tensor in sorted(files.stored.items()):
            if tensor.path not in handles:
                handles[tensor.path] = stack.enter_context(tensor.path.open("rb")).fileno()
            digest.update(_canonical([name, tensor.dtype, tensor.shape]))
            digest.update(_windows(handles[tensor.path], tensor))
    for path in files.pickled:
        digest.update(_canonical([path.name, ends_digest(path)]))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identifies what decides ids and text of a fast tokenizer: its backend, special tokens, chat template.

    Truncation and padding are left out: they are what the last call asked for.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)
    about = [backend, tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.model_input_names]
    return hashlib.sha256(_canonical(about)).hexdigest()


def ends_digest(path: Path) -> str:
    """Of a file's size and its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(b"%d " % size + file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def _windows(handle: int, tensor: Stored) -> bytes:
    """Evenly spaced windows of a tensor's bytes, the first at its start and the last at its end."""
    size = tensor.stop - tensor.start
    if size <= _WINDOWS * _WINDOW_BYTES:
        return os.pread(handle, size, tensor.start)
    last = size - _WINDOW_BYTES
    starts = (tensor.start + last * i // (_WINDOWS - 1) for i in range(_WINDOWS))
    return b"".join(os.pread(handle, _WINDOW_BYTES, start) for start in starts)


def _lasting(value: Any) -> Any:
    """config.json, or a section of it, without volatile keys."""
    if isinstance(value, dict):
        return {key: _lasting(v) for key, v in value.items() if key not in _VOLATILE}
    return value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()
