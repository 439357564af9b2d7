"""4-bit NormalFloat weights (QLoRA, arXiv 2305.14314, section 3) in a layout that splits by rows.

A matrix of N rows by K columns is stored as
    packed [N, P] uint8        two 4-bit codes a byte, the first in the high half; P = ceil(K / block) * block / 2
    scales [N, ceil(K / block)] the largest magnitude of each block: fp32, or uint8 codes with `double_quant`
    ranges [N, 2] fp32         only with `double_quant`: scale = low + code * step, one (low, step) a row
Blocks run along a row and never leave it, so any rows of the three are a 4-bit matrix by themselves. The last
block of a row is filled up with zeros.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.device import constant_when_compiled, is_gpu

# The quantiles of a normal distribution, scaled to [-1, 1], as QLoRA publishes them.
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # which bitsandbytes' kernels and ours compute
_CELLS = 128
TILE_ELEMENTS = 1 << 20  # quantized at a time
_TABLE_ELEMENTS = 1 << 22  # looked up at a time


@dataclass(frozen=True)
class Nf4:
    """The layout of one matrix [rows, columns] and the dtype that it stands for."""

    rows: int
    columns: int
    dtype: torch.dtype
    block_size: int = 64
    double_quant: bool = True
    stored_rows: int = 0  # at least `rows`: filled up so that ranks that split flat memory split rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block_size)

    def empty(self, device: torch.device) -> list[Tensor]:
        """Uninitialised parts of the stored rows."""
        rows = max(self.rows, self.stored_rows)
        packed = torch.empty(rows, self.blocks * self.block_size // 2, dtype=torch.uint8, device=device)
        if not self.double_quant:
            return [packed, torch.empty(rows, self.blocks, device=device)]
        codes = torch.empty(rows, self.blocks, dtype=torch.uint8, device=device)
        return [packed, codes, torch.empty(rows, 2, device=device)]


@torch.no_grad()
def quantize(W_NK: Tensor, layout: Nf4) -> list[Tensor]:
    """The parts of a matrix's rows (any number of them), on its device."""
    filled = F.pad(W_NK.float(), (0, layout.blocks * layout.block_size - layout.columns))
    blocks = filled.view(W_NK.shape[0], layout.blocks, layout.block_size)
    scales, stored = blocks.abs().amax(dim=2), []
    if layout.double_quant:
        low, high = scales.aminmax(dim=1, keepdim=True)
        step = (high - low) / torch.full_like(low, 255)  # by a number GPUs multiply by its rounded inverse
        codes = ((scales - low) / step.masked_fill(step == 0, 1.0)).round().to(torch.uint8)
        stored = [codes, torch.cat([low, step], dim=1)]
        scales = _scales(stored)
    normalized = blocks / scales.masked_fill(scales == 0, 1.0)[:, :, None]
    high, low = _nearest_codes(normalized.flatten()).view(W_NK.shape[0], filled.shape[1] // 2, 2).unbind(2)
    return [high * 16 + low, *(stored or [scales])]


@torch.no_grad()
def dequantize(parts: Sequence[Tensor], layout: Nf4, row_factors: Tensor | None = None) -> Tensor:
    """The matrix of the parts' rows [n, columns], in the layout's dtype: code times scale in fp32, rounded once.
    Row i comes multiplied by `row_factors[i]`, at no cost: its scales are.

    bitsandbytes' kernels do it where they are installed: the same to the bit, and four times as fast on a CPU.
    """
    packed, scales = codes_and_scales(parts, layout, row_factors)
    if has_kernels(layout, packed.device):
        filled = (packed.shape[0], layout.blocks * layout.block_size)
        flat = packed.reshape(-1, 1).contiguous(), scales.reshape(-1).contiguous()  # it ignores strides
        dense = torch.ops.bitsandbytes.dequantize_4bit(*flat, layout.block_size, "nf4", filled, layout.dtype)
        return dense[:, : layout.columns]
    dense = torch.empty(packed.shape[0], layout.columns, dtype=layout.dtype, device=packed.device)
    step = max(1, _TABLE_ELEMENTS // (layout.blocks * layout.block_size))  # its copies are five times the result
    for rows in pieces(slice(0, packed.shape[0]), step):
        values = F.embedding(packed[rows].int(), _pairs(packed.device)).view(-1, layout.blocks, layout.block_size)
        dense[rows] = (values * scales[rows, :, None]).flatten(1)[:, : layout.columns]
    return dense


def pieces(rows: slice, step: int) -> list[slice]:
    """At most `step` rows each."""
    return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def codes_and_scales(
    parts: Sequence[Tensor], layout: Nf4, row_factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a matrix is made from: packed codes, and each block's scale in fp32."""
    packed, *stored = (part[: layout.rows] for part in parts)  # without the rows that fill up
    scales = _scales(stored)
    return packed, scales if row_factors is None else scales * row_factors[:, None]


def has_kernels(layout: Nf4, device: torch.device) -> bool:
    """Whether bitsandbytes' kernels dequantize there."""
    return layout.dtype in KERNEL_DTYPES and _has_kernels(layout.block_size, is_gpu(device))


class PackedMatrix:
    """A 4-bit matrix that is read by rows: `matrix[rows]` is dense."""

    def __init__(self, parts: Sequence[Tensor], layout: Nf4):
        self.parts, self.layout = parts, layout
        self.dtype, self.device = layout.dtype, parts[0].device
        self.shape = torch.Size((min(layout.rows, parts[0].shape[0]), layout.columns))

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(rows, self.device)

    def part(self, rows: slice) -> "PackedMatrix":
        """Some of the rows, in 4 bits."""
        return PackedMatrix([part[: self.shape[0]][rows] for part in self.parts], self.layout)

    def read(self, rows: slice, device: torch.device) -> Tensor:
        """Dense rows on a device; what goes there is packed."""
        return dequantize([part[: self.shape[0]][rows].to(device) for part in self.parts], self.layout)


def rows_of(matrix: Tensor | PackedMatrix, rows: slice) -> Tensor | PackedMatrix:
    """Some rows of a matrix, held as it is."""
    return matrix[rows] if isinstance(matrix, Tensor) else matrix.part(rows)


def _scales(stored: Sequence[Tensor]) -> Tensor:
    if len(stored) == 1:
        return stored[0]
    codes, ranges = stored
    return (codes.float() * ranges[:, 1:]).add_(ranges[:, :1])  # not addcmul: some processors round that once


@constant_when_compiled
def _has_kernels(block_size: int, on_gpu: bool) -> bool:
    return _load_kernels() and (block_size >= 64 or not on_gpu)


@lru_cache
def _load_kernels() -> bool:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that are not used here
    try:
        import bitsandbytes  # noqa: F401 - registers them
    except (ImportError, OSError, RuntimeError):  # absent, or built for another machine
        return False
    return hasattr(torch.ops.bitsandbytes, "dequantize_4bit")  # old ones have none


def _nearest_codes(values: Tensor) -> Tensor:
    """Which of CODES is nearest to each of [n] values in [-1, 1] or a little outside, as uint8.

    The same as `torch.bucketize` at the midpoints, which takes seven times as long: the number of midpoints below
    the cell that a value lies in, and one more if the cell's own midpoint lies below the value.
    """
    below, midpoints = _cells(values.device)
    cell = torch.add(values, 1.0).mul_(_CELLS / 2).to(torch.int32).clamp_(0, _CELLS - 1)
    found = below.index_select(0, cell)
    return found.to(torch.uint8).add_(values > midpoints.index_select(0, found))


@lru_cache
def codes(device: torch.device) -> Tensor:
    return torch.tensor(CODES, device=device)


@lru_cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Cells of equal width over [-1, 1] with one midpoint at most: how many lie below each, and all of these."""
    values = codes(torch.device("cpu"))
    midpoints = (values[1:] + values[:-1]) / 2
    edges = torch.arange(_CELLS) * (2 / _CELLS) - 1
    below = torch.bucketize(edges, midpoints, out_int32=True)
    return below.to(device), torch.cat([midpoints, torch.tensor([torch.inf])]).to(device)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two values [256, 2]."""
    byte = torch.arange(256, device=device)
    return torch.stack([codes(device)[byte >> 4], codes(device)[byte & 15]], dim=1)
