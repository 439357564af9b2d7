"""Published weights that are codes and scales, widened a few rows at a time while they are read.

FP8 (DeepSeek-V3, Qwen3 ...): beside `X`, codes [..., N, K], lies `X_scale_inv` or `X_scale`: one fp32, bf16 or
power-of-two scale for the tensor, for each row, or for each block of `weight_block_size` (128 x 128, say).
MXFP4 (gpt-oss): `X_blocks` [E, N, K/32, 16] holds two FP4 codes a byte, the low half first, and `X_scales`
[E, N, K/32] the exponents of 2 plus 127. `X` itself is [E, K, N] in the model.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.errors import UserError
from dora_dist.io.headers import Stored
from dora_dist.models.origins import Traced

_FP8 = ("F8_E4M3", "F8_E5M2")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP = 32  # of FP4 codes that share a scale


class Files(Protocol):
    def mapped(self, name: str) -> Tensor:
        """A tensor as the file has it, mapped and not read."""


@dataclass(frozen=True)
class Fp8:
    codes: str
    scales: str
    shape: tuple[int, ...]  # [..., N, K]
    block: tuple[int, int]  # rows and columns that share a scale

    def rows(self, files: Files, start: int, stop: int) -> Tensor:
        """Rows of the tensor, seen as a matrix [n, K], in fp32."""
        codes, scales, (high, wide) = files.mapped(self.codes), _wide(files.mapped(self.scales)), self.block
        row, (count, columns) = torch.arange(start, stop), self.shape[-2:]
        band = row // count * -(-count // high) + row % count // high
        own, whole = scales.reshape(-1, -(-columns // wide))[band], columns // wide
        rows = codes.view(-1, columns)[start:stop].float()
        rows[:, : whole * wide].unflatten(1, (whole, wide)).mul_(own[:, :whole, None])
        rows[:, whole * wide :].mul_(own[:, whole:])
        return rows


@dataclass(frozen=True)
class Mxfp4:
    codes: str
    scales: str
    shape: tuple[int, ...]  # [E, N, K]

    def rows(self, files: Files, start: int, stop: int) -> Tensor:
        """Rows of the tensor [E, N, K], seen as a matrix [n, K], in bf16, which holds all values exactly."""
        groups = self.shape[-1] // _GROUP
        codes = files.mapped(self.codes).view(-1, groups, _GROUP // 2)[start:stop]
        factors = _wide(files.mapped(self.scales).view(-1, groups)[start:stop]).bfloat16()
        return F.embedding(codes.int(), _pairs()).flatten(2).mul_(factors[:, :, None]).flatten(1)


def _wide(scales: Tensor) -> Tensor:
    """Scales in fp32. Bytes are exponents of 2 plus 127."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


@functools.cache
def _pairs() -> Tensor:
    """Byte -> its two values [256, 2]."""
    values, byte = torch.tensor(_FP4, dtype=torch.bfloat16), torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)


def find_scaled(
    stored: Mapping[str, Stored], about: Mapping[str, Any]
) -> tuple[dict[str, Fp8 | Mxfp4], dict[str, Traced]]:
    """The tensors of codes in such files, and all tensors that a model may ask for. `about`: quantization_config.

    Raises:
        UserError: codes without scales, or scales that do not fit them.
    """
    scaled: dict[str, Fp8 | Mxfp4] = {}
    origins = {name: Traced.of_file(name, tensor.shape) for name, tensor in stored.items()}
    for name, tensor in stored.items():
        made: Fp8 | Mxfp4 | None = None
        if tensor.dtype in _FP8:
            made = _fp8(name, stored, about.get("weight_block_size"))
        elif name.endswith("_blocks") and about["quant_method"] == "mxfp4":
            made = _mxfp4(name, stored)
            origins[name.removesuffix("_blocks")] = Traced.of_file(name, made.shape).transpose(1, 2)  # type: ignore[assignment]
            del origins[name]
        if made is not None:
            scaled[name] = made
            del origins[made.scales]
    return scaled, origins


def _fp8(name: str, stored: Mapping[str, Stored], declared: Any) -> Fp8:
    scales = next((key for key in (f"{name}_scale_inv", f"{name}_scale") if key in stored), None)
    if scales is None:
        raise UserError(f"model.path: {name!r} is in FP8, but the files hold no '{name}_scale_inv' for it")
    shape, found = stored[name].shape, stored[scales].shape
    *outer, rows, columns = (1, 1, *shape)[-max(2, len(shape)) :]
    grids = [(1, columns), (rows, columns)]
    if (
        isinstance(declared, list | tuple)
        and len(declared) == 2
        and all(isinstance(n, int) and n > 0 for n in declared)
    ):
        grids.insert(0, (declared[0], declared[1]))
    for high, wide in grids:
        if _lie_in(found, (*outer, -(-rows // high), -(-columns // wide))):
            return Fp8(name, scales, (*outer, rows, columns), (high, wide))
    if math.prod(found) == 1:
        whole = math.prod(outer) * rows, columns
        return Fp8(name, scales, whole, whole)
    raise UserError(
        f"model.path: {scales!r} is {list(found)}, which are no scales of {name!r}, {list(shape)}; valid would be "
        f"one for all, for each row, or for each block of weight_block_size ({declared} in config.json)"
    )


def _lie_in(found: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether scales of the shape `found` lie in this grid. They may have fewer dimensions: then those of size 1
    do not count."""
    if len(found) == len(grid):
        return tuple(found) == tuple(grid)
    return [n for n in found if n > 1] == [n for n in grid if n > 1]


def _mxfp4(name: str, stored: Mapping[str, Stored]) -> Mxfp4:
    scales, blocks = name.removesuffix("_blocks") + "_scales", stored[name]
    found = stored[scales].shape if scales in stored else None
    if (
        len(blocks.shape) != 4
        or blocks.shape[-1] * 2 != _GROUP
        or found != blocks.shape[:-1]
        or blocks.dtype != "U8"
    ):
        raise UserError(
            f"model.path: {name!r}, {blocks.dtype} {list(blocks.shape)}, and {scales!r}, {found and list(found)}, "
            "are not MXFP4: bytes [E, N, K/32, 16] and [E, N, K/32]"
        )
    return Mxfp4(name, scales, (*blocks.shape[:-2], blocks.shape[-2] * _GROUP))
