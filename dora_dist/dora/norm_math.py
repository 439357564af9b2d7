"""What DoRA makes of a frozen weight (arXiv 2402.09353): the norms of V by tiles, the ratio m/n, and the merged
weight, as plain functions on tensors. Symbols and precision are those of functional.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dora_dist.device import is_gpu, wide_dtype
from dora_dist.dora import kernels
from dora_dist.quant.kernels import available
from dora_dist.quant.nf4 import Nf4, PackedMatrix, pieces

# Scratch of the passes over a weight: on a CPU what its caches hold, on a GPU few launches. Fewer rows than these
# would read the low-rank factor so often that a product of rank 384 took three times as long.
_SCRATCH_BYTES = 900_000
_SCRATCH_BYTES_GPU = 64_000_000
_LEAST_ROWS = 48


def row_tiles(matrix: Tensor | PackedMatrix, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Rows of a matrix that are few enough to be held once more in `dtype` on `device`: about as many in each."""
    rows, cols = matrix.shape
    budget = _SCRATCH_BYTES_GPU if is_gpu(device) else _SCRATCH_BYTES
    most = max(_LEAST_ROWS, budget // max(1, cols * dtype.itemsize))
    return pieces(slice(0, rows), max(1, -(-rows // max(1, -(-rows // most)))))


@torch.no_grad()
def squared_norms(
    M_NK: Tensor | PackedMatrix,
    L_NR: Tensor | None,
    U_RK: Tensor | None,
    scaling: float,
    dim: int,
    device: torch.device | None = None,
) -> Tensor:
    """Squared norms of V = M + s L U, accumulated in fp32 by tiles of rows: [N] for `dim` 0, [K] for `dim` 1.

    V is never held whole. On a GPU a kernel has it in registers; else, and for ranks above 64, the scratch is one
    tile of 0.9 MB (64 MB on a GPU) or 48 rows, and the same rows of a 4-bit M. `device` is where to compute when M
    lies elsewhere (offloaded weights). Direct sums, not the factored form, which cancels (docs/math.md).
    """
    device = device or M_NK.device
    small_rank = L_NR is None or L_NR.shape[1] <= kernels.MAX_RANK
    if small_rank and M_NK.device == device and available(device, M_NK.dtype):
        return kernels.squared_norms(M_NK, L_NR, U_RK, scaling, dim)
    dtype = wide_dtype(M_NK.dtype)
    out = torch.zeros(M_NK.shape[dim], dtype=dtype, device=device)
    if L_NR is not None and U_RK is not None:
        L_NR, U_RK = L_NR.to(device, dtype), U_RK.to(device, dtype)
    tiles = row_tiles(M_NK, dtype, device)
    scratch = torch.empty(tiles[0].stop if tiles else 0, M_NK.shape[1], dtype=dtype, device=device)
    for rows in tiles:
        V_tile = scratch[: rows.stop - rows.start]
        V_tile.copy_(M_NK[rows] if isinstance(M_NK, Tensor) else M_NK.read(rows, device))
        if L_NR is not None and U_RK is not None:
            V_tile.addmm_(L_NR[rows], U_RK, alpha=scaling)
        V_tile.square_()
        if dim == 0:
            torch.sum(V_tile, dim=1, out=out[rows])
        else:
            out += torch.sum(V_tile, dim=0)
    return out


def norm_ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / n, and 1 where the row of V is zero (real checkpoints have such rows; m/n would be 0/0 there, and
    so would its gradient if n were not replaced before the division)."""
    zero = norm == 0
    return (magnitude / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0)


class _NormWithGradient(Function):
    """Gives back the norm it is handed, and in backward the norm's gradient to L and U without forming V."""

    @staticmethod
    def forward(ctx, norm, L_NR, U_RK, scaling, dim, layout, *parts):
        ctx.save_for_backward(norm, L_NR, U_RK, *parts)
        ctx.scaling, ctx.dim, ctx.layout = scaling, dim, layout
        return norm.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dnorm):
        norm, L_NR, U_RK, *parts = ctx.saved_tensors
        M_NK = parts[0] if ctx.layout is None else PackedMatrix(parts, ctx.layout)
        s = ctx.scaling
        # dV = diag(c) V (rows) or V diag(c) (columns), with c = dn / n; a zero row has no direction.
        c = torch.where(norm == 0, 0.0, dnorm / norm)
        c_row, c_col = (c[:, None], 1.0) if ctx.dim == 0 else (1.0, c)
        Uc_RK, cL_NR = U_RK * c_col, L_NR * c_row
        dL_NR = s * (cL_NR @ (U_RK @ Uc_RK.t()))
        dU_RK = s * ((L_NR.t() @ cL_NR) @ Uc_RK)
        for rows in row_tiles(M_NK, norm.dtype, M_NK.device):
            M_tile = M_NK[rows].to(norm.dtype)
            c_tile = c[rows, None] if ctx.dim == 0 else 1.0
            dL_NR[rows] += c_tile * (M_tile @ Uc_RK.t())
            dU_RK += (cL_NR[rows].t() @ M_tile) * c_col
        return None, s * dL_NR, s * dU_RK, *[None] * (3 + len(parts))


def norm_with_gradient(
    norm: Tensor,
    M_NK: Tensor | Sequence[Tensor],
    L_NR: Tensor,
    U_RK: Tensor,
    scaling: float,
    dim: int,
    layout: Nf4 | None = None,
) -> Tensor:
    """`norm`, the current norm of V, as a differentiable function of L and U (`norm_gradient: exact`). With
    `layout` M is given as the parts of a 4-bit matrix."""
    parts = (M_NK,) if isinstance(M_NK, Tensor) else tuple(M_NK)
    return _NormWithGradient.apply(norm, L_NR, U_RK, scaling, dim, layout, *parts)


@torch.no_grad()
def merge_(
    M_NK: Tensor, L_NR: Tensor | None, U_RK: Tensor | None, scaling: float, ratio: Tensor | None, dim: int
) -> None:
    """Overwrite M with (m/n) * (M + s L U) by tiles, computed in fp32 and rounded once."""
    dtype = wide_dtype(M_NK.dtype)
    for rows in row_tiles(M_NK, dtype, M_NK.device):
        V_tile = M_NK[rows].to(dtype)
        if L_NR is not None and U_RK is not None:
            V_tile = torch.addmm(V_tile, L_NR[rows].to(dtype), U_RK.to(dtype), alpha=scaling)
        if ratio is not None:
            V_tile = V_tile * (ratio[rows, None] if dim == 0 else ratio)
        M_NK[rows] = V_tile.to(M_NK.dtype)
