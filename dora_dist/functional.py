"""The mathematics of DoRA (arXiv 2402.09353) as plain functions on tensors: no modules, no distribution.

docs/math.md owns the equations. Legend, used as suffixes: T tokens, I in features, O out features, R rank; V is
the adapted matrix W + s B A. A stored matrix M_NK is seen as N rows by K columns whatever they mean: W_OI for
nn.Linear, its transpose for GPT-2's Conv1D and for embeddings. Then V_NK = M_NK + s L_NR U_RK, and the norm is
taken of its rows (`dim` 0: one per row) or of its columns (`dim` 1).

Precision: norms, magnitudes and their ratio m/n are fp32 (fp64 for fp64 weights) whatever the base's dtype. A
ratio of 1.001 times a value that already lies on bf16's grid rounds back to that value, so the ratio meets the
product before that is rounded to 16 bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dora_dist.quant import Nf4, PackedMatrix, dequantize

# Scratch of the passes over a weight: on a CPU what its caches hold, on a GPU few launches. Fewer rows than these
# would read the low-rank factor so often that a product of rank 384 took three times as long.
_SCRATCH_BYTES = {"cpu": 1_000_000}
_SCRATCH_BYTES_GPU = 8_000_000
_LEAST_ROWS = 48


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, ratios and trained tensors of a base of `dtype` are held: fp32, or fp64."""
    return torch.promote_types(dtype, torch.float32)


