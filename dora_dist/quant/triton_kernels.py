# mypy: ignore-errors
"""The program that kernels.py launches, and tiles of matrices for other programs. Importing this file needs
Triton.

In capitals: constants of the compilation. What is absent is None, a rank of 0, a block size of 0.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def tile(start, i, j, stride_i, stride_j, P: tl.constexpr, Q: tl.constexpr):
    """Addresses of the P x Q elements from (i, j) on: 64 bits across a matrix, 32 within the tile."""
    start += tl.cast(i, tl.int64) * stride_i + tl.cast(j, tl.int64) * stride_j
    return start + (tl.arange(0, P)[:, None] * stride_i + tl.arange(0, Q)[None, :] * stride_j)


@triton.jit
def within(i, rows, j, columns, P: tl.constexpr, Q: tl.constexpr):
    """Which of these elements lie in the matrix."""
    return (i + tl.arange(0, P) < rows)[:, None] & (j + tl.arange(0, Q) < columns)[None, :]


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest; where Triton's interpreter would cut bf16 off, by hand."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dequantized(
    packed, scales, ranges, codes, i, j, rows, columns, stride_pi, stride_pj, stride_si, stride_sj, stride_ri,
    stride_rj, BLOCK: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """A tile of a 4-bit matrix (nf4.py): code times scale in fp32, rounded to DTYPE."""
    inside = within(i, rows, j, columns, P, Q)
    at_i = tl.cast(i, tl.int64) + tl.arange(0, P)[:, None]
    at_j = j + tl.arange(0, Q)[None, :]
    pair = tl.load(packed + at_i * stride_pi + (at_j // 2) * stride_pj, mask=inside, other=0).to(tl.int32)
    value = tl.load(codes + ((pair >> (4 - at_j % 2 * 4)) & 15))
    scale = tl.load(scales + at_i * stride_si + (at_j // BLOCK) * stride_sj, mask=inside, other=0).to(tl.float32)
    if ranges is not None:
        low = tl.load(ranges + at_i * stride_ri, mask=at_i < rows, other=0)
        step = tl.load(ranges + at_i * stride_ri + stride_rj, mask=at_i < rows, other=0)
        scale = tl.where(inside, low + scale * step, 0.0)
    return narrow(value * scale, DTYPE).to(tl.float32)


@triton.jit
def dequantize_kernel(
    packed, scales, codes, out, rows, columns, stride_pi, stride_pj, stride_si, stride_sj,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BN
    j = tl.program_id(1) * BK
    value = dequantized(
        packed, scales, None, codes, i, j, rows, columns, stride_pi, stride_pj, stride_si, stride_sj, 0, 0, BLOCK,
        DTYPE, BN, BK,
    )  # fmt: skip
    inside = within(i, rows, j, columns, BN, BK)
    tl.store(tile(out, i, j, columns, 1, BN, BK), value.to(DTYPE), mask=inside)
