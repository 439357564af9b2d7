# mypy: ignore-errors
"""The programs that kernels.py launches. Importing this file needs Triton.

In capitals: constants of the compilation. What is absent is None, a rank of 0, a block size of 0.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _tile(start, i, j, stride_i, stride_j, P: tl.constexpr, Q: tl.constexpr):
    """Addresses of the P x Q elements from (i, j) on: 64 bits across a matrix, 32 within the tile."""
    start += tl.cast(i, tl.int64) * stride_i + tl.cast(j, tl.int64) * stride_j
    return start + (tl.arange(0, P)[:, None] * stride_i + tl.arange(0, Q)[None, :] * stride_j)


@triton.jit
def _within(i, rows, j, columns, P: tl.constexpr, Q: tl.constexpr):
    """Which of these elements lie in the matrix."""
    return (i + tl.arange(0, P) < rows)[:, None] & (j + tl.arange(0, Q) < columns)[None, :]


@triton.jit
def _load(start, i, rows, j, columns, stride_i, stride_j, P: tl.constexpr, Q: tl.constexpr):
    """The tile at (i, j), zero outside the matrix."""
    inside = _within(i, rows, j, columns, P, Q)
    return tl.load(_tile(start, i, j, stride_i, stride_j, P, Q), mask=inside, other=0)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest; where Triton's interpreter would cut bf16 off, by hand."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _add_dot(total, a, b):
    """total + a @ b for an fp32 b: with a bf16 `a` by two products, b's rounding and the rest; else by three of
    tf32, added up outside the tensor cores, which cut off rather than round."""
    if a.dtype == tl.bfloat16:
        high = _narrow(b, tl.bfloat16)
        low = _narrow(b - high.to(tl.float32), tl.bfloat16)
        if INTERPRETED:  # it has no products of bf16
            return total + tl.dot(a.to(tl.float32), high.to(tl.float32) + low.to(tl.float32))
        return tl.dot(a, high, tl.dot(a, low, total))
    return total + tl.dot(a.to(tl.float32), b, input_precision="tf32x3")


@triton.jit
def _dequantized(
    packed, scales, ranges, codes, i, j, rows, columns, stride_pi, stride_pj, stride_si, stride_sj, stride_ri,
    stride_rj, BLOCK: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """A tile of a 4-bit matrix (quant.py): code times scale in fp32, rounded to DTYPE."""
    inside = _within(i, rows, j, columns, P, Q)
    at_i = tl.cast(i, tl.int64) + tl.arange(0, P)[:, None]
    at_j = j + tl.arange(0, Q)[None, :]
    pair = tl.load(packed + at_i * stride_pi + (at_j // 2) * stride_pj, mask=inside, other=0).to(tl.int32)
    value = tl.load(codes + ((pair >> (4 - at_j % 2 * 4)) & 15))
    scale = tl.load(scales + at_i * stride_si + (at_j // BLOCK) * stride_sj, mask=inside, other=0).to(tl.float32)
    if ranges is not None:
        low = tl.load(ranges + at_i * stride_ri, mask=at_i < rows, other=0)
        step = tl.load(ranges + at_i * stride_ri + stride_rj, mask=at_i < rows, other=0)
        scale = tl.where(inside, low + scale * step, 0.0)
    return _narrow(value * scale, DTYPE).to(tl.float32)


@triton.jit
def dequantize_kernel(
    packed, scales, codes, out, rows, columns, stride_pi, stride_pj, stride_si, stride_sj,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BN
    j = tl.program_id(1) * BK
    value = _dequantized(
        packed, scales, None, codes, i, j, rows, columns, stride_pi, stride_pj, stride_si, stride_sj, 0, 0, BLOCK,
        DTYPE, BN, BK,
    )  # fmt: skip
    inside = _within(i, rows, j, columns, BN, BK)
    tl.store(_tile(out, i, j, columns, 1, BN, BK), value.to(DTYPE), mask=inside)


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
            v = _dequantized(
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
    inside = _within(t, tokens, o, features, BT, BO)
    base_tile = _load(base, t, tokens, o, features, stride_bt, stride_bo, BT, BO)
    product = base_tile.to(tl.float32) + scaling * low_rank
    at_o = o + tl.arange(0, BO)
    ratio = tl.load(g + at_o * stride_g, mask=at_o < features, other=0)
    result = product * ratio[None, :]
    if gh is not None:
        tl.store(_tile(gh, t, o, features, 1, BT, BO), _narrow(result, DTYPE), mask=inside)
    if bias is not None:
        added = tl.load(bias + at_o * stride_bias, mask=at_o < features, other=0)
        result += added.to(tl.float32)[None, :]
    tl.store(_tile(y, t, o, features, 1, BT, BO), _narrow(result, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["tokens"])  # they vary from batch to batch
def backward_kernel(
    dy, h, b, g, dh, dz, total, tokens, features, scaling, stride_yt, stride_yo, stride_ht, stride_ho, stride_o,
    stride_r, stride_g, DTYPE: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens of block p0 // parts, features of chunk p1, part p0 % parts of B; part 0 makes dh and the totals."""
    parts: tl.constexpr = (R + BR - 1) // BR if R else 1
    block = tl.program_id(0) // parts
    chunk = tl.program_id(1)
    t = block * BT
    r = tl.program_id(0) % parts * BR
    own_tokens = tl.where(r == 0, tokens, 0)
    own_features = tl.where(r == 0, features, 0)
    dz_tile = tl.zeros([BT, BR], tl.float32)
    for start in tl.range(0, CHUNK, BO, num_stages=STAGES):
        o = chunk * CHUNK + start
        at_o = o + tl.arange(0, BO)
        dy_tile = _load(dy, t, tokens, o, features, stride_yt, stride_yo, BT, BO)
        ratio = tl.load(g + at_o * stride_g, mask=at_o < features, other=0)
        dh_tile = _narrow(dy_tile.to(tl.float32) * ratio[None, :], DTYPE)
        if dh is not None:
            own = _within(t, own_tokens, o, features, BT, BO)
            tl.store(_tile(dh, t, o, features, 1, BT, BO), dh_tile, mask=own)
        if h is not None:
            h_tile = _load(h, t, own_tokens, o, features, stride_ht, stride_ho, BT, BO)
            sums = tl.sum(dy_tile.to(tl.float32) * h_tile.to(tl.float32), 0)
            at = tl.cast(block, tl.int64) * features + at_o
            tl.store(total + at, sums, mask=at_o < own_features)
        if R:
            b_tile = _load(b, o, features, r, R, stride_o, stride_r, BO, BR).to(tl.float32)
            dz_tile = _add_dot(dz_tile, dh_tile, b_tile)
    if R:
        start_dz = dz + tl.cast(chunk, tl.int64) * tokens * R
        tl.store(_tile(start_dz, t, r, R, 1, BT, BR), scaling * dz_tile, mask=_within(t, tokens, r, R, BT, BR))
