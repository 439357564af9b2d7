"""Modules that hold a frozen weight, dense or in 4 bits: the base of DoRA's layers, and a linear layer that is not
adapted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dora_dist.device import wide_dtype
from dora_dist.parallel.shards import Shards
from dora_dist.quant.kernels import dequantize
from dora_dist.quant.nf4 import TILE_ELEMENTS, Nf4, PackedMatrix, pieces, quantize

_PARTS = ("weight", "weight_scales", "weight_ranges")


class BaseWeight(nn.Module):
    """What holds a frozen weight: dense in `weight`, or in 4 bits in `weight`, `weight_scales` and `weight_ranges`
    (the parts of nf4.py, whose `layout` says what they stand for)."""

    weight: nn.Parameter
    weight_scales: nn.Parameter | None
    weight_ranges: nn.Parameter | None
    layout: Nf4 | None = None
    transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight_scales", None)
        self.register_parameter("weight_ranges", None)

    def pack(self, layout: Nf4) -> None:
        """Hold the weight in 4 bits from now on. Real values are quantized, those on the meta device left open."""
        parts = layout.empty(self.weight.device)
        if not self.weight.is_meta:
            filled = max(0, layout.stored_rows - layout.rows)
            parts = [F.pad(part, (0, 0, 0, filled)) for part in quantize(self.weight.detach(), layout)]
        self.layout = layout
        for name, part in zip(_PARTS, parts, strict=False):
            setattr(self, name, nn.Parameter(part, requires_grad=False))

    def hold(self, other: "BaseWeight") -> None:
        """Another's weight, as it is stored."""
        self.layout = other.layout
        for name in _PARTS:
            setattr(self, name, getattr(other, name))

    def without_values(self) -> nn.Parameter:
        """A parameter of the shape, dtype and device that the weight stands for, which takes no memory."""
        shape = self.weight.shape if self.layout is None else self.layout.shape
        empty = torch.empty(1, dtype=self.base_dtype, device=self.weight.device)
        return nn.Parameter(empty.expand(shape), requires_grad=False)

    @property
    def weight_parts(self) -> list[nn.Parameter]:
        parts = (self.weight, self.weight_scales, self.weight_ranges)
        return [part for part in parts if part is not None]

    @property
    def matrix(self) -> Tensor | PackedMatrix:
        """The weight as something to read by rows."""
        return self.weight if self.layout is None else PackedMatrix(self.weight_parts, self.layout)

    def own_rows(self, shards: Shards) -> list[tuple[Tensor | PackedMatrix, slice, slice]]:
        """What this rank holds of the weight: matrices to read by rows, and which rows and columns each is."""
        if self.layout is None:
            return [(own.values, own.rows, own.cols) for own in shards.rectangles(self.weight)]
        found: list[tuple[Tensor | PackedMatrix, slice, slice]] = []
        for owns in zip(*(shards.rectangles(part) for part in self.weight_parts), strict=True):
            rows = slice(owns[0].row, min(owns[0].rows.stop, self.layout.rows))  # without what fills up
            assert all(own.rows == owns[0].rows and own.col == 0 for own in owns), (
                "a 4-bit weight is split by rows"
            )
            if rows.start < rows.stop:
                parts = [own.values[: rows.stop - rows.start] for own in owns]
                found.append((PackedMatrix(parts, self.layout), rows, slice(0, self.layout.columns)))
        return found

    def write_rows(
        self, shards: Shards, read: Callable[[slice], Tensor], device: torch.device | None = None
    ) -> None:
        """Quantize this rank's rows, which `read` gives, into its part of the weight, a few at a time. `device` is
        where to compute when the weight lies elsewhere."""
        assert self.layout is not None
        step = max(1, TILE_ELEMENTS // self.layout.columns)
        for matrix, rows, _ in self.own_rows(shards):
            assert isinstance(matrix, PackedMatrix)
            for piece in pieces(rows, step):
                made = quantize(read(piece).to(device or matrix.device), self.layout)
                for part, values in zip(matrix.parts, made, strict=True):
                    part[piece.start - rows.start : piece.stop - rows.start] = values
        for part in self.weight_parts:
            shards.after_write(part)

    def _kept_wide(self) -> list[Tensor]:
        """What stays fp32 under `model.to(dtype)`: scales, and what a subclass trains."""
        return [] if self.layout is None else [part for part in self.weight_parts if part.is_floating_point()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseWeight":
        kept = self._kept_wide()

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = wide_dtype(moved.dtype)
            if moved.dtype != wide and any(tensor is t or tensor is t.grad for t in kept):
                return tensor.to(moved.device, wide)
            return moved

        super()._apply(keep_wide, recurse)
        if self.layout is not None:  # codes do not say what they stand for
            dtype = fn(torch.empty(0, dtype=self.layout.dtype, device=self.weight.device)).dtype
            self.layout = replace(self.layout, dtype=dtype)
        return self

    @property
    def base_dtype(self) -> torch.dtype:
        """What the weight stands for."""
        return self.weight.dtype if self.layout is None else self.layout.dtype

    def _require_whole(self) -> None:
        if hasattr(self.weight, "placements") or self.weight.dim() != 2:
            raise RuntimeError(
                "this layer's weight is sharded, so the layer cannot run by itself: call the model (the "
                "module that was sharded), which gathers weights around its forward"
            )


def dense(
    parts: Sequence[Tensor], layout: Nf4 | None, transposed: bool, row_factors: Tensor | None = None
) -> Tensor:
    """W_IO of a weight that is stored dense (one part) or in 4 bits, whose rows come times `row_factors`."""
    weight = parts[0] if layout is None else dequantize(parts, layout, row_factors)
    return weight if transposed else weight.t()


class _FrozenLinear(Function):
    """y_TO = x W^T + bias of a 4-bit weight. Keeps its parts alone."""

    @staticmethod
    def forward(ctx, x_TI, bias, transposed, layout, *parts):
        W_IO = dense(parts, layout, transposed)
        ctx.save_for_backward(*parts)
        ctx.transposed, ctx.layout = transposed, layout
        return x_TI @ W_IO if bias is None else torch.addmm(bias, x_TI, W_IO)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        parts = ctx.saved_tensors  # once: checkpointing gives them once
        dx_TI = dy_TO @ dense(parts, ctx.layout, ctx.transposed).t() if ctx.needs_input_grad[0] else None
        dbias = dy_TO.sum(0) if ctx.needs_input_grad[1] else None
        return dx_TI, dbias, *[None] * (2 + len(parts))


def frozen_linear(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, layout: Nf4 | None, transposed: bool = False
) -> Tensor:
    """x W^T + bias, where no gradient goes to W; x is [..., I], in the weight's dtype."""
    y_TO = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), bias, transposed, layout, *parts)
    return y_TO if x.dim() == 2 else y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


