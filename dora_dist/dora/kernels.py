# mypy: disable-error-code="no-untyped-def"
"""DoRA's fused Triton kernels for CUDA devices, for ranks up to 64: the norms in one pass over M, the output in
one pass over the product x W^T, the backward in one pass over dY. Their references, and what serves every other
device and rank, are `squared_norms` in norm_math.py, `composed` and `decomposed` in products.py. Symbols are those
of functional.py.

Nothing is tuned at run time: block sizes follow from the rank, so that all ranks of a sharded model run the same
programs and a repeated run gives the same bits. Sums across programs go through small buffers, never through
atomics. All blocks fit in 99 KB of shared memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_dist.quant.kernels import launch, operator, strides
from dora_dist.quant.nf4 import PackedMatrix, codes

MAX_RANK = 64  # beyond, the products are long enough for BLAS libraries to win
_CHUNK = 512  # elements of a column that one program of the norms sums


# -------------------------------------------------------------------------------------- the operators around them
# Their results are tensors: where there is none, an empty one. The programs are imported where they are started:
# they need Triton.


def _power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _blocks(rank: int, packed: bool = False) -> tuple[int, int, int, dict[str, int]]:
    """Tile sizes in a product's rows, columns and rank, and Triton's options. Up to rank 32 what takes time is
    memory: small tiles, of which many are under way. Beyond, larger ones, which read the factors less often; of a
    4-bit matrix half as large, because dequantizing takes registers too, which would not suffice."""
    if rank <= 32:
        return 64, 64, max(16, _power_of_2(rank)), {"num_warps": 4, "num_stages": 3}
    return 32 if packed else 64, 128, 32, {"num_warps": 8, "num_stages": 3}


@operator("dora_dist::squared_norms")
def _squared_norms(
    parts: list[Tensor], L_NR: Tensor | None, U_RK: Tensor | None, scaling: float, dim: int,
    shape: list[int], block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from dora_dist.dora.triton_kernels import norms_kernel

    M, scales, ranges = parts[0], *[*parts[1:], None, None][:2]
    table = codes(M.device) if block_size else None
    rank = 0 if L_NR is None else L_NR.shape[1]
    BN, BK, BR, options = _blocks(rank, packed=block_size > 0)
    kept, summed = (BN, BK) if dim == 0 else (BK, BN)
    length = _power_of_2(shape[1 - dim])  # a column is shared out: there are few of them to a weight's bytes
    chunk = max(summed, length if dim == 0 else min(_CHUNK, length))
    chunks = -(-shape[1 - dim] // chunk)
    sums = torch.empty(chunks, shape[dim], device=M.device)
    launch(
        norms_kernel, (-(-shape[dim] // kept), chunks), M, scales, ranges, table, L_NR, U_RK, sums, *shape,
        scaling, *strides(M, scales, ranges, L_NR, U_RK), DIM=dim, R=rank, BLOCK=block_size, DTYPE=dtype,
        CHUNK=chunk, BN=BN, BK=BK, BR=BR, STAGES=3 if rank <= BR and not block_size else None, **options,
    )  # fmt: skip
    return sums[0] if chunks == 1 else sums.sum(0)


@_squared_norms.op.register_fake
def _(parts, L_NR, U_RK, scaling, dim, shape, block_size, dtype):
    return parts[0].new_empty(shape[dim], dtype=torch.float32)


@operator("dora_dist::compose")
def _compose(
    base_TO: Tensor, z_TR: Tensor | None, B_OR: Tensor | None, g_O: Tensor, bias_O: Tensor | None, scaling: float,
    out_dtype: torch.dtype, keep_gh: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dora_dist.dora.triton_kernels import compose_kernel

    T, O = base_TO.shape  # noqa: E741
    rank = 0 if z_TR is None else z_TR.shape[1]
    y_TO, gh_TO = _compose_results(base_TO, z_TR, B_OR, g_O, bias_O, scaling, out_dtype, keep_gh)
    BT, BO, BR, options = _blocks(rank)
    launch(
        compose_kernel, (-(-T // BT), -(-O // BO)), base_TO, z_TR, B_OR, g_O, bias_O, y_TO,
        gh_TO if keep_gh else None, T, O, scaling, *strides(base_TO, z_TR, B_OR, g_O),
        0 if bias_O is None else bias_O.stride(0), DTYPE=out_dtype, R=rank, BT=BT, BO=BO, BR=BR, **options,
    )  # fmt: skip
    return y_TO, gh_TO


@_compose.op.register_fake
def _compose_results(base_TO, z_TR, B_OR, g_O, bias_O, scaling, out_dtype, keep_gh):
    shape = base_TO.shape
    return tuple(base_TO.new_empty(s, dtype=out_dtype) for s in (shape, shape if keep_gh else 0))


@operator("dora_dist::dora_backward")
def _backward(
    dy_TO: Tensor, h_TO: Tensor, B_OR: Tensor | None, g_O: Tensor, n_O: Tensor, scaling: float, keep_dh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from dora_dist.dora.triton_kernels import backward_kernel

    T, O = dy_TO.shape  # noqa: E741
    rank = 0 if B_OR is None else B_OR.shape[1]
    # A program keeps its tokens' dz in registers while it walks over a chunk of the features: not over all, since
    # T / 64 programs leave half of a GPU idle at T = 4096. Each chunk writes a dz of its own.
    BT, BR = 64, max(16, _power_of_2(rank))
    BO = 64 if dy_TO.dtype == torch.bfloat16 else 32
    chunk = max(BO, min(1024 if rank <= 32 else 2048, _power_of_2(O)))
    blocks, chunks = -(-T // BT), -(-O // chunk)
    dh_TO = dy_TO.new_empty((T, O) if keep_dh else 0)
    dz_CTR = dy_TO.new_empty(chunks, T, rank, dtype=torch.float32)
    totals = dy_TO.new_empty(blocks, O, dtype=torch.float32)
    launch(
        backward_kernel, (blocks, chunks), dy_TO, h_TO, B_OR, g_O, dh_TO if keep_dh else None, dz_CTR, totals, T,
        O, scaling, *strides(dy_TO, h_TO, B_OR, g_O), DTYPE=dy_TO.dtype, R=rank, CHUNK=chunk, BT=BT, BO=BO, BR=BR,
        STAGES=2, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dh_TO, _summed(dz_CTR, dy_TO.dtype), _summed(totals, torch.float32, g_O, n_O)


@_backward.op.register_fake
def _(dy_TO, h_TO, B_OR, g_O, n_O, scaling, keep_dh):
    T, O = dy_TO.shape  # noqa: E741
    dz_TR = dy_TO.new_empty(T, 0 if B_OR is None else B_OR.shape[1])
    return dy_TO.new_empty((T, O) if keep_dh else 0), dz_TR, dy_TO.new_empty(O, dtype=torch.float32)


def _summed(parts_P: Tensor, dtype: torch.dtype, g: Tensor | None = None, n: Tensor | None = None) -> Tensor:
    """The sum of the parts, rounded once; with g and n divided by both, and 0 where n is."""
    from dora_dist.dora.triton_kernels import sum_kernel

    out = parts_P.new_empty(parts_P.shape[1:], dtype=dtype)
    launch(
        sum_kernel, (-(-out.numel() // 256),), parts_P, g, n, out, len(parts_P), out.numel(),
        0 if g is None else g.stride(0), 0 if n is None else n.stride(0),
        DTYPE=dtype, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return out


@operator("dora_dist::nonzero_ratio")
def nonzero_ratio(m_O: Tensor, n_O: Tensor, least: float) -> Tensor:
    """m / n, 1 where n is zero; `least` where it would be nearer to zero."""
    from dora_dist.dora.triton_kernels import ratio_kernel

    g_O = torch.empty_like(n_O)
    launch(
        ratio_kernel, (-(-len(n_O) // 256),), m_O, n_O, g_O, len(n_O), least, *strides(m_O, n_O), DTYPE=g_O.dtype,
        BLOCK=256, num_warps=4,
    )  # fmt: skip
    return g_O


@nonzero_ratio.op.register_fake
def _(m_O, n_O, least):
    return torch.empty_like(n_O)


# ------------------------------------------------------------------------------------------------ what others call


def squared_norms(
    M_NK: Tensor | PackedMatrix, L_NR: Tensor | None, U_RK: Tensor | None, scaling: float, dim: int
) -> Tensor:
    """Squared norms of V = M + s L U in fp32: [N] for `dim` 0, [K] for `dim` 1. All on one device.

    Reads M once (of a 4-bit one N K / 2 bytes and its scales) and writes 4 bytes for every 512 elements; L and U
    are read again by each block, 64 to 128 rows or columns wide, from the L2 cache.
    """
    if L_NR is None or U_RK is None:
        L_NR = U_RK = None
    shape, dtype = list(M_NK.shape), M_NK.dtype
    if isinstance(M_NK, Tensor):
        return _squared_norms([M_NK], L_NR, U_RK, scaling, dim, shape, 0, dtype)
    return _squared_norms(list(M_NK.parts), L_NR, U_RK, scaling, dim, shape, M_NK.layout.block_size, dtype)


def compose(
    base_TO: Tensor, z_TR: Tensor | None, B_OR: Tensor | None, g_O: Tensor, bias_O: Tensor | None, scaling: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = g h + bias and g h with h = base + s z B^T in fp32, each rounded to `out_dtype` once; one tensor where
    there is no bias.

    For an fp32 base and 16-bit results 6 T O bytes, or 8 with a bias: base is read, the results are written.
    Torch's own addmm_, mul_ and conversions move 24 and more.
    """
    if z_TR is None or B_OR is None:
        z_TR = B_OR = None
    y_TO, gh_TO = _compose(base_TO, z_TR, B_OR, g_O, bias_O, scaling, out_dtype, bias_O is not None)
    return y_TO, y_TO if bias_O is None else gh_TO


def backward(
    dy_TO: Tensor, gh_TO: Tensor, B_OR: Tensor | None, g_O: Tensor, n_O: Tensor, scaling: float,
    keep_dh: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """dh = g * dY, where it is kept, and dz_TR = s dh B in dY's dtype; dm = sum_T(dY * gh) / (g n) in fp32, 0
    where n is.

    In 16 bits 6 T O bytes, or 4 without dh: dY and gh are read, dh is written; and 8 T R a chunk of features and
    T O / 8 for partial sums. Torch's own products and sums move 26 T O.
    """
    dh_TO, dz_TR, dm_O = _backward(dy_TO, gh_TO, B_OR, g_O, n_O, scaling, keep_dh)
    return dh_TO if keep_dh else None, None if B_OR is None else dz_TR, dm_O
