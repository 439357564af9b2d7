"""Headers of safetensors files that lie: what `safe_open` refuses, and what it would let through."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]


def _first(tree: dict) -> dict:
    return min((about for name, about in tree.items() if name != "__metadata__"), key=lambda a: a["data_offsets"])


def _last(tree: dict) -> dict:
    return max((about for name, about in tree.items() if name != "__metadata__"), key=lambda a: a["data_offsets"])


def _to_the_end(tree: dict) -> dict:
    start = _last(tree)["data_offsets"][0]
    return {"data_offsets": [start, start + 2**40]}


def _set(key: str, value: Any) -> Callable[[dict], object]:
    return lambda tree: _first(tree).update({key: value})


def _overlap(tree: dict) -> None:
    one, two = sorted((a for n, a in tree.items() if n != "__metadata__"), key=lambda a: a["data_offsets"])[:2]
    two.update(one)


def _another_form(change: Callable[[dict], object]) -> Callable[[dict], object]:
    """Of what the header says of its first tensor."""

    def rewrite(tree: dict) -> None:
        name = next(name for name, about in tree.items() if about is _first(tree))
        tree[name] = change(tree[name])

    return rewrite


REFUSED = "not a readable safetensors file, or cut off"  # in the words of safetensors' version
FORM = "is no object of dtype, shape and data_offsets alone"
HEADERS: dict[str, tuple[Callable[[dict], object], str]] = {  # changes to the header's tree
    "unknown dtype": (_set("dtype", "Q4"), REFUSED),
    "dtype of a wrong type": (_set("dtype", ["F32"]), REFUSED),
    "dtype as an object": (_set("dtype", {"F32": None}), FORM),
    "another dtype": (_set("dtype", "F64"), REFUSED),
    "no dtype": (lambda t: _first(t).pop("dtype"), REFUSED),
    "one key more": (_set("code", "x"), FORM),
    "no object": (_another_form(lambda about: [1]), REFUSED),
    "a list of the three": (_another_form(lambda a: [a[k] for k in ("dtype", "shape", "data_offsets")]), FORM),
    "negative size": (_set("shape", [-1, 4]), REFUSED),
    "half a row": (_set("shape", [1.5]), REFUSED),
    "true rows": (_set("shape", [True]), REFUSED),
    "a shape of text": (_set("shape", "12"), REFUSED),
    "an absurd size": (_set("shape", [2**62, 2**62]), REFUSED),
    "a size beyond 64 bits": (_set("shape", [2**70]), REFUSED),
    "a thousand dimensions": (_set("shape", [1] * 1000), REFUSED),
    "one row too many": (lambda t: _first(t)["shape"].append(2), REFUSED),
    "offsets the wrong way": (_set("data_offsets", [8, 0]), REFUSED),
    "three offsets": (_set("data_offsets", [0, 4, 8]), REFUSED),
    "negative offset": (_set("data_offsets", [-8, 0]), REFUSED),
    "beyond the file": (lambda t: _last(t).update(shape=[2**40], dtype="U8", **_to_the_end(t)), REFUSED),
    "two tensors in one place": (_overlap, REFUSED),
    "a hole": (lambda t: t.pop(min(n for n in t if n != "__metadata__")), REFUSED),
    "metadata in a list": (lambda t: t.update(__metadata__=["a"]), REFUSED),
    "metadata of numbers": (lambda t: t.update(__metadata__={"a": 1}), REFUSED),
}  # fmt: skip
EMPTY = b'{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {  # changes to the whole file
    "nothing": (lambda b: b"", REFUSED),
    "seven bytes": (lambda b: b[:7], REFUSED),
    "a length alone": (lambda b: b[:8], REFUSED),
    "half a header": (lambda b: b[:200], REFUSED),
    "an endless header": (lambda b: b"\xff" * 8 + b[8:], REFUSED),
    "cut off": (lambda b: b[:-5], REFUSED),
    "bytes behind the end": (lambda b: b + b"12345", REFUSED),
    "no JSON": (lambda b: b[:8] + b"x" + b[9:], REFUSED),
    "not UTF-8": (lambda b: b[:8] + b"\xff" + b[9:], REFUSED),
    "a list": (lambda b: _framed(b"[]"), REFUSED),
    "too deep": (lambda b: _framed(b"[" * 100_000), REFUSED),
    "a tensor twice": (lambda b: _framed(b'{"a": %s, "a": %s}' % (EMPTY, EMPTY)), "the key 'a' stands twice"),
    "a note twice": (
        lambda b: _framed(b'{"__metadata__": {"a": "x", "a": "y"}, "b": %s}' % EMPTY), "the key 'a' stands twice",
    ),
    "NaN": (lambda b: _framed(b'{"a": NaN}'), REFUSED),
    "a pickle": (lambda b: b"\x80\x02}q\x00." + b"\0" * 20, REFUSED),
    "zip": (lambda b: b"PK\x03\x04" + b"\0" * 4 + b[8:], REFUSED),
}  # fmt: skip


def _framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _rewrite(change: Callable[[dict], object], path: Path) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    tree = json.loads(content[8:end])
    change(tree)
    path.write_bytes(_framed(json.dumps(tree).encode()) + content[end:])


def _header_bomb(path: Path) -> None:
    """A header of 101 MB in a file without blocks on the disk."""
    path.write_bytes((101_000_000).to_bytes(8, "little"))
    os.truncate(path, 102_000_000)


def damages() -> Iterator[tuple[str, Change, str]]:
    for name, (change, message) in HEADERS.items():
        yield name, partial(_rewrite, change), message
    for name, (replace, message) in BYTES.items():
        yield name, lambda path, r=replace: path.write_bytes(r(path.read_bytes())), message
    yield "a header of 101 MB", _header_bomb, REFUSED
