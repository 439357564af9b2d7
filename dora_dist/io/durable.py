"""Directories that are whole or not there, and that tell when a bit of them has changed.

A new directory is written under another name; each file is flushed to the disk and hashed as it is written; a
manifest with sizes and hashes comes last; then the directory is renamed, and its parent flushed. A process that
is killed at any moment leaves the old state or the new one, and at most a partial directory for `sweep`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

MANIFEST = "manifest.json"
PARTIAL, _GONE = ".partial-", ".gone-"
SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
}  # fmt: skip
TensorHead = tuple[str, torch.dtype, Sequence[int]]  # name, dtype, shape


class Damaged(Exception):
    """A directory is not what its manifest says: names the file."""


class NewFile:
    """A file being written, hashed on the way."""

    def __init__(self, file: IO[bytes]):
        self._file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.hash.update(data)
        self.size += len(data)


class NewDirectory:
    """`final`, while it is written. Left without `commit`, or by an error, nothing of it stays."""

    def __init__(self, final: Path):
        self.final = final
        self._files: dict[str, dict[str, Any]] = {}
        self._partial = final.with_name(f"{PARTIAL}{final.name}-{os.getpid()}")

    def __enter__(self) -> "NewDirectory":
        self.final.parent.mkdir(parents=True, exist_ok=True)
        _flush_directory(self.final.parent.parent)
        self._partial.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def file(self, name: str) -> Iterator[NewFile]:
        """A file of it, flushed to the disk at the end of the block."""
        with _flushed(self._partial / name) as file:
            new = NewFile(file)
            yield new
        self._files[name] = {"size": new.size, "sha256": new.hash.hexdigest()}

    def commit(self, manifest: dict[str, Any]) -> None:
        """Add the manifest and let the directory appear, in place of an older one of its name."""
        with _flushed(self._partial / MANIFEST) as file:
            file.write(_sealed({**manifest, "files": self._files}))
        _flush_directory(self._partial)
        if self.final.exists():
            remove(self.final)
        os.rename(self._partial, self.final)
        _flush_directory(self.final.parent)


def verify(directory: Path, names: Set[str]) -> dict[str, Any]:
    """The manifest, once every file has been read and is what it says; these files and no others.

    Raises:
        Damaged: a file is missing, or its size or a bit has changed, or it lies elsewhere.
    """
    manifest = read_manifest(directory)
    files = manifest.get("files")
    if not isinstance(files, dict) or files.keys() != names:
        raise Damaged(f"{directory / MANIFEST} does not name the files {', '.join(sorted(names))}")
    for name, expected in files.items():
        digest = hashlib.sha256()
        if (directory / name).is_symlink():
            raise Damaged(f"{directory / name} is a link")
        try:
            with (directory / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != expected["size"]:
                    raise Damaged(
                        f"{directory / name} does not have the {expected['size']} bytes that were written"
                    )
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise Damaged(f"{directory / name} cannot be read: {error.strerror}") from None
        if digest.hexdigest() != expected["sha256"]:
            raise Damaged(f"{directory / name} is not what was written (SHA-256)")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest alone, checked against its own hash. Raises Damaged."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(data)
        del manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{path} is not what was written") from None
    if _sealed(manifest) != data:
        raise Damaged(f"{path} is not what was written (SHA-256)")
    return manifest


def remove(directory: Path) -> None:
    """Delete a directory; half deleted it does not go by its name any more."""
    gone = directory.with_name(f"{_GONE}{directory.name}-{os.getpid()}")
    os.rename(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Delete what killed processes left in `parent`."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if not path.name.startswith((PARTIAL, _GONE)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[NewFile]:
    """Replace one file: afterwards there is the old one or the new one, on the disk."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    try:
        with _flushed(partial) as file:
            yield NewFile(file)
        os.replace(partial, path)
        _flush_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(
    file: NewFile, heads: Sequence[TensorHead], values: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, one tensor after the other: `values` may be made while they are written. Wider dtypes
    come first, as readers want each tensor to begin at a multiple of its items' size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, dtype, shape in heads:
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        assert offset % dtype.itemsize == 0, name
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, dtype, shape), tensor in zip(heads, values, strict=True):
        assert tensor.dtype == dtype and tensor.shape == torch.Size(shape), name
        file.write(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order. A tensor of one element counts as contiguous whatever its strides are,
    and a view of another dtype asks for a stride of 1: so the strides are set here."""
    values = tensor.detach().cpu().contiguous()
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest's file: JSON in one fixed form, with the hash of the rest of it."""
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    seal = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": seal}, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def _flushed(path: Path) -> Iterator[IO[bytes]]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(directory: Path) -> None:
    """Make names in it last."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