class PackedLinear(BaseWeight):
    """A linear layer over a frozen 4-bit weight, not adapted. `transposed` is Conv1D's layout."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, layout: Nf4, transposed: bool = False):
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = reversed(weight.shape) if transposed else weight.shape
        self.weight, self.bias = weight, bias
        self.pack(layout)

    def forward(self, x: Tensor) -> Tensor:
        self._require_whole()
        return frozen_linear(x, self.weight_parts, self.bias, self.layout, self.transposed)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, 4 bits"


Spans = Sequence[tuple[int, slice]]


class Grouping:
    """Rows of tokens sorted by the expert that they go to; last those that go to none."""

    num_experts: int
    spans: Spans  # an expert, and the rows of its tokens; one without tokens stands in no span

    @property
    def most(self) -> int:
        """Tokens of the expert that has most of them."""
        return max((tokens.stop - tokens.start for _, tokens in self.spans), default=0)

    def clear_rest(self, values_SN: Tensor | None) -> None:
        """Zeros for tokens that go to no expert."""
        routed = self.spans[-1][1].stop if self.spans else 0
        if values_SN is not None and routed < values_SN.shape[0]:
            values_SN[routed:] = 0

    def part(self, stacked: Tensor, expert: int) -> Tensor:
        """An expert's rows of what has equally many for each."""
        size = stacked.shape[0] // self.num_experts
        return stacked[expert * size : (expert + 1) * size]

    def parts(self, weight: Sequence[Tensor], layout: Nf4 | None, expert: int) -> list[Tensor]:
        """The same of a weight, which may have rows that fill it up."""
        return [self.part(part if layout is None else part[: layout.rows], expert) for part in weight]

    def shape(self, weight: Sequence[Tensor], layout: Nf4 | None) -> tuple[int, int]:
        """(out, in) of one expert."""
        rows, columns = weight[0].shape if layout is None else layout.shape
        return rows // self.num_experts, columns


