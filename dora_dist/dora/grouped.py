"""A projection of a mixture's experts: the functions of functional.py on every expert's own tokens.

Legend beside functional.py's: S tokens, sorted by expert; stacked tensors hold one expert's rows after another's:
W [E O, I], A [E R, I], B [E O, R], m and n [E O] or [E I]. An expert without tokens costs nothing and gets zero
gradients. Of a 4-bit W one expert at a time is dense. On a GPU, kernels may do all experts at once
(grouped_kernels.py). Tokens behind the last expert's have no expert, and get zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dora_dist.device import is_gpu
from dora_dist.dora import grouped_kernels
from dora_dist.dora.functional import (
    Constants,
    Grads,
    Kept,
    Places,
    in_grads,
    in_outputs,
    nonzero_ratio,
    out_grads,
    outputs,
    prepare,
)
from dora_dist.dora.kept_output import is_overwritten, keep
from dora_dist.dora.norm_math import norm_ratio
from dora_dist.dora.products import low_rank_z
from dora_dist.quant.modules import Grouping
from dora_dist.quant.nf4 import Nf4


class _Experts(Function):
    """LinearOut, or _LinearIn where `on_inputs`, of each expert's rows. Keeps what they keep."""

    @staticmethod
    def forward(ctx, x_SI, A, B, m, n, keep_SI, constants, on_inputs, groups, *parts):
        g = None
        if m is not None:
            g = norm_ratio(m, n) if on_inputs else nonzero_ratio(m, n, x_SI.dtype)
        kept = Kept(x_SI, A, B, g, n, None, keep_SI)
        y_SO, z_SR = _run(kept, constants, on_inputs, groups, parts)
        ctx.settings, ctx.overwritten = (constants, on_inputs, groups), None
        saved_SO = None
        if g is not None and not on_inputs:
            saved_SO, ctx.overwritten = keep(y_SO)
        ctx.save_for_backward(x_SI, A, B, g, n, z_SR, keep_SI, saved_SO, *parts)
        return y_SO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SO):
        saved = ctx.saved_tensors  # once: checkpointing gives them once
        kept, (y_SO, *parts) = Kept(*saved[:7]), saved[7:]
        constants, on_inputs, groups = ctx.settings
        if is_overwritten(ctx.overwritten):
            y_SO, _ = _run(kept, constants, on_inputs, groups, parts)
        grads = _grads(dy_SO, y_SO, kept, constants, on_inputs, groups, parts, ctx.needs_input_grad[0])
        dn = -kept.g * grads.dm if ctx.needs_input_grad[4] and kept.g is not None else None
        return *grads, dn, *[None] * (4 + len(parts))


def _grads(
    dy_SO: Tensor,
    y_SO: Tensor | None,
    kept: Kept,
    constants: Constants,
    on_inputs: bool,
    groups: Grouping,
    parts: Sequence[Tensor],
    needs_dx: bool,
) -> Grads:
    """Of `_run`, for all experts."""
    if grouped_kernels.run_on(groups, dy_SO, kept.A_RI):
        return grouped_kernels.grads(dy_SO, y_SO, kept, constants, on_inputs, groups, parts)
    dx_SI = torch.empty_like(kept.x_TI) if needs_dx else None
    dA, dB, dm = (None if t is None else torch.zeros_like(t) for t in (kept.A_RI, kept.B_OR, kept.g))
    dh_TO = None  # on a CPU all experts share it
    if y_SO is not None and not constants.ratio_in_weight and not is_gpu(y_SO.device):
        dh_TO = torch.empty_like(y_SO[: groups.most])
    for expert, tokens in groups.spans:
        own = _of_expert(kept, groups, expert, tokens)
        own_parts = groups.parts(parts, constants.layout, expert)
        dx_TI = None if dx_SI is None else dx_SI[tokens]
        places = Places(dx_TI, None if dh_TO is None else dh_TO[: tokens.stop - tokens.start])
        if on_inputs:
            grads = in_grads(dy_SO[tokens], own, constants, own_parts, needs_dx, places)
        else:
            gh_TO = None if y_SO is None else y_SO[tokens]
            grads = out_grads(dy_SO[tokens], gh_TO, own, constants, own_parts, needs_dx, places)
        _fill(dx_TI, grads.dx_TI)
        for stacked, found in zip((dA, dB, dm), grads[1:], strict=True):
            if stacked is not None:
                groups.part(stacked, expert).copy_(found)
    groups.clear_rest(dx_SI)
    return Grads(dx_SI, dA, dB, dm)


def _run(
    kept: Kept, constants: Constants, on_inputs: bool, groups: Grouping, parts: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """y and z of all tokens."""
    if grouped_kernels.run_on(groups, kept.x_TI, kept.A_RI):
        return grouped_kernels.outputs(kept, constants, on_inputs, groups, parts)
    x_SI, A = kept.x_TI, kept.A_RI
    y_SO = x_SI.new_empty(x_SI.shape[0], groups.shape(parts, constants.layout)[0])
    z_SR = None if A is None else x_SI.new_empty(x_SI.shape[0], A.shape[0] // groups.num_experts)
    for expert, tokens in groups.spans:
        x_TI, A_RI, B_OR, g, _, _, keep_TI = _of_expert(kept, groups, expert, tokens)
        own_parts, own_TO = groups.parts(parts, constants.layout, expert), y_SO[tokens]
        if on_inputs:
            assert g is not None
            y_TO, z_TR = in_outputs(x_TI, A_RI, B_OR, g, None, keep_TI, constants, own_parts, own_TO)
        else:
            z_TR = low_rank_z(x_TI, A_RI, keep_TI, constants.keep_scale)
            y_TO, _ = outputs(x_TI, z_TR, B_OR, g, None, constants, own_parts, own_TO)
        _fill(own_TO, y_TO)
        if z_SR is not None and z_TR is not None:
            z_SR[tokens] = z_TR
    groups.clear_rest(y_SO)
    return y_SO, z_SR


def _fill(own: Tensor | None, found: Tensor | None) -> None:
    """Copy what has not been computed in its place."""
    if own is not None and found is not None and found is not own:
        own.copy_(found)


def _of_expert(kept: Kept, groups: Grouping, expert: int, tokens: slice) -> Kept:
    """One expert's tokens, and its own A, B, g and n."""
    x, z, mask = (None if t is None else t[tokens] for t in (kept.x_TI, kept.z_TR, kept.keep_TI))
    A, B, g, n = (None if t is None else groups.part(t, expert) for t in (kept.A_RI, kept.B_OR, kept.g, kept.n))
    assert x is not None
    return Kept(x, A, B, g, n, z, mask)


def adapted_experts(
    x_SI: Tensor,
    groups: Grouping,
    parts: Sequence[Tensor],
    A: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    *,
    scaling: float,
    axis: str = "out",
    dropout: float = 0.0,
    layout: Nf4 | None = None,
) -> Tensor:
    """`adapted_linear` of each expert's tokens, without a bias. x [S, I] sorted by expert -> [S, O]."""
    keep_SI, constants = prepare(x_SI, dropout if A is not None else 0.0, scaling, False, layout)
    on_inputs = magnitude is not None and axis == "in"
    return _Experts.apply(x_SI, A, B, magnitude, norm, keep_SI, constants, on_inputs, groups, *parts)
