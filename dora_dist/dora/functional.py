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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dora_dist.device import wide_dtype
from dora_dist.dora import kernels
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
    low_rank_z,
    magnitude_grad,
    mm_wide_left,
    wide_mm,
)
from dora_dist.quant.kernels import available
from dora_dist.quant.modules import dense, frozen_linear
from dora_dist.quant.nf4 import Nf4

_LEAST_RATIO = {torch.float16: 1e-4, torch.float64: 1e-100}  # else 1e-20: as far as exponents reach


def nonzero_ratio(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """m / n, kept so far from zero that an output of `dtype` multiplied by it can be divided by it again."""
    least = _LEAST_RATIO.get(dtype, 1e-20)
    if available(norm.device, norm.dtype):
        return kernels.nonzero_ratio(magnitude, norm, least)
    ratio = norm_ratio(magnitude, norm)
    return torch.where(ratio.abs() < least, least, ratio)


def _own(y_TO: Tensor) -> Tensor:
    """A compiled function's output as a tensor of its own, by a copy that the compiler leaves out: where it is an
    alias, or was written in place, torch 2.11 makes every gradient zero."""
    return y_TO.clone() if torch.compiler.is_compiling() else y_TO


@dataclass(frozen=True)
class Constants:
    """What a layer computes with besides tensors."""

    scaling: float
    keep_scale: float = 1.0  # of what dropout keeps
    transposed: bool = False
    layout: Nf4 | None = None
    ratio_in_weight: bool = False  # m / n multiplies the rows of W and B, not their product

    def weight(self, parts: Sequence[Tensor], row_factors: Tensor | None = None) -> Tensor:
        """W_IO, which only lives for one product: `parts` are kept for the backward."""
        return dense(parts, self.layout, self.transposed, row_factors)


class Kept(NamedTuple):
    """What a product's gradients are made from, besides the weight. A, B and z are None without a low-rank path,
    g for LoRA."""

    x_TI: Tensor
    A_RI: Tensor | None
    B_OR: Tensor | None
    g: Tensor | None  # m / n per output feature or, for `in_grads`, per input feature
    n: Tensor | None
    z_TR: Tensor | None
    keep_TI: Tensor | None  # what dropout keeps


class Grads(NamedTuple):
    dx_TI: Tensor | None
    dA_RI: Tensor | None
    dB_OR: Tensor | None
    dm: Any  # n's is -g dm; None for LoRA


class Places(NamedTuple):
    """Where the backward writes what it makes, instead of into new tensors: a mixture's experts take turns."""

    dx_TI: Tensor | None = None
    dh_TO: Tensor | None = None


NEW = Places()


class LinearOut(Function):
    """y_TO = g_O * h_TO + bias with h = x W^T + s (drop(x) A^T) B^T and g = m / n per output feature (LoRA: no g).

    Keeps x, z, the dropout mask and, where there is a g, g h, which is the output itself without a bias and which
    most models keep anyway: dm = sum_T(dy * g h) / (g n). So that g h can be divided by g, g is kept away from
    zero, by far less than y's dtype resolves. Where the model has written into the output, g h is computed anew.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_O, n_O, bias, keep_TI, constants, *parts):
        g_O = None if m_O is None else nonzero_ratio(m_O, n_O, x_TI.dtype)
        z_TR = low_rank_z(x_TI, A_RI, keep_TI, constants.keep_scale)
        y_TO, gh_TO = outputs(x_TI, z_TR, B_OR, g_O, bias, constants, parts)
        ctx.constants, ctx.kept = constants, None
        if g_O is not None and bias is None:
            gh_TO, ctx.kept = keep(gh_TO)
        saved_TO = None if g_O is None else gh_TO
        ctx.save_for_backward(x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI, saved_TO, *parts)
        return _own(y_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI, gh_TO, *parts = ctx.saved_tensors
        if is_overwritten(ctx.kept):
            gh_TO = outputs(x_TI, z_TR, B_OR, g_O, None, ctx.constants, parts)[1]
        kept = Kept(x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI)
        dx_TI, dA_RI, dB_OR, dm_O = out_grads(dy_TO, gh_TO, kept, ctx.constants, parts, ctx.needs_input_grad[0])
        dn_O = -g_O * dm_O if ctx.needs_input_grad[4] else None
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_O, dn_O, dbias, *[None] * (2 + len(parts))


def out_grads(
    dy_TO: Tensor, gh_TO: Tensor | None, kept: Kept, constants: Constants, parts: Sequence[Tensor],
    needs_dx: bool, places: Places = NEW,
) -> Grads:  # fmt: skip
    """Of `outputs`."""
    x_TI, A_RI, B_OR, g_O, n_O, z_TR, keep_TI = kept
    scaling, keep_scale = constants.scaling, constants.keep_scale
    row_factors = g_O if constants.ratio_in_weight else None
    dx_TI = dA_RI = dB_OR = dm_O = dz_TR = None
    if g_O is not None:
        assert gh_TO is not None and n_O is not None
        dh_TO, dz_TR, dm_O = decomposed(dy_TO, gh_TO, B_OR, g_O, n_O, scaling, row_factors is None, places.dh_TO)
        dh_TO = dy_TO if dh_TO is None else dh_TO
    else:
        assert B_OR is not None
        dh_TO, dz_TR = dy_TO, low_rank_dz(dy_TO, B_OR, scaling)
    if dz_TR is not None:
        assert A_RI is not None and B_OR is not None and z_TR is not None
        x_kept_TI = dropped(x_TI, keep_TI, keep_scale)
        dA_RI, dB_OR = low_rank_grads(dh_TO, dz_TR, x_kept_TI, z_TR, A_RI, B_OR, scaling)
        if row_factors is not None:
            dB_OR.mul_(row_factors[:, None])
    if needs_dx:
        dx_TI = torch.mm(dh_TO, constants.weight(parts, row_factors).t(), out=places.dx_TI)
        if dz_TR is not None and A_RI is not None:
            add_low_rank_dx(dx_TI, dz_TR, A_RI, keep_TI, keep_scale)
    return Grads(dx_TI, dA_RI, dB_OR, dm_O)


def outputs(
    x_TI: Tensor, z_TR: Tensor | None, B_OR: Tensor | None, g_O: Tensor | None, bias: Tensor | None,
    constants: Constants, parts: Sequence[Tensor], out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """g h + bias and g h, of x's dtype; one tensor where there is no bias. Without g the sum alone, twice. g h may
    lie in `out`."""
    if g_O is not None and not constants.ratio_in_weight:
        product_TO = wide_mm(x_TI, constants.weight(parts), out)
        return composed(product_TO, z_TR, B_OR, g_O, bias, constants.scaling, x_TI.dtype, out)
    W_IO = constants.weight(parts, g_O)
    gh_TO = torch.mm(x_TI, W_IO, out=out) if bias is None or g_O is not None else torch.addmm(bias, x_TI, W_IO)
    if z_TR is not None and B_OR is not None:
        gB_OR = B_OR if g_O is None else g_O[:, None] * B_OR
        gh_TO.addmm_(z_TR, gB_OR.t().to(gh_TO.dtype), alpha=constants.scaling)
    return gh_TO if bias is None or g_O is None else gh_TO + bias, gh_TO


class _LinearIn(Function):
    """y_TO = (g_I * x) W^T + s (g_I * drop(x)) A^T B^T + bias with g = m / n per input feature.

    Keeps x, z and the dropout mask: dm = sum_T(x * (dy V)) / n falls out of the product that dx needs anyway.
    """

    @staticmethod
    def forward(ctx, x_TI, A_RI, B_OR, m_I, n_I, bias, keep_TI, constants, *parts):
        y_TO, z_TR = in_outputs(x_TI, A_RI, B_OR, norm_ratio(m_I, n_I), bias, keep_TI, constants, parts)
        ctx.save_for_backward(x_TI, A_RI, B_OR, m_I, n_I, z_TR, keep_TI, *parts)
        ctx.constants = constants
        return _own(y_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TI, A_RI, B_OR, m_I, n_I, z_TR, keep_TI, *parts = ctx.saved_tensors
        g_I = norm_ratio(m_I, n_I)
        kept = Kept(x_TI, A_RI, B_OR, g_I, n_I, z_TR, keep_TI)
        dx_TI, dA_RI, dB_OR, dm_I = in_grads(dy_TO, kept, ctx.constants, parts, ctx.needs_input_grad[0])
        dn_I = -g_I * dm_I if ctx.needs_input_grad[4] else None
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[5] else None
        return dx_TI, dA_RI, dB_OR, dm_I, dn_I, dbias, *[None] * (2 + len(parts))


def in_outputs(
    x_TI: Tensor, A_RI: Tensor | None, B_OR: Tensor | None, g_I: Tensor, bias: Tensor | None,
    keep_TI: Tensor | None, constants: Constants, parts: Sequence[Tensor], out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(g x) W^T + s drop(g x) A^T B^T + bias, of x's dtype, and z. The first may lie in `out`."""
    gx_TI = x_TI * g_I
    y_TO = mm_wide_left(gx_TI, constants.weight(parts), out)
    z_TR = None if A_RI is None else low_rank_z(gx_TI.to(x_TI.dtype), A_RI, keep_TI, constants.keep_scale)
    if z_TR is not None and B_OR is not None:
        y_TO.addmm_(z_TR.to(y_TO.dtype), B_OR.t().to(y_TO.dtype), alpha=constants.scaling)
    if bias is not None:
        y_TO += bias
    return y_TO.to(x_TI.dtype), z_TR


def in_grads(
    dy_TO: Tensor, kept: Kept, constants: Constants, parts: Sequence[Tensor], needs_dx: bool,
    places: Places = NEW,
) -> Grads:  # fmt: skip
    """Of `in_outputs`: dm = sum_T(x * (dy V)) / n."""
    x_TI, A_RI, B_OR, g_I, n_I, z_TR, keep_TI = kept
    assert g_I is not None and n_I is not None
    scaling, keep_scale = constants.scaling, constants.keep_scale
    dA_RI = dB_OR = None
    dgx_TI = wide_mm(dy_TO, constants.weight(parts).t())
    if A_RI is not None and B_OR is not None and z_TR is not None:
        gx_kept_TI = dropped((x_TI * g_I).to(x_TI.dtype), keep_TI, keep_scale)
        dz_TR = low_rank_dz(dy_TO, B_OR, scaling)
        dA_RI, dB_OR = low_rank_grads(dy_TO, dz_TR, gx_kept_TI, z_TR, A_RI, B_OR, scaling)
        add_low_rank_dx(dgx_TI, dz_TR, A_RI, keep_TI, keep_scale)
        del gx_kept_TI  # dx takes its place
    dx_TI, total_I = column_sums(dgx_TI, x_TI, g_I, needs_dx, places.dx_TI)
    return Grads(dx_TI, dA_RI, dB_OR, magnitude_grad(total_I, n_I))


def prepare(
    x_TI: Tensor, dropout: float, scaling: float, transposed: bool, layout: Nf4 | None
) -> tuple[Tensor | None, Constants]:
    """What dropout keeps of x, and what to compute with."""
    keep_TI, keep_scale = None, 1.0
    if dropout > 0:
        keep_TI = torch.empty_like(x_TI, dtype=torch.bool).bernoulli_(1 - dropout)
        keep_scale = 1 / (1 - dropout)
    # A 4-bit W's scales take the ratio at no cost; then no [T, O] tensor is multiplied by it, or held in fp32.
    in_weight = layout is not None and layout.dtype == torch.bfloat16 and not transposed
    return keep_TI, Constants(scaling, keep_scale, transposed, layout, in_weight)


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
    if magnitude is None and A_RI is None:
        return frozen_linear(x, parts, bias, layout, transposed)
    x_TI = x.reshape(-1, x.shape[-1])
    keep_TI, constants = prepare(x_TI, dropout if A_RI is not None else 0.0, scaling, transposed, layout)
    function = _LinearIn if magnitude is not None and axis == "in" else LinearOut
    y_TO = function.apply(x_TI, A_RI, B_OR, magnitude, norm, bias, keep_TI, constants, *parts)
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