@dataclass(frozen=True)
class Groups(Grouping):
    """What the host knows of them."""

    num_experts: int
    spans: Spans

    @classmethod
    def of(cls, counts: Sequence[int]) -> "Groups":
        """From the number of tokens of each expert."""
        stops = accumulate(counts)
        found = ((e, slice(stop - n, stop)) for e, (n, stop) in enumerate(zip(counts, stops, strict=True)) if n)
        return cls(len(counts), tuple(found))


class _FrozenExperts(Function):
    """y_SO = x W_e^T for the tokens of each expert e. Keeps the weight's parts alone."""

    @staticmethod
    def forward(ctx, x_SI, layout, groups, *parts):
        ctx.save_for_backward(*parts)
        ctx.layout, ctx.groups = layout, groups
        y_SO = x_SI.new_empty(x_SI.shape[0], groups.shape(parts, layout)[0])
        for expert, tokens in groups.spans:
            W_IO = dense(groups.parts(parts, layout, expert), layout, transposed=False)
            torch.mm(x_SI[tokens], W_IO, out=y_SO[tokens])
        groups.clear_rest(y_SO)
        return y_SO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SO):
        parts, layout, groups = ctx.saved_tensors, ctx.layout, ctx.groups
        dx_SI = dy_SO.new_empty(dy_SO.shape[0], groups.shape(parts, layout)[1])
        for expert, tokens in groups.spans:
            W_IO = dense(groups.parts(parts, layout, expert), layout, transposed=False)
            torch.mm(dy_SO[tokens], W_IO.t(), out=dx_SI[tokens])
        groups.clear_rest(dx_SI)
        return dx_SI, *[None] * (2 + len(parts))


def frozen_experts(held: BaseWeight, x_SI: Tensor, groups: Grouping) -> Tensor:
    """x sorted by expert -> [S, out], each row by its own expert's weight, to which no gradient goes."""
    held._require_whole()
    return _FrozenExperts.apply(x_SI.to(held.base_dtype), held.layout, groups, *held.weight_parts)


class FrozenExperts(BaseWeight):
    """One projection of a mixture's experts, not adapted. `weight` is [E out, in], dense or in 4 bits: row
    e out + o is output feature o of expert e."""

    def __init__(self, weight: nn.Parameter, num_experts: int):
        super().__init__()
        self.weight, self.num_experts = weight, num_experts
        self.out_features, self.in_features = weight.shape[0] // num_experts, weight.shape[1]

    def forward(self, x_SI: Tensor, groups: Grouping) -> Tensor:
        """x sorted by expert -> [S, out], each row by its own expert's weight."""
        return frozen_experts(self, x_SI, groups)

    def extra_repr(self) -> str:
        bits = "" if self.layout is None else ", 4 bits"
        return f"{self.num_experts} x ({self.in_features}, {self.out_features}){bits}"
