# mypy: ignore-errors
"""The programs that kernels.py launches. Importing this file needs Triton.

In capitals: constants of the compilation. What is absent is None, a rank of 0, a block size of 0.
"""

import triton
import triton.language as tl

from dora_dist.quant.triton_kernels import INTERPRETED, dequantized, narrow, tile, within


@triton.jit
def _load(start, i, rows, j, columns, stride_i, stride_j, P: tl.constexpr, Q: tl.constexpr):
    """The tile at (i, j), zero outside the matrix."""
    inside = within(i, rows, j, columns, P, Q)
    return tl.load(tile(start, i, j, stride_i, stride_j, P, Q), mask=inside, other=0)


@triton.jit
def _add_dot(total, a, b):
    """total + a @ b for an fp32 b: with a bf16 `a` by two products, b's rounding and the rest; else by three of
    tf32, added up outside the tensor cores, which cut off rather than round."""
    if a.dtype == tl.bfloat16:
        high = narrow(b, tl.bfloat16)
        low = narrow(b - high.to(tl.float32), tl.bfloat16)
        if INTERPRETED:  # it has no products of bf16
            return total + tl.dot(a.to(tl.float32), high.to(tl.float32) + low.to(tl.float32))
        return tl.dot(a, high, tl.dot(a, low, total))
    return total + tl.dot(a.to(tl.float32), b, input_precision="tf32x3")


