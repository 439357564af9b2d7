"""Mixtures of experts as transformers holds them: a module whose parameters `gate_up_proj` (or `up_proj`) and
`down_proj` are every expert's matrices in one tensor [E, out, in], or [E, in, out] in a few models.

Each such parameter becomes a module of the same name over the stacked matrix [E out, in], expert by expert:
DoraExperts, or FrozenExperts where it is not adapted. Whatever knows matrices by rows (sharding, 4 bits, norms,
files) then needs to know little of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dora_dist.dora import grouped_kernels
from dora_dist.dora.grouped import adapted_experts
from dora_dist.dora.grouped_kernels import DeviceGroups
from dora_dist.dora.layers import AdapterSpec, Block, DoraLayer
from dora_dist.quant.modules import FrozenExperts, Grouping, Groups, frozen_experts
from dora_dist.quant.nf4 import Nf4


class DoraExperts(DoraLayer):
    """DoRA of one projection of a mixture's experts: y = (m_e/n_e) * ((W_e + s B_e A_e) x) for each token's own
    expert e.

    `weight` is [E out, in], A [E r, in], B [E out, r], magnitude [E out] or [E in]: expert after expert.
    """

    def __init__(self, weight: nn.Parameter, spec: AdapterSpec, num_experts: int):
        self.num_experts = num_experts
        super().__init__(weight, None, spec)

    def forward(self, x_SI: Tensor, groups: Grouping) -> Tensor:
        """x sorted by expert -> [S, out], in the weight's dtype (under autocast, in autocast's)."""
        if self._computes_base():
            return frozen_experts(self, x_SI, groups)
        return self._in_compute_dtype(x_SI, groups)

    def _adapted(self, x: Tensor, parts: list[Tensor], layout: Nf4 | None, *more: Any) -> Tensor:
        (groups,) = more
        return adapted_experts(
            x,
            groups,
            parts,
            *self._trained(),
            scaling=self.spec.scaling,
            axis=self.spec.axis,
            dropout=self._dropout,
            layout=layout,
        )

    def blocks(self, rows: slice | None = None) -> list[Block]:
        out, rank = self.out_features, self.spec.rank
        rows = rows or slice(0, self.num_experts * out)
        return [
            Block(
                slice(max(rows.start, e * out), min(rows.stop, (e + 1) * out)),
                slice(e * rank, (e + 1) * rank),
                e * self.in_features,
            )
            for e in range(rows.start // out, -(-rows.stop // out))
        ]

    def block_factors(self) -> list[tuple[Tensor | None, Tensor | None]]:
        if self.lora_A is None or self.lora_B is None:
            return [(None, None)] * self.num_experts
        return list(zip(self.lora_B.split(self.out_features), self.lora_A.split(self.spec.rank), strict=True))

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({super().extra_repr()})"


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module holds its experts."""

    num_experts: int
    shapes: Mapping[str, tuple[int, int]]  # a parameter's name -> (out, in) of one expert; what comes first first
    transposed: bool  # the parameters are [E, in, out]
    routed: bool  # forward(x, experts of each token, their weights); else x has equally many rows for each expert

    def stacked(self, own: Tensor) -> Tensor:
        """The matrix [E out, in] of a parameter as the model has it; a view where it can be one."""
        return (own.transpose(1, 2) if self.transposed else own).reshape(
            -1, own.shape[1 if self.transposed else 2]
        )

    def unstacked(self, stacked: Tensor) -> Tensor:
        """The model's own form of a matrix [E out, in], contiguous."""
        own = stacked.view(self.num_experts, -1, stacked.shape[1])
        return own.transpose(1, 2).contiguous() if self.transposed else own


