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

from dora_dist.device import wide_dtype
from dora_dist.dora.kept_output import is_overwritten, keep
from dora_dist.dora.norm_math import norm_ratio
from dora_dist.dora.products import (
    add_low_rank_dx,
    column_sums,
    composed,
    decomposed,
    dropped,
    low_rank_dz,
    low_rank_grads,
    mm_wide_left,
    wide_mm,
)
from dora_dist.quant.kernels import dequantize
from dora_dist.quant.modules import dense, frozen_linear
from dora_dist.quant.nf4 import Nf4

_LEAST_RATIO = {torch.float16: 1e-4, torch.float64: 1e-100}  # else 1e-20: as far as exponents reach


def _magnitude_grads(total: Tensor, ratio: Tensor, norm: Tensor, needs_dn: bool) -> tuple[Tensor, Tensor | None]:
    """dm and, where it is needed, dn from sum(dY * V x). Divides by n, never by m: right where m is zero; 0 where
    V's row is."""
    dm = (total / norm).masked_fill_(norm == 0, 0.0)
    return dm, -ratio * dm if needs_dn else None


def _nonzero_ratio(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """m / n, kept so far from zero that an output of `dtype` multiplied by it can be divided by it again."""
    ratio, least = norm_ratio(magnitude, norm), _LEAST_RATIO.get(dtype, 1e-20)
    return torch.where(ratio.abs() < least, least, ratio)


def _own(y_TO: Tensor) -> Tensor:
    """A compiled function's output as a tensor of its own, by a copy that the compiler leaves out: where it is an
    alias, or was written in place, torch 2.11 makes every gradient zero."""
    return y_TO.clone() if torch.compiler.is_compiling() else y_TO


class _LoraLinear(Function):
    """y_TO = x W^T + s (drop(x) A^T) B^T + bias. Keeps x, z = drop(x) A^T and the dropout mask."""

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, bias, keep_TI, keep_scale, scaling, transposed, layout, *parts):
        W_IO = dense(parts, layout, transposed)
        y_TO = x_TI @ W_IO if bias is None else torch.addmm(bias, x_TI, W_IO)
        z_TR = dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
        y_TO.addmm_(z_TR, B_OR.t().to(y_TO.dtype), alpha=scaling)
        ctx.save_for_backward(x_TI, A_RI, B_OR, z_TR, keep_TI, *parts)
        ctx.keep_scale, ctx.scaling, ctx.transposed, ctx.layout = keep_scale, scaling, transposed, layout
        return _own(y_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, z_TR, keep_TI, *parts = ctx.saved_tensors
        x_kept_TI = dropped(x_TI, keep_TI, ctx.keep_scale)
        dz_TR = low_rank_dz(dy_TO, B_OR, ctx.scaling)
        dA_RI, dB_OR = low_rank_grads(dy_TO, dz_TR, x_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ dense(parts, ctx.layout, ctx.transposed).t()
            add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[3] else None
        return dx_TI, dA_RI, dB_OR, dbias, *[None] * (5 + len(parts))


class _DoraOut(Function):
    """y_TO = g_O * h_TO + bias with h = x W^T + s (drop(x) A^T) B^T and g = m / n per output feature.

    Keeps x, z, the dropout mask and g h, which is the output itself where there is no bias and which most models
    keep anyway: dm = sum_T(dy * g h) / (g n). So that g h can be divided by g, g is kept away from zero, by far
    less than y's dtype resolves. Where the model has written into the output, g h is computed anew.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_O, n_O, bias, keep_TI, keep_scale, scaling, transposed, layout, *parts):
        product_TO = wide_mm(x_TI, dense(parts, layout, transposed))
        z_TR = None
        if A_RI is not None:
            z_TR = dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
        g_O = _nonzero_ratio(m_O, n_O, x_TI.dtype)
        y_TO, gh_TO = composed(product_TO, z_TR, B_OR, g_O, bias, scaling, x_TI.dtype)
        gh_TO, ctx.kept = keep(gh_TO) if bias is None else (gh_TO, None)
        ctx.save_for_backward(x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI, gh_TO, *parts)
        ctx.keep_scale, ctx.scaling, ctx.transposed, ctx.layout = keep_scale, scaling, transposed, layout
        return _own(y_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI, gh_TO, *parts = ctx.saved_tensors
        dA_RI = dB_OR = dx_TI = None
        if is_overwritten(ctx.kept):
            product_TO = wide_mm(x_TI, dense(parts, ctx.layout, ctx.transposed))
            gh_TO = composed(product_TO, z_TR, B_OR, g_O, None, ctx.scaling, x_TI.dtype)[1]
        dh_TO, dz_TR, total_O = decomposed(dy_TO, gh_TO, B_OR, g_O, ctx.scaling)
        assert dh_TO is not None
        dm_O, dn_O = _magnitude_grads(total_O / g_O, g_O, n_O, ctx.needs_input_grad[4])
        if dz_TR is not None:
            x_kept_TI = dropped(x_TI, keep_TI, ctx.keep_scale)
            dA_RI, dB_OR = low_rank_grads(dh_TO, dz_TR, x_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx_TI = dh_TO @ dense(parts, ctx.layout, ctx.transposed).t()
            if dz_TR is not None:
                add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_O, dn_O, dbias, *[None] * (5 + len(parts))


class _DoraOutFolded(Function):
    """As _DoraOut, over a bf16 W that is stored in 4 bits: the ratio rides on the scales of W's rows and on B's
    rows, so that no [T, O] tensor is multiplied by it, nor held in fp32."""

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_O, n_O, bias, keep_TI, keep_scale, scaling, layout, *parts):
        g_O = _nonzero_ratio(m_O, n_O, x_TI.dtype)
        z_TR = None
        if A_RI is not None:
            z_TR = dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
        y_TO = _folded(x_TI, z_TR, B_OR, g_O, scaling, layout, parts)
        gh_TO, ctx.kept = keep(y_TO) if bias is None else (y_TO, None)
        ctx.save_for_backward(x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI, gh_TO, *parts)
        ctx.keep_scale, ctx.scaling, ctx.layout = keep_scale, scaling, layout
        return _own(y_TO if bias is None else y_TO + bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI, y_TO, *parts = ctx.saved_tensors
        dA_RI = dB_OR = dx_TI = None
        if is_overwritten(ctx.kept):
            y_TO = _folded(x_TI, z_TR, B_OR, g_O, ctx.scaling, ctx.layout, parts)
        _, dz_TR, total_O = decomposed(dy_TO, y_TO, B_OR, g_O, ctx.scaling, keep_dh=False)
        dm_O, dn_O = _magnitude_grads(total_O / g_O, g_O, n_O, ctx.needs_input_grad[4])
        if dz_TR is not None:
            x_kept_TI = dropped(x_TI, keep_TI, ctx.keep_scale)
            dA_RI, dB_OR = low_rank_grads(dy_TO, dz_TR, x_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
            dB_OR.mul_(g_O[:, None])
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ dequantize(parts, ctx.layout, g_O)
            if dz_TR is not None:
                add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_O, dn_O, dbias, *[None] * (4 + len(parts))


def _folded(
    x_TI: Tensor,
    z_TR: Tensor | None,
    B_OR: Tensor | None,
    g_O: Tensor,
    scaling: float,
    layout: Nf4,
    parts: Sequence[Tensor],
) -> Tensor:
    """g h, of x's dtype."""
    y_TO = x_TI @ dequantize(parts, layout, g_O).t()
    if z_TR is not None and B_OR is not None:
        y_TO.addmm_(z_TR, (g_O[:, None] * B_OR).t().to(y_TO.dtype), alpha=scaling)
    return y_TO


class _DoraIn(Function):
    """y_TO = (g_I * x) W^T + s (g_I * drop(x)) A^T B^T + bias with g = m / n per input feature.

    Keeps x, z and the dropout mask: dm = sum_T(x * (dy V)) / n falls out of the product that dx needs anyway.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_I, n_I, bias, keep_TI, keep_scale, scaling, transposed, layout, *parts):
        gx_TI = x_TI * norm_ratio(m_I, n_I)
        y_TO = mm_wide_left(gx_TI, dense(parts, layout, transposed))
        z_TR = None
        if A_RI is not None:
            z_TR = dropped(gx_TI.to(x_TI.dtype), keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
            y_TO.addmm_(z_TR.to(y_TO.dtype), B_OR.t().to(y_TO.dtype), alpha=scaling)
        if bias is not None:
            y_TO += bias
        ctx.save_for_backward(x_TI, A_RI, B_OR, m_I, n_I, z_TR, keep_TI, *parts)
        ctx.keep_scale, ctx.scaling, ctx.transposed, ctx.layout = keep_scale, scaling, transposed, layout
        return _own(y_TO.to(x_TI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, m_I, n_I, z_TR, keep_TI, *parts = ctx.saved_tensors
        g_I = norm_ratio(m_I, n_I)
        dA_RI = dB_OR = None
        dgx_TI = wide_mm(dy_TO, dense(parts, ctx.layout, ctx.transposed).t())
        if A_RI is not None:
            gx_TI = (x_TI * g_I).to(x_TI.dtype)
            gx_kept_TI = dropped(gx_TI, keep_TI, ctx.keep_scale)
            dz_TR = low_rank_dz(dy_TO, B_OR, ctx.scaling)
            dA_RI, dB_OR = low_rank_grads(dy_TO, dz_TR, gx_kept_TI, z_TR, A_RI, B_OR, ctx.scaling)
            add_low_rank_dx(dgx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
            del gx_TI, gx_kept_TI  # dx takes their place
        dx_TI, total_I = column_sums(dgx_TI, x_TI, g_I, ctx.needs_input_grad[0])
        dm_I, dn_I = _magnitude_grads(total_I, g_I, n_I, ctx.needs_input_grad[4])
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
    if magnitude is not None and axis == "out" and not transposed and layout and layout.dtype == torch.bfloat16:
        y_TO = _DoraOutFolded.apply(
            x_TI, A_RI, B_OR, magnitude, norm, bias, keep_TI, keep_scale, scaling, layout, *parts
        )
    elif magnitude is not None:
        function = _DoraOut if axis == "out" else _DoraIn
        y_TO = function.apply(x_TI, A_RI, B_OR, magnitude, norm, *common)
    elif A_RI is not None:
        y_TO = _LoraLinear.apply(x_TI, A_RI, B_OR, *common)
    else:
        y_TO = frozen_linear(x_TI, parts, bias, layout, transposed)
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