@triton.jit
def norms_kernel(
    m, scales, ranges, codes, left, right, out, rows, columns, scaling, stride_mn, stride_mk, stride_sn, stride_sb,
    stride_gn, stride_gc, stride_ln, stride_lr, stride_rr, stride_rk,
    DIM: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[p1, :] = sums over chunk p1 of V's squares, for tile row (DIM 0) or tile column (DIM 1) p0."""
    kept = tl.program_id(0)
    chunk = tl.program_id(1)
    total = tl.zeros([BN, BK], tl.float32)
    if R and R <= BR and DIM == 0:  # what stays the same over the loop
        l_tile = _load(left, kept * BN, rows, 0, R, stride_ln, stride_lr, BN, BR).to(tl.float32) * scaling
    if R and R <= BR and DIM == 1:
        r_tile = _load(right, 0, R, kept * BK, columns, stride_rr, stride_rk, BR, BK).to(tl.float32)
    for start in tl.range(0, CHUNK, BK if DIM == 0 else BN, num_stages=STAGES):
        n = kept * BN if DIM == 0 else chunk * CHUNK + start
        k = chunk * CHUNK + start if DIM == 0 else kept * BK
        if BLOCK:
            v = dequantized(
                m, scales, ranges, codes, n, k, rows, columns, stride_mn, stride_mk, stride_sn, stride_sb,
                stride_gn, stride_gc, BLOCK, DTYPE, BN, BK,
            )  # fmt: skip
        else:
            v = _load(m, n, rows, k, columns, stride_mn, stride_mk, BN, BK).to(tl.float32)
        if R:
            for r in range(0, R, BR):
                if R > BR or DIM == 1:
                    l_tile = _load(left, n, rows, r, R, stride_ln, stride_lr, BN, BR).to(tl.float32) * scaling
                if R > BR or DIM == 0:
                    r_tile = _load(right, r, R, k, columns, stride_rr, stride_rk, BR, BK).to(tl.float32)
                v = _add_dot(v, l_tile, r_tile)
        total += v * v
    if DIM == 0:
        at = kept * BN + tl.arange(0, BN)
        tl.store(out + chunk * rows + at, tl.sum(total, 1), mask=at < rows)
    else:
        at = kept * BK + tl.arange(0, BK)
        tl.store(out + chunk * columns + at, tl.sum(total, 0), mask=at < columns)


@triton.jit(do_not_specialize=["tokens"])  # they vary from batch to batch
def compose_kernel(
    base, z, b, g, bias, y, gh, tokens, features, scaling, stride_bt, stride_bo, stride_zt, stride_zr, stride_o,
    stride_r, stride_g, stride_bias,
    DTYPE: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT
    o = tl.program_id(1) * BO
    low_rank = tl.zeros([BT, BO], tl.float32)
    if R:
        for r in range(0, R, BR):
            z_tile = _load(z, t, tokens, r, R, stride_zt, stride_zr, BT, BR)
            b_tile = _load(b, r, R, o, features, stride_r, stride_o, BR, BO).to(tl.float32)
            low_rank = _add_dot(low_rank, z_tile, b_tile)
    inside = within(t, tokens, o, features, BT, BO)
    base_tile = _load(base, t, tokens, o, features, stride_bt, stride_bo, BT, BO)
    product = base_tile.to(tl.float32) + scaling * low_rank
    at_o = o + tl.arange(0, BO)
    ratio = tl.load(g + at_o * stride_g, mask=at_o < features, other=0)
    result = product * ratio[None, :]
    if gh is not None:
        tl.store(tile(gh, t, o, features, 1, BT, BO), narrow(result, DTYPE), mask=inside)
    if bias is not None:
        added = tl.load(bias + at_o * stride_bias, mask=at_o < features, other=0)
        result += added.to(tl.float32)[None, :]
    tl.store(tile(y, t, o, features, 1, BT, BO), narrow(result, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["tokens"])  # they vary from batch to batch
def backward_kernel(
    dy, h, b, g, dh, dz, total, tokens, features, scaling, stride_yt, stride_yo, stride_ht, stride_ho, stride_o,
    stride_r, stride_g, DTYPE: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens of block p0, features of chunk p1."""
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    t = block * BT
    dz_tile = tl.zeros([BT, BR], tl.float32)
    for start in tl.range(0, CHUNK, BO, num_stages=STAGES):
        o = chunk * CHUNK + start
        at_o = o + tl.arange(0, BO)
        dy_tile = _load(dy, t, tokens, o, features, stride_yt, stride_yo, BT, BO)
        ratio = tl.load(g + at_o * stride_g, mask=at_o < features, other=0)
        dh_tile = narrow(dy_tile.to(tl.float32) * ratio[None, :], DTYPE)
        if dh is not None:
            tl.store(tile(dh, t, o, features, 1, BT, BO), dh_tile, mask=within(t, tokens, o, features, BT, BO))
        h_tile = _load(h, t, tokens, o, features, stride_ht, stride_ho, BT, BO)
        sums = tl.sum(dy_tile.to(tl.float32) * h_tile.to(tl.float32), 0)
        tl.store(total + tl.cast(block, tl.int64) * features + at_o, sums, mask=at_o < features)
        if R:
            b_tile = _load(b, o, features, 0, R, stride_o, stride_r, BO, BR).to(tl.float32)
            dz_tile = _add_dot(dz_tile, dh_tile, b_tile)
    if R:
        start_dz = dz + tl.cast(chunk, tl.int64) * tokens * R
        tl.store(tile(start_dz, t, 0, R, 1, BT, BR), scaling * dz_tile, mask=within(t, tokens, 0, R, BT, BR))


@triton.jit(do_not_specialize=["parts"])
def sum_kernel(parts_of, g, n, out, parts, length, stride_g, stride_n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_of + tl.cast(part, tl.int64) * length + at, mask=at < length, other=0)
    if g is not None:
        norm = tl.load(n + at * stride_n, mask=at < length, other=0)
        ratio = tl.load(g + at * stride_g, mask=at < length, other=1)
        total = tl.where(norm == 0, 0.0, total / ratio / tl.where(norm == 0, 1.0, norm))
    tl.store(out + at, narrow(total, DTYPE), mask=at < length)


@triton.jit
def ratio_kernel(m, n, out, length, least, stride_m, stride_n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(n + at * stride_n, mask=at < length, other=0)
    ratio = tl.load(m + at * stride_m, mask=at < length, other=0) / tl.where(norm == 0, 1.0, norm)
    ratio = tl.where(norm == 0, 1.0, ratio)
    tl.store(out + at, tl.where(tl.abs(ratio) < least, least, ratio), mask=at < length)
