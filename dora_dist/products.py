"""Matrix products of mixed precision, and the low-rank path's, of which functional.py makes layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_dist import kernels
from dora_dist.decomposition import row_tiles, wide_dtype
from dora_dist.quant import Nf4
from dora_dist.target import is_gpu


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for operands of one dtype, the result not rounded to 16 bits: fp32 for bf16 and fp16."""
    if a.dtype == wide_dtype(a.dtype):
        return a @ b
    if is_gpu(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    a = a.float()
    for cols in row_tiles(b.t(), torch.float32, b.device):  # CPUs have no such product: widen b tile by tile
        out[:, cols] = a @ b[:, cols].float()
    return out


def mm_wide_left(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 for an fp32 a and a 16-bit b that must not be widened whole: a goes in as two 16-bit parts,
    its rounding and the rest, which together keep twice the digits."""
    if b.dtype == a.dtype:
        return a @ b
    high = a.to(b.dtype)
    return wide_mm(high, b).add_(wide_mm((a - high).to(b.dtype), b))


def dropped(x_TI: Tensor, keep_TI: Tensor | None, keep_scale: float) -> Tensor:
    """The low-rank path's input after dropout."""
    return x_TI if keep_TI is None else x_TI * keep_TI * keep_scale


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


def dense(parts: Sequence[Tensor], layout: Nf4 | None, transposed: bool) -> Tensor:
    """W_IO of a weight that is stored dense (one part) or in 4 bits. Only the parts are kept for the backward."""
    weight = parts[0] if layout is None else kernels.dequantize(parts, layout)
    return weight if transposed else weight.t()
