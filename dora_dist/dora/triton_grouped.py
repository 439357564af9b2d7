# mypy: ignore-errors
"""The programs that grouped_kernels.py launches. Importing this file needs Triton.

In capitals: constants of the compilation. What is absent is None, a rank of 0, a block size of 0. A tile of tokens
belongs to one expert: `tile_expert` and `tile_start` say to which and where it begins, `starts` where an expert's
tokens begin. The group behind the last expert's has the tokens of none; tiles beyond it have no tokens.
"""

import triton
import triton.language as tl

from dora_dist.dora.triton_kernels import _add_dot, _load
from dora_dist.quant.triton_kernels import INTERPRETED, dequantized, narrow, tile, within


@triton.jit
def _dot(total, a, b):
    """total + a @ b of one dtype in fp32."""
    if a.dtype == tl.float32:
        return total + tl.dot(a, b, input_precision="tf32x3")
    if INTERPRETED:  # it has no products of bf16
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, total)


@triton.jit
def _weight(
    w, scales, ranges, codes, i, rows, j, columns, stride_w, stride_s, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """A tile of the stacked weight, dense or made so."""
    if BLOCK:
        made = dequantized(
            w, scales, ranges, codes, i, j, rows, columns, stride_w, 1, stride_s, 1, 2, 1, BLOCK, DTYPE, P, Q
        )
        return made.to(DTYPE)
    else:  # which is not compiled where it is not taken
        return _load(w, i, rows, j, columns, stride_w, 1, P, Q)


@triton.jit(do_not_specialize=["experts"])
def outputs_kernel(
    x, w, scales, ranges, codes, a, b, g, keep, y, z, tile_expert, tile_start, starts, experts, features, inputs,
    scaling, keep_scale, stride_w, stride_s,
    ON_INPUTS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y and z of tile p0, output features of block p1."""
    e = tl.load(tile_expert + tl.program_id(0))
    if e > experts:
        return
    t = tl.load(tile_start + tl.program_id(0))
    end = tl.load(starts + e + 1)
    o = tl.program_id(1) * BO
    product = tl.zeros([BT, BO], tl.float32)
    if e < experts:
        low_rank = tl.zeros([BT, BR], tl.float32)
        for i in range(0, inputs, BI):
            x_tile = _load(x, t, end, i, inputs, inputs, 1, BT, BI)
            row = e * features
            w_tile = _weight(
                w, scales, ranges, codes, row + o, row + features, i, inputs, stride_w, stride_s,
                BLOCK, DTYPE, BO, BI,
            )  # fmt: skip
            if ON_INPUTS:
                at_i = i + tl.arange(0, BI)
                ratio = tl.load(g + e * inputs + at_i, mask=at_i < inputs, other=0)
                wide = x_tile.to(tl.float32) * ratio[None, :]
                x_tile = narrow(wide, DTYPE)
                if tl.float32 != DTYPE:  # what the rounding leaves
                    rest = narrow(wide - x_tile.to(tl.float32), DTYPE)
                    product = _dot(product, rest, tl.trans(w_tile))
            product = _dot(product, x_tile, tl.trans(w_tile))
            if R:
                if keep is not None:
                    kept = _load(keep, t, end, i, inputs, inputs, 1, BT, BI)
                    x_tile = tl.where(kept != 0, x_tile, 0.0).to(DTYPE)
                a_tile = _load(a, e * R, e * R + R, i, inputs, inputs, 1, BR, BI)
                low_rank = _dot(low_rank, x_tile, tl.trans(a_tile))
        if R:
            z_tile = narrow(low_rank * keep_scale, DTYPE)
            if o == 0:
                tl.store(tile(z, t, 0, R, 1, BT, BR), z_tile, mask=within(t, end, 0, R, BT, BR))
            b_tile = _load(b, e * features + o, e * features + features, 0, R, R, 1, BO, BR).to(tl.float32)
            product += scaling * _add_dot(tl.zeros([BT, BO], tl.float32), z_tile, tl.trans(b_tile))
        if g is not None and not ON_INPUTS:
            at_o = o + tl.arange(0, BO)
            product *= tl.load(g + e * features + at_o, mask=at_o < features, other=0)[None, :]
    tl.store(tile(y, t, o, features, 1, BT, BO), narrow(product, DTYPE), mask=within(t, end, o, features, BT, BO))


@triton.jit(do_not_specialize=["experts"])
def inputs_kernel(
    dy, w, scales, ranges, codes, a, b, g, keep, x, dx, dz, total, tile_expert, tile_start, starts, experts,
    features, inputs, scaling, keep_scale, stride_w, stride_s,
    ON_INPUTS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx and dz of tile p0, input features of block p1; ON_INPUTS: also sum_t(x * (dy V)) of the tile."""
    p = tl.program_id(0)
    e = tl.load(tile_expert + p)
    if e > experts:
        return
    t = tl.load(tile_start + p)
    end, i = tl.load(starts + e + 1), tl.program_id(1) * BI
    product, at_i = tl.zeros([BT, BI], tl.float32), i + tl.arange(0, BI)
    if e < experts:
        dz_tile = tl.zeros([BT, BR], tl.float32)
        for o in range(0, features, BO):
            row = e * features
            dh_tile = _load(dy, t, end, o, features, features, 1, BT, BO)
            if g is not None and not ON_INPUTS:
                at_o = o + tl.arange(0, BO)
                ratio = tl.load(g + row + at_o, mask=at_o < features, other=0)
                dh_tile = narrow(dh_tile.to(tl.float32) * ratio[None, :], DTYPE)
            w_tile = _weight(
                w, scales, ranges, codes, row + o, row + features, i, inputs, stride_w, stride_s,
                BLOCK, DTYPE, BO, BI,
            )  # fmt: skip
            product = _dot(product, dh_tile, w_tile)
            if R:
                b_tile = _load(b, row + o, row + features, 0, R, R, 1, BO, BR).to(tl.float32)
                dz_tile = _add_dot(dz_tile, dh_tile, b_tile)
        if R:
            dz_narrow = narrow(scaling * dz_tile, DTYPE)
            if i == 0:
                tl.store(tile(dz, t, 0, R, 1, BT, BR), dz_narrow, mask=within(t, end, 0, R, BT, BR))
            a_tile = _load(a, e * R, e * R + R, i, inputs, inputs, 1, BR, BI)
            low_rank = _dot(tl.zeros([BT, BI], tl.float32), dz_narrow, a_tile)
            if keep is not None:
                kept = _load(keep, t, end, i, inputs, inputs, 1, BT, BI)
                low_rank = tl.where(kept != 0, low_rank * keep_scale, 0.0)
            product += low_rank
        if ON_INPUTS:
            x_tile = _load(x, t, end, i, inputs, inputs, 1, BT, BI).to(tl.float32)
            at = tl.cast(p, tl.int64) * inputs + at_i
            tl.store(total + at, tl.sum(product * x_tile, 0), mask=at_i < inputs)
            product *= tl.load(g + e * inputs + at_i, mask=at_i < inputs, other=0)[None, :]
    tl.store(tile(dx, t, i, inputs, 1, BT, BI), narrow(product, DTYPE), mask=within(t, end, i, inputs, BT, BI))


@triton.jit
def factors_kernel(
    v, u, other, g, n, keep, out, total, starts, columns, factor, stride_e, stride_n, stride_r,
    R: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Of expert p0, columns of block p1: factor (g v)^T u over its tokens, and sum(v * other) / (g n)."""
    e = tl.program_id(0)
    c = tl.program_id(1) * BN
    at_c = c + tl.arange(0, BN)
    end = tl.load(starts + e + 1)
    product = tl.zeros([BN, BR], tl.float32)
    sums = tl.zeros([BN], tl.float32)
    if g is not None:
        ratio = tl.load(g + e * columns + at_c, mask=at_c < columns, other=1)
    for t in range(tl.load(starts + e), end, BT):
        v_tile = _load(v, t, end, c, columns, columns, 1, BT, BN)
        if other is not None:
            other_tile = _load(other, t, end, c, columns, columns, 1, BT, BN)
            sums += tl.sum(v_tile.to(tl.float32) * other_tile.to(tl.float32), 0)
        if R:
            if g is not None:
                v_tile = narrow(v_tile.to(tl.float32) * ratio[None, :], DTYPE)
            if keep is not None:
                kept = _load(keep, t, end, c, columns, columns, 1, BT, BN)
                v_tile = tl.where(kept != 0, v_tile, 0.0).to(DTYPE)
            u_tile = _load(u, t, end, 0, R, R, 1, BT, BR)
            product = _dot(product, tl.trans(v_tile), u_tile)
    if R:
        start = out + tl.cast(e, tl.int64) * stride_e
        tl.store(
            tile(start, c, 0, stride_n, stride_r, BN, BR), factor * product, mask=within(c, columns, 0, R, BN, BR)
        )
    if other is not None:
        norm = tl.load(n + e * columns + at_c, mask=at_c < columns, other=0)
        sums = tl.where(norm == 0, 0.0, sums / ratio / tl.where(norm == 0, 1.0, norm))
        tl.store(total + e * columns + at_c, sums, mask=at_c < columns)


@triton.jit
def tile_sums_kernel(parts_of, n, out, first, columns, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Of expert p0, columns of block p1: the sum of its tiles' rows over n, 0 where n is."""
    e = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(tl.load(first + e), tl.load(first + e + 1)):
        total += tl.load(parts_of + tl.cast(p, tl.int64) * columns + at, mask=at < columns, other=0)
    norm = tl.load(n + e * columns + at, mask=at < columns, other=0)
    total = tl.where(norm == 0, 0.0, total / tl.where(norm == 0, 1.0, norm))
    tl.store(out + e * columns + at, total.to(DTYPE), mask=at < columns)
