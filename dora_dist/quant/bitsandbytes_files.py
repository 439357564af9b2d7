"""Checkpoints that bitsandbytes put into 4 bits already, as transformers saves them.

Beside `X.weight`, flat [n, 1] uint8 with two codes a byte, there are
    X.weight.absmax                              a scale a block of the flattened matrix: fp32, or uint8 codes
    X.weight.quant_map                           the 16 values of the codes
    X.weight.nested_absmax, .nested_quant_map    of uint8 absmax: scale = map[code] * nested_absmax[block] + offset
    X.weight.quant_state.bitsandbytes__nf4       the bytes of a JSON object: shape, blocksize, nested_offset ...
Where no block leaves its row, the codes and the fp32 scales of any rows are what nf4.py stores for them, to the
bit. Nested scales are read as the fp32 values that they stand for: ours are coded in another way.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dora_dist.config import QuantConfig
from dora_dist.errors import UserError
from dora_dist.quant.nf4 import CODES

CODES_WITH_SCALES = ("fp8", "fbgemm_fp8", "mxfp4")  # which are widened while they are read
_STATE = ".quant_state.bitsandbytes__"


class Files(Protocol):
    """Named tensors: their shapes, and rows of them on demand."""

    shapes: dict[str, tuple[int, ...]]

    def rows(self, name: str, rows: slice) -> Tensor: ...


@dataclass(frozen=True)
class FourBit:
    """One matrix [rows, columns] in such files."""

    name: str
    rows: int
    columns: int
    block_size: int
    nested_block_size: int = 0  # 0: the scales are fp32
    nested_offset: float = 0.0

    def read(self, files: Files, rows: slice) -> list[Tensor]:
        """Packed codes and fp32 scales of some rows, as nf4.py stores them; nothing else is read."""
        count, blocks = rows.stop - rows.start, self.columns // self.block_size
        half = self.columns // 2
        packed = files.rows(self.name, slice(rows.start * half, rows.stop * half))
        scales = self._scales(files, slice(rows.start * blocks, rows.stop * blocks))
        return [packed.reshape(count, half), scales.reshape(count, blocks)]

    def _scales(self, files: Files, own: slice) -> Tensor:
        absmax = files.rows(f"{self.name}.absmax", own)
        size = self.nested_block_size
        if not size:
            return absmax
        first = own.start // size
        nested = files.rows(f"{self.name}.nested_absmax", slice(first, -(-own.stop // size)))
        values = files.rows(f"{self.name}.nested_quant_map", slice(None))
        block = torch.arange(own.start, own.stop) // size - first
        return values[absmax.int()] * nested[block] + self.nested_offset


def check_quantization(directory: Path, config: QuantConfig) -> Mapping[str, Any]:
    """What config.json says of quantized weights: bitsandbytes' nf4, or codes with scales; nothing where there are
    none. Reads nothing else.

    Raises:
        UserError: they are quantized in another way, or `quant.scheme` does not ask for 4 bits.
    """
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # transformers says what is wrong with it
    if not found:
        return {}
    key = f"model.path: {str(directory)!r}: quantization_config"
    if not isinstance(found, Mapping):
        raise UserError(f"{key} in config.json is not a section of keys")
    method = found.get("quant_method", "bitsandbytes")  # old files of bitsandbytes do not say
    if method in CODES_WITH_SCALES:
        return found
    if method != "bitsandbytes":
        raise UserError(
            f"{key}.quant_method is {method!r}; only bitsandbytes' nf4, {', '.join(CODES_WITH_SCALES)} and 16-bit "
            "weights can be read"
        )
    if found.get("load_in_8bit") or not found.get("load_in_4bit"):
        raise UserError(f"{key}: load_in_4bit is not set; of bitsandbytes' weights only nf4 can be read")
    kind = found.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if kind != "nf4":
        raise UserError(f"{key}.bnb_4bit_quant_type is {kind!r}; only 'nf4' can be read")
    storage = found.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise UserError(f"{key}.bnb_4bit_quant_storage is {storage!r}; only 'uint8' can be read")
    if config.scheme == "none":
        raise UserError(f"model.path: {str(directory)!r} holds weights in 4 bits; set quant.scheme=nf4")
    return found


def find_four_bit(files: Files) -> dict[str, FourBit]:
    """The 4-bit matrices of such files, by name. Reads what describes them, no weight.

    Raises:
        UserError: one of them is not nf4, its rows are no whole blocks, or the files contradict themselves.
    """
    found = {}
    for key in files.shapes:
        name, is_state, kind = key.partition(_STATE)
        if is_state:
            if kind != "nf4":
                raise UserError(f"model.path: {name!r} is stored as {kind!r}; only 'nf4' can be read")
            found[name] = _described(files, name, key)
    return found


def _described(files: Files, name: str, key: str) -> FourBit:
    try:
        state: dict[str, Any] = json.loads(bytes(files.rows(key, slice(None)).tolist()))
        rows, columns = state["shape"]
        nested = f"{name}.nested_absmax" in files.shapes
        made = FourBit(
            name, int(rows), int(columns), int(state["blocksize"]),
            int(state["nested_blocksize"]) if nested else 0, float(state["nested_offset"]) if nested else 0.0,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        raise UserError(f"model.path: {key!r} does not describe a matrix of bitsandbytes") from None
    if not 64 <= made.block_size <= 4096 or made.block_size & (made.block_size - 1):
        raise UserError(f"model.path: {name!r} has blocks of {made.block_size} weights; 64 to 4096 can be read")
    if made.columns % made.block_size:
        raise UserError(
            f"model.path: {name!r} has rows of {made.columns} weights, which are no whole blocks of "
            f"{made.block_size}, so they cannot be split; use a 16-bit checkpoint"
        )
    _check_tensors(files, made)
    return made


def _check_tensors(files: Files, made: FourBit) -> None:
    """That all parts are there, of the right sizes and dtypes, with the codes that nf4.py knows."""
    weights = made.rows * made.columns
    blocks = weights // made.block_size
    want = {"": (weights // 2, torch.uint8), ".quant_map": (16, torch.float32)}
    want[".absmax"] = (blocks, torch.uint8 if made.nested_block_size else torch.float32)
    if made.nested_block_size:
        want[".nested_absmax"] = (-(-blocks // made.nested_block_size), torch.float32)
        want[".nested_quant_map"] = (256, torch.float32)
    for suffix, (elements, dtype) in want.items():
        shape = files.shapes.get(made.name + suffix, ())
        stored = files.rows(made.name + suffix, slice(0, 1)).dtype if shape else None
        if shape[:1] != (elements,) or torch.Size(shape).numel() != elements or stored != dtype:
            raise UserError(
                f"model.path: {made.name + suffix!r} is {list(shape)} of {stored}, not {elements} elements of "
                f"{dtype} as its quant_state implies"
            )
    if not torch.allclose(files.rows(f"{made.name}.quant_map", slice(None)), torch.tensor(CODES), atol=1e-6):
        raise UserError(f"model.path: '{made.name}.quant_map' is not that of nf4")
