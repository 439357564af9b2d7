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

from dora_dist.decomposition import norm_ratio, row_tiles, wide_dtype
from dora_dist.quant import Nf4, dequantize


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for operands of one dtype, the result not rounded to 16 bits: fp32 for bf16 and fp16."""
    if a.dtype == wide_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    a = a.float()
    for cols in row_tiles(b.t(), torch.float32, b.device):  # CPUs have no such product: widen b tile by tile
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


class _DoraOutFolded(Function):
    """As _DoraOut, over a bf16 W that is stored in 4 bits: the ratio rides on the scales of W's rows and on B's
    rows, so that no [T, O] tensor is multiplied by it, nor held in fp32.

    Keeps x, z, the dropout mask and y before the bias: dm = sum_T(dy * y) / (g n). So that y can be divided by g,
    g is kept a millionth away from zero, far less than what bf16 resolves beside a ratio of 1.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_O, n_O, bias, keep_TI, keep_scale, scaling, layout, *parts):
        g_O = _away_from_zero(norm_ratio(m_O, n_O))
        y_TO = x_TI @ dequantize(parts, layout, g_O).t()
        z_TR = None
        if A_RI is not None:
            z_TR = _dropped(x_TI, keep_TI, keep_scale) @ A_RI.t().to(x_TI.dtype)
            y_TO.addmm_(z_TR, (g_O[:, None] * B_OR).t().to(y_TO.dtype), alpha=scaling)
        ctx.save_for_backward(x_TI, A_RI, B_OR, m_O, n_O, z_TR, keep_TI, y_TO, *parts)
        ctx.keep_scale, ctx.scaling, ctx.layout = keep_scale, scaling, layout
        return y_TO if bias is None else y_TO + bias

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, m_O, n_O, z_TR, keep_TI, y_TO, *parts = ctx.saved_tensors
        dA_RI = dB_OR = dx_TI = dz_TR = None
        g_O = _away_from_zero(norm_ratio(m_O, n_O))
        total_O = torch.sum(dy_TO.to(n_O.dtype) * y_TO, dim=0).div_(g_O)
        dm_O, dn_O = _magnitude_grads(total_O, m_O, n_O, ctx.needs_input_grad[4])
        if A_RI is not None:
            x_kept_TI = _dropped(x_TI, keep_TI, ctx.keep_scale)
            gB_OR = g_O[:, None] * B_OR
            dA_RI, dB_OR, dz_TR = _low_rank_grads(dy_TO, x_kept_TI, z_TR, A_RI, gB_OR, ctx.scaling)
            dB_OR.mul_(g_O[:, None])
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ dequantize(parts, ctx.layout, g_O)
            if dz_TR is not None:
                _add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, ctx.keep_scale)
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_O, dn_O, dbias, *[None] * (4 + len(parts))


def _away_from_zero(ratio: Tensor) -> Tensor:
    return torch.where(ratio.abs() < 1e-6, 1e-6, ratio)


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