class ExpertsForward(nn.Module):
    """Stands before a class of experts whose projections are modules, and computes as the class does: its gate,
    its activation, the router's weights. Each token goes to its experts by one sort."""

    own_class: Any
    layout: ExpertsLayout
    post_expert_norm: Any
    act_fn: Any
    _apply_gate: Any

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """x [T, H], experts [T, k] and weights [T, k] -> [T, H]; where the layout is not routed, x [E n, H] -> the
        same. Experts from E on are none: zeros."""
        E = self.layout.num_experts
        if top_k_index is None or top_k_weights is None:
            x_SI = hidden_states.view(-1, hidden_states.shape[-1])
            each = x_SI.shape[0] // E
            return self._through_experts(
                x_SI, Groups.of([each] * E), torch.arange(E, device=x_SI.device).repeat_interleave(each)
            )
        k, experts = top_k_index.shape[1], top_k_index.flatten()
        order = torch.argsort(experts, stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        experts_S = experts[order]
        x_SI = _Rows.apply(hidden_states, order, back, k)
        if grouped_kernels.worthwhile(x_SI, E, self.layout.shapes):
            groups: Grouping = DeviceGroups.of_sorted(experts_S, E)
        else:
            groups = Groups.of(tokens_each(experts, E))
        y_SO = self._through_experts(x_SI, groups, experts_S.clamp(max=E - 1))
        weights_S = _Rows.apply(top_k_weights.reshape(-1, 1), order, back, 1)
        y_SO = y_SO * weights_S.masked_fill(experts_S[:, None] >= E, 0)
        y_TkO = _Rows.apply(y_SO, back, order, 1).view(-1, k, y_SO.shape[1])
        return y_TkO.sum(1).to(hidden_states.dtype)

    def _through_experts(self, x_SI: Tensor, groups: Grouping, experts_S: Tensor) -> Tensor:
        first, last = self.layout.shapes
        h = self._projected(first, x_SI, groups, experts_S)
        y_SO = self._projected(last, self._activated(h), groups, experts_S)
        return self.post_expert_norm(y_SO) if getattr(self, "has_post_expert_norm", False) else y_SO

    def _projected(self, key: str, x_SI: Tensor, groups: Grouping, experts_S: Tensor) -> Tensor:
        y_SO, bias = getattr(self, key)(x_SI, groups), getattr(self, f"{key}_bias", None)
        return y_SO if bias is None else y_SO + bias[experts_S]

    def _activated(self, h: Tensor) -> Tensor:
        if "gate_up_proj" not in self.layout.shapes:
            return self.act_fn(h)
        if hasattr(self, "_apply_gate"):
            return self._apply_gate(h)
        gate, up = h.chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def __reduce_ex__(self, _: Any) -> Any:
        return _empty, (self.own_class,), self.__dict__


def exclude_from_compilation() -> None:
    """Have torch.compile run experts as they are: how many tokens each has is a value, known when it is there."""
    if not getattr(ExpertsForward.forward, "_torchdynamo_disable", False):
        ExpertsForward.forward = torch.compiler.disable(ExpertsForward.forward)  # type: ignore[method-assign]


def tokens_each(experts: Tensor, num_experts: int) -> list[int]:
    """How many of `experts` are each. The host waits for it, once a block."""
    return torch.bincount(experts, minlength=num_experts)[:num_experts].tolist()


class _Rows(Function):
    """Row i of the result is row order[i] // k of x. `back` is the permutation that undoes `order`, so that the
    backward gathers, too, and sums a row's k gradients in a fixed order."""

    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        (back,) = ctx.saved_tensors
        d = d.index_select(0, back)
        return d if ctx.k == 1 else d.view(-1, ctx.k, d.shape[1]).sum(1), None, None, None


@cache
def _with_our_forward(own_class: Any) -> Any:
    names = {"own_class": own_class, "__module__": own_class.__module__, "__qualname__": own_class.__qualname__}
    return type(own_class.__name__, (ExpertsForward, own_class), names)


def _empty(own_class: Any) -> Any:
    made = _with_our_forward(own_class)
    return made.__new__(made)


def own_parameter(experts: nn.Module, key: str, layout: ExpertsLayout) -> nn.Parameter:
    """The stacked matrix of a projection that `experts` still holds itself."""
    own = experts.get_parameter(key)
    return nn.Parameter(layout.stacked(own.detach()), requires_grad=False)


def complete(experts: nn.Module, layout: ExpertsLayout) -> None:
    """Hold what is left of the experts' own parameters in FrozenExperts, and compute by the projections."""
    for key in layout.shapes:
        if key in experts._parameters:
            projection = FrozenExperts(own_parameter(experts, key, layout), layout.num_experts)
            del experts._parameters[key]
            setattr(experts, key, projection)
    experts.layout = layout  # type: ignore[assignment]
    if not isinstance(experts, ExpertsForward):
        own_class: Any = type(experts)
        experts.__class__ = _with_our_forward(own_class)


@torch.no_grad()
def restore(experts: ExpertsForward) -> None:
    """Make it what it was: the merged weights as the class's own parameters."""
    layout = experts.layout
    for key in layout.shapes:
        held: Any = getattr(experts, key)
        weight = held.merged_weight() if isinstance(held, DoraExperts) else held.matrix[:]
        setattr(experts, key, nn.Parameter(layout.unstacked(weight), requires_grad=False))
    experts.__class__ = experts.own_class
    del experts.layout