def _row_tiles(matrix: Tensor | PackedMatrix, dtype: torch.dtype, device: torch.device) -> list[slice]:
    rows, cols = matrix.shape
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_BYTES_GPU)
    step = max(_LEAST_ROWS, budget // max(1, cols * dtype.itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


# --------------------------------------------------------------------------------------------------------- norms


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

    V is never held whole: the scratch is one tile of 1 MB (8 MB on a GPU) or 48 rows, and the same rows of a 4-bit
    M. `device` is where to compute when M lies elsewhere (offloaded weights). Direct sums, not the factored form,
    which cancels (docs/math.md).
    """
    device = device or M_NK.device
    dtype = wide_dtype(M_NK.dtype)
    out = torch.zeros(M_NK.shape[dim], dtype=dtype, device=device)
    if L_NR is not None and U_RK is not None:
        L_NR, U_RK = L_NR.to(device, dtype), U_RK.to(device, dtype)
    tiles = _row_tiles(M_NK, dtype, device)
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
        for rows in _row_tiles(M_NK, norm.dtype, M_NK.device):
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
    for rows in _row_tiles(M_NK, dtype, M_NK.device):
        V_tile = M_NK[rows].to(dtype)
        if L_NR is not None and U_RK is not None:
            V_tile = torch.addmm(V_tile, L_NR[rows].to(dtype), U_RK.to(dtype), alpha=scaling)
        if ratio is not None:
            V_tile = V_tile * (ratio[rows, None] if dim == 0 else ratio)
        M_NK[rows] = V_tile.to(M_NK.dtype)


# ------------------------------------------------------------------------------------------------------- products


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for operands of one dtype, the result not rounded to 16 bits: fp32 for bf16 and fp16."""
    if a.dtype == wide_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    a = a.float()
    for cols in _row_tiles(b.t(), torch.float32, b.device):  # CPUs have no such product: widen b tile by tile
        out[:, cols] = a @ b[:, cols].float()
    return out


def _mm_wide_left(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 for an fp32 a and a 16-bit b that must not be widened whole: a goes in as two 16-bit parts,
    its rounding and the rest, which together keep twice the digits."""
    if b.dtype == a.dtype:
        return a @ b
    high = a.to(b.dtype)
    return _wide_mm(high, b).add_(_wide_mm((a - high).to(b.dtype), b))


def _dropped(x_TI: Tensor, keep_TI: Tensor | None, keep_scale: float) -> Tensor:
    """The low-rank path's input after dropout."""
    return x_TI if keep_TI is None else x_TI * keep_TI * keep_scale


def _low_rank_grads(
    dh_TO: Tensor, x_kept_TI: Tensor, z_TR: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From dh, the gradient at the low-rank product's output: dA, dB in fp32, and dz_TR."""
    dz_TR = (dh_TO @ B_OR.to(dh_TO.dtype)).mul_(scaling)
    dA_RI = _wide_mm(dz_TR.t(), x_kept_TI).to(A_RI.dtype)
    # z^T dh rather than dh^T z: BLAS libraries are up to twice as fast with the long matrix on the right.
    dB_OR = _wide_mm(z_TR.t(), dh_TO).t().mul(scaling).to(B_OR.dtype)
    return dA_RI, dB_OR, dz_TR


def _add_low_rank_dx(
    dx_TI: Tensor, dz_TR: Tensor, A_RI: Tensor, keep_TI: Tensor | None, keep_scale: float
) -> None:
    if keep_TI is None:
        dx_TI.addmm_(dz_TR.to(dx_TI.dtype), A_RI.to(dx_TI.dtype))
    else:
        dx_TI.add_(_dropped(dz_TR @ A_RI.to(dz_TR.dtype), keep_TI, keep_scale))


def _magnitude_grads(
    total: Tensor, magnitude: Tensor, norm: Tensor, needs_dn: bool
) -> tuple[Tensor, Tensor | None]:
    """dm and, where it is needed, dn from sum(dY * V x). Divides by n, never by m: right where m is zero; 0 where
    V's row is."""
    dm = (total / norm).masked_fill(norm == 0, 0.0)
    return dm, -norm_ratio(magnitude, norm) * dm if needs_dn else None


def _dense(parts: Sequence[Tensor], layout: Nf4 | None, transposed: bool) -> Tensor:
    """W_IO of a weight that is stored dense (one part) or in 4 bits. Only the parts are kept for the backward."""
    weight = parts[0] if layout is None else dequantize(parts, layout)
    return weight if transposed else weight.t()


class _FrozenLinear(Function):
    """y_TO = x W^T + bias of a 4-bit weight. Keeps its parts alone."""

    @staticmethod
    def forward(ctx, x_TI, bias, transposed, layout, *parts):
        W_IO = _dense(parts, layout, transposed)
        ctx.save_for_backward(*parts)
        ctx.transposed, ctx.layout = transposed, layout
        return x_TI @ W_IO if bias is None else torch.addmm(bias, x_TI, W_IO)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        dx_TI = (
            dy_TO @ _dense(ctx.saved_tensors, ctx.layout, ctx.transposed).t() if ctx.needs_input_grad[0] else None
        )
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[1] else None
        return dx_TI, dbias, *[None] * (2 + len(ctx.saved_tensors))


class _LoraLinear(Function):
    """y_TO = x W^T + s (drop(x) A^T) B^T + bias. Keeps x, z = drop(x) A^T and the dropout mask."""

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, bias, keep_TI, keep_scale, scaling, transposed, layout, *parts):
        W_IO = _dense(parts, layout, transposed)
        y_TO = x_TI @ W_IO if bias is None else torch.addmm(bias, x_TI, W_IO)
        z_TR = _dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
        y_TO.addmm_(z_TR, B_OR.t().to(y_TO.dtype), alpha=scaling)
        ctx.save_for_backward(x_TI, A_RI, B_OR, z_TR, keep_TI, *parts)
        ctx.keep_scale, ctx.scaling, ctx.transposed, ctx.layout = keep_scale, scaling, transposed, layout
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, z_TR, keep_TI, *parts = ctx.saved_tensors
        x_kept_TI = _dropped(x_TI, keep_TI, ctx.keep_scale)
        dA_RI, dB_OR, dz_TR = _low_rank_grads(dy_TO, x_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ _dense(parts, ctx.layout, ctx.transposed).t()
            _add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[3] else None
        return dx_TI, dA_RI, dB_OR, dbias, *[None] * (5 + len(parts))


class _DoraOut(Function):
    """y_TO = g_O * h_TO + bias with h = x W^T + s (drop(x) A^T) B^T and g = m / n per output feature.

    Keeps x, z, the dropout mask and h (16-bit where x is): dm = sum_T(dy * h) / n needs h, and deriving it from y
    would divide by m and lose small outputs beside large biases.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_O, n_O, bias, keep_TI, keep_scale, scaling, transposed, layout, *parts):
        h_TO = _wide_mm(x_TI, _dense(parts, layout, transposed))
        z_TR = None
        if A_RI is not None:
            z_TR = _dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
            h_TO.addmm_(z_TR.to(h_TO.dtype), B_OR.t().to(h_TO.dtype), alpha=scaling)
        g_O = norm_ratio(m_O, n_O)
        y_TO = torch.empty_like(h_TO, dtype=x_TI.dtype)  # rounded as it is written: no wide y
        if bias is None:
            torch.mul(h_TO, g_O, out=y_TO)
        else:
            torch.addcmul(bias.to(h_TO.dtype), h_TO, g_O, out=y_TO)
        needs_h = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        kept_h_TO = h_TO.to(x_TI.dtype) if needs_h else None
        ctx.save_for_backward(x_TI, A_RI, B_OR, m_O, n_O, z_TR, keep_TI, kept_h_TO, *parts)
        ctx.keep_scale, ctx.scaling, ctx.transposed, ctx.layout = keep_scale, scaling, transposed, layout
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, m_O, n_O, z_TR, keep_TI, h_TO, *parts = ctx.saved_tensors
        dA_RI = dB_OR = dm_O = dn_O = dx_TI = dz_TR = None
        if h_TO is not None:
            total_O = torch.sum(dy_TO.to(n_O.dtype) * h_TO, dim=0)
            dm_O, dn_O = _magnitude_grads(total_O, m_O, n_O, ctx.needs_input_grad[4])
        dh_TO = torch.mul(dy_TO, norm_ratio(m_O, n_O), out=torch.empty_like(dy_TO))
        if A_RI is not None:
            x_kept_TI = _dropped(x_TI, keep_TI, ctx.keep_scale)
            dA_RI, dB_OR, dz_TR = _low_rank_grads(dh_TO, x_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx_TI = dh_TO @ _dense(parts, ctx.layout, ctx.transposed).t()
            if dz_TR is not None:
                _add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_O, dn_O, dbias, *[None] * (5 + len(parts))


class _DoraIn(Function):
    """y_TO = (g_I * x) W^T + s (g_I * drop(x)) A^T B^T + bias with g = m / n per input feature.

    Keeps x, z and the dropout mask: dm = sum_T(x * (dy V)) / n falls out of the product that dx needs anyway.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_I, n_I, bias, keep_TI, keep_scale, scaling, transposed, layout, *parts):
        gx_TI = x_TI * norm_ratio(m_I, n_I)
        y_TO = _mm_wide_left(gx_TI, _dense(parts, layout, transposed))
        z_TR = None
        if A_RI is not None:
            z_TR = _dropped(gx_TI.to(x_TI.dtype), keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
            y_TO.addmm_(z_TR.to(y_TO.dtype), B_OR.t().to(y_TO.dtype), alpha=scaling)
        if bias is not None:
            y_TO += bias
        ctx.save_for_backward(x_TI, A_RI, B_OR, m_I, n_I, z_TR, keep_TI, *parts)
        ctx.keep_scale, ctx.scaling, ctx.transposed, ctx.layout = keep_scale, scaling, transposed, layout
        return y_TO.to(x_TI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, m_I, n_I, z_TR, keep_TI, *parts = ctx.saved_tensors
        g_I = norm_ratio(m_I, n_I)
        dA_RI = dB_OR = None
        dgx_TI = _wide_mm(dy_TO, _dense(parts, ctx.layout, ctx.transposed).t())
        if A_RI is not None:
            gx_TI = (x_TI * g_I).to(x_TI.dtype)
            gx_kept_TI = _dropped(gx_TI, keep_TI, ctx.keep_scale)
            dA_RI, dB_OR, dz_TR = _low_rank_grads(dy_TO, gx_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
            _add_low_rank_dx(dgx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dm_I, dn_I = _magnitude_grads(torch.sum(dgx_TI * x_TI, dim=0), m_I, n_I, ctx.needs_input_grad[4])
        dx_TI = (dgx_TI * g_I).to(x_TI.dtype) if ctx.needs_input_grad[0] else None
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_I, dn_I, dbias, *[None] * (5 + len(parts))


def adapted_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    A_RI: Tensor | None,
    B_OR: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float,
    axis: str = "out",
    transposed: bool = False,
    dropout: float = 0.0,
    layout: Nf4 | None = None,
) -> Tensor:
    """y = (m/n) * ((W + s B A) x) + bias, or the same without m/n where `magnitude` is None (LoRA).

    Args:
        x: [..., I], in the weight's dtype.
        weight: [O, I], or [I, O] with `transposed` (Conv1D); with `layout`, the parts of a 4-bit one. Gets no
            gradient.
        A_RI, B_OR: the low-rank factors, or both None: the magnitude alone is trained.
        magnitude, norm: [O] for `axis` "out", [I] for "in". The norm is a constant here; pass it through
            `norm_with_gradient` to let gradients flow through it.
        dropout: probability, applied to the low-rank path's input only.
    Returns:
        [..., O], in x's dtype.
    """
    parts = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    x_TI = x.reshape(-1, x.shape[-1])
    keep_TI, keep_scale = None, 1.0
    if dropout > 0 and A_RI is not None:
        keep_TI = torch.empty_like(x_TI, dtype=torch.bool).bernoulli_(1 - dropout)
        keep_scale = 1 / (1 - dropout)
    common = (bias, keep_TI, keep_scale, scaling, transposed, layout, *parts)
    if magnitude is not None:
        function = _DoraOut if axis == "out" else _DoraIn
        y_TO = function.apply(x_TI, A_RI, B_OR, magnitude, norm, *common)
    elif A_RI is not None:
        y_TO = _LoraLinear.apply(x_TI, A_RI, B_OR, *common)
    else:
        y_TO = _FrozenLinear.apply(x_TI, bias, transposed, layout, *parts)
    return y_TO if x.dim() == 2 else y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def adapted_embedding(
    ids: Tensor,
    weight_VO: Tensor,
    A_RV: Tensor | None,
    B_OR: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    *,
    scaling: float,
    axis: str = "out",
) -> Tensor:
    """Rows `ids` of (m/n) * (W + s (B A)^T), W [vocab, O]; an embedding is a linear layer on one-hot inputs, so
    `axis` "out" has one magnitude per embedding dimension and "in" one per token of the vocabulary."""
    h = F.embedding(ids, weight_VO).to(wide_dtype(weight_VO.dtype))
    if A_RV is not None and B_OR is not None:
        h = h + scaling * (F.embedding(ids, A_RV.t()) @ B_OR.t())
    if magnitude is not None and norm is not None:
        ratio = norm_ratio(magnitude, norm)
        h = h * (ratio if axis == "out" else ratio[ids].unsqueeze(-1))
    return h.to(weight_VO.dtype)
