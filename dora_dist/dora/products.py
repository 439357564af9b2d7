"""Matrix products of mixed precision, and the low-rank path's, of which functional.py makes layers."""

import torch
from torch import Tensor

from dora_dist.device import is_gpu, wide_dtype
from dora_dist.dora import kernels
from dora_dist.dora.norm_math import row_tiles
from dora_dist.quant.kernels import available

# What a tile of an activation takes in fp32. A pass goes through three such tensors at a time, which a core's L2
# cache should hold; on a GPU few launches matter more.
_TILE_BYTES = 450_000
_TILE_BYTES_GPU = 8_000_000


def wide_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b for operands of one dtype, the result not rounded to 16 bits: fp32 for bf16 and fp16. In `out` where
    there is one that holds it."""
    if a.dtype == wide_dtype(a.dtype):
        return torch.mm(a, b, out=out)
    if is_gpu(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    a = a.float()
    for cols in row_tiles(b.t(), torch.float32, b.device):  # CPUs have no such product: widen b tile by tile
        wide[:, cols] = a @ b[:, cols].float()
    return wide


def token_tiles(*tensors_TN: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of the same few tokens in each, so few that several passes over them find in a core's cache what the
    last one left there. All tokens where that is little."""
    first = tensors_TN[0]
    budget = _TILE_BYTES_GPU if is_gpu(first.device) else _TILE_BYTES
    row_bytes = first.shape[1] * wide_dtype(first.dtype).itemsize
    if first.shape[0] * row_bytes <= 4 * budget:
        return [tensors_TN]
    tokens = max(1, budget // row_bytes)
    return list(zip(*(t.split(tokens) for t in tensors_TN), strict=True))


def column_sums(
    a_TN: Tensor, b_TN: Tensor, g_N: Tensor, keep_ga: bool = True, out: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """g a in b's dtype, where it is kept (in `out` if given), and sum_T(a * b) in fp32 (fp64 for fp64). Of a * b
    there is never more than a tile."""
    wide = wide_dtype(a_TN.dtype)
    if torch.compiler.is_compiling():  # it joins passes itself, and in torch 2.11 loses what `out=` writes
        return (a_TN * g_N).to(b_TN.dtype) if keep_ga else None, torch.sum(a_TN.to(wide) * b_TN, dim=0)
    total_N = a_TN.new_zeros(a_TN.shape[1], dtype=wide)
    if not keep_ga:
        for a_tile, b_tile in token_tiles(a_TN, b_TN):
            total_N += torch.sum(a_tile.to(wide) * b_tile, dim=0)
        return None, total_N
    ga_TN = torch.empty(a_TN.shape, dtype=b_TN.dtype, device=a_TN.device) if out is None else out
    for a_tile, b_tile, ga_tile in token_tiles(a_TN, b_TN, ga_TN):
        # What is to hold g a holds a * b before, where it is wide enough.
        product = torch.mul(a_tile.to(wide), b_tile, out=ga_tile if b_TN.dtype == wide else None)
        total_N += torch.sum(product, dim=0)
        torch.mul(a_tile, g_N, out=ga_tile)
    return ga_TN, total_N


def mm_wide_left(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32 for an fp32 a and a 16-bit b that must not be widened whole: a goes in as two 16-bit parts,
    its rounding and the rest, which together keep twice the digits. In `out` where there is one that holds it."""
    if b.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    high = a.to(b.dtype)
    return wide_mm(high, b).add_(wide_mm((a - high).to(b.dtype), b))


def dropped(x_TI: Tensor, keep_TI: Tensor | None, keep_scale: float) -> Tensor:
    """The low-rank path's input after dropout."""
    return x_TI if keep_TI is None else x_TI * keep_TI * keep_scale


def low_rank_z(x_TI: Tensor, A_RI: Tensor | None, keep_TI: Tensor | None, keep_scale: float) -> Tensor | None:
    return None if A_RI is None else dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)


def low_rank_dz(dh_TO: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    return (dh_TO @ B_OR.to(dh_TO.dtype)).mul_(scaling)


def low_rank_grads(
    dh_TO: Tensor, dz_TR: Tensor, x_kept_TI: Tensor, z_TR: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dA and dB in fp32, from dh, the gradient at the low-rank product's output, and dz."""
    dA_RI = wide_mm(dz_TR.t(), x_kept_TI).to(A_RI.dtype)
    # z^T dh rather than dh^T z: BLAS libraries are up to twice as fast with the long matrix on the right.
    dB_OR = wide_mm(z_TR.t(), dh_TO).t().mul(scaling).to(B_OR.dtype)
    return dA_RI, dB_OR


def add_low_rank_dx(dx_TI: Tensor, dz_TR: Tensor, A_RI: Tensor, keep_TI: Tensor | None, keep_scale: float) -> None:
    if keep_TI is None:
        dx_TI.addmm_(dz_TR.to(dx_TI.dtype), A_RI.to(dx_TI.dtype))
    else:
        dx_TI.add_(dropped(dz_TR @ A_RI.to(dz_TR.dtype), keep_TI, keep_scale))


def composed(
    product_TO: Tensor,
    z_TR: Tensor | None,
    B_OR: Tensor | None,
    g_O: Tensor,
    bias: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = g h + bias and g h, of `dtype`, with h = x W^T + s z B^T; one tensor where there is no bias.
    `product_TO`, x W^T, may be overwritten. g h may lie in `out`."""
    if available(product_TO.device, product_TO.dtype):
        if z_TR is None or B_OR is None or z_TR.shape[1] <= kernels.MAX_RANK:
            return kernels.compose(product_TO, z_TR, B_OR, g_O, bias, scaling, dtype)
        gh_TO, _ = kernels.compose(product_TO, None, None, g_O, None, scaling, dtype)
        gh_TO.addmm_(z_TR, (g_O[:, None] * B_OR).t().to(dtype), alpha=scaling)
        return gh_TO if bias is None else gh_TO + bias, gh_TO
    if z_TR is not None and B_OR is not None:
        product_TO.addmm_(z_TR.to(product_TO.dtype), B_OR.t().to(product_TO.dtype), alpha=scaling)
    if torch.compiler.is_compiling():  # see column_sums
        wide_TO = product_TO * g_O
        gh_TO = wide_TO.to(dtype)
        return gh_TO if bias is None else (wide_TO + bias).to(dtype), gh_TO
    if product_TO.dtype == dtype and bias is None:
        return product_TO.mul_(g_O), product_TO
    if product_TO.dtype == dtype:
        gh_TO = product_TO
    else:
        gh_TO = torch.empty_like(product_TO, dtype=dtype) if out is None else out
    y_TO = gh_TO if bias is None else torch.empty_like(gh_TO)
    for wide_tile, gh_tile, y_tile in token_tiles(product_TO, gh_TO, y_TO):
        wide_tile.mul_(g_O)
        if product_TO.dtype != dtype:
            gh_tile.copy_(wide_tile)
        if bias is not None:
            torch.add(wide_tile, bias, out=y_tile)
    return y_TO, gh_TO


def decomposed(
    dy_TO: Tensor,
    gh_TO: Tensor,
    B_OR: Tensor | None,
    g_O: Tensor,
    n_O: Tensor,
    scaling: float,
    keep_dh: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dh = g dy in dy's dtype, where it is kept, and then perhaps in `out`; dz = s dh B, and
    dm = sum_T(dy * g h) / (g n)."""
    if available(dy_TO.device, dy_TO.dtype):
        small = None if B_OR is None or B_OR.shape[1] > kernels.MAX_RANK else B_OR
        dh_TO, dz_TR, dm_O = kernels.backward(dy_TO, gh_TO, small, g_O, n_O, scaling, keep_dh)
        if dz_TR is not None or B_OR is None:
            return dh_TO, dz_TR, dm_O
    else:
        dh_TO, total_O = column_sums(dy_TO, gh_TO, g_O, keep_dh, out)
        dm_O = magnitude_grad(total_O / g_O, n_O)
        if B_OR is None:
            return dh_TO, None, dm_O
    if dh_TO is None:
        return None, low_rank_dz(dy_TO, g_O[:, None] * B_OR, scaling), dm_O
    return dh_TO, low_rank_dz(dh_TO, B_OR, scaling), dm_O


def magnitude_grad(total: Tensor, norm: Tensor) -> Tensor:
    """dm from sum(dY * V x). Divides by n, never by m: right where m is zero; 0 where V's row is."""
    return (total / norm).masked_fill_(norm == 0, 0.0)
