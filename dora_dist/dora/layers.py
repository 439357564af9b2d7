"""DoraLinear and DoraEmbedding: thin modules over the functions of functional.py. They know no distribution.

A layer owns the frozen `weight`, the trained `lora_A`, `lora_B` and `magnitude`, and a norm buffer that is
not saved. By itself it computes its norm in every forward: slow, never stale. `cache_norms` (norm_cache.py) sets
`norm_is_cached`; then the trainer, or `attach_norm_refresh` in a loop of your own, renews the buffer after each
optimizer step. This is exact because the norm depends on weight, A and B alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_dist.device import wide_dtype
from dora_dist.dora.functional import adapted_embedding, adapted_linear
from dora_dist.dora.norm_math import merge_, norm_ratio, norm_with_gradient, squared_norms
from dora_dist.quant.modules import BaseWeight, frozen_linear
from dora_dist.quant.nf4 import Nf4, PackedMatrix, rows_of


@dataclass(frozen=True)
class AdapterSpec:
    """What one layer's adapter is. `rank` 0: the magnitude alone is trained. `magnitude` False: LoRA."""

    rank: int
    scaling: float
    dropout: float = 0.0
    magnitude: bool = True
    axis: str = "out"
    norm_gradient: str = "detached"
    init: str = "kaiming"


@dataclass(frozen=True)
class Block:
    """Rows of a stored weight that one low-rank product is added to: a layer's, or one expert's."""

    rows: slice
    ranks: slice  # the rows of A
    start: int  # where the norms of its columns begin, among the layer's

    def norms(self, dim: int, columns: slice) -> slice:
        """Where the norms along `dim` of these columns of it lie."""
        return self.rows if dim == 0 else slice(self.start + columns.start, self.start + columns.stop)


class DoraLayer(BaseWeight):
    """What DoraLinear, DoraEmbedding and DoraExperts share.

    `weight` is [out, in], or [in, out] where `transposed` (Conv1D, embeddings: in = vocabulary). A is
    [r, in], B [out, r], magnitude [out] or [in] by the spec's axis. A, B, magnitude and norm are fp32 (fp64
    for an fp64 weight) and stay so under `model.to(dtype)`.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    magnitude: nn.Parameter | None
    bias: nn.Parameter | None
    norm: Tensor | None
    num_experts = 1  # matrices that the weight holds, one below the other
    base_alone = False  # set by adapters_off

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, spec: AdapterSpec):
        super().__init__()
        self.spec = spec
        self.weight, self.bias = weight, bias
        for p in (weight, bias):
            if p is not None:
                p.requires_grad_(False)
        rows, self.in_features = reversed(weight.shape) if self.transposed else weight.shape
        self.out_features = rows // self.num_experts

        def trained(*shape: int) -> nn.Parameter:
            shape = (self.num_experts * shape[0], *shape[1:])
            return nn.Parameter(torch.zeros(*shape, dtype=wide_dtype(weight.dtype), device=weight.device))

        self.lora_A = trained(spec.rank, self.in_features) if spec.rank else None
        self.lora_B = trained(self.out_features, spec.rank) if spec.rank else None
        features = self.out_features if spec.axis == "out" else self.in_features
        self.magnitude = trained(features) if spec.magnitude else None
        norm = torch.zeros_like(self.magnitude, requires_grad=False) if self.magnitude is not None else None
        self.register_buffer("norm", norm, persistent=False)
        self.norm_is_cached = False  # set by cache_norms
        self._norm_is_stale = True
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def magnitude_dim(self) -> int:
        """The dimension of the stored weight that the magnitude runs along."""
        return int(self.transposed == (self.spec.axis == "out"))

    def stored_factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(L, U) with V = weight + s L U in the weight's stored orientation."""
        return (A.t(), B.t()) if self.transposed else (B, A)

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """This layer's own (L, U), or Nones where the magnitude alone is trained."""
        if self.lora_A is None or self.lora_B is None:
            return None, None
        return self.stored_factors(self.lora_A, self.lora_B)

    def blocks(self, rows: slice | None = None) -> list[Block]:
        """What `rows` of the stored weight (None: all) consist of."""
        all_rows = slice(0, self.in_features if self.transposed else self.out_features)
        return [Block(rows or all_rows, slice(0, self.spec.rank), 0)]

    def block_factors(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """This layer's own (L, U) of each of its `blocks()`."""
        return [self.factors]

    def initial_factors(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Fresh (A, B), whole, on the generator's device (CPU), B A = 0."""
        dtype = wide_dtype(self.base_dtype)
        A = torch.empty(self.num_experts * self.spec.rank, self.in_features, dtype=dtype)
        if self.spec.init == "gaussian":
            nn.init.normal_(A, std=1 / self.spec.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return A, torch.zeros(self.num_experts * self.out_features, self.spec.rank, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh A and B, and the magnitude that makes the layer equal its base. Needs whole, real weights."""
        if self.lora_A is not None and self.lora_B is not None:
            A, B = self.initial_factors()
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        if self.magnitude is not None:
            self.magnitude.copy_(self.current_norm())
        self.mark_norm_stale()

    @torch.no_grad()
    def current_norm(self) -> Tensor:
        """The norm of V, computed here from whole weights."""
        self._require_whole()
        return self.norm_over(self.matrix)

    @torch.no_grad()
    def norm_over(self, matrix: Tensor | PackedMatrix) -> Tensor:
        """The norm of V with `matrix` in the weight's place."""
        scaling, dim = self.spec.scaling, self.magnitude_dim
        squares = [
            squared_norms(rows_of(matrix, block.rows), L, U, scaling, dim)
            for block, (L, U) in zip(self.blocks(), self.block_factors(), strict=True)
        ]
        return (squares[0] if len(squares) == 1 else torch.cat(squares)).sqrt_()

    def renew_norm(self, norm: Tensor) -> None:
        assert self.norm is not None
        self.norm.copy_(norm)
        self._norm_is_stale = False

    def mark_norm_stale(self) -> None:
        """Until the next refresh the norm is computed in each forward."""
        self._norm_is_stale = True

    def _norm_for_forward(self) -> Tensor | None:
        if self.magnitude is None:
            return None
        norm = self.norm if self.norm_is_cached and not self._norm_is_stale else self.current_norm()
        assert norm is not None
        if self.magnitude.dtype != norm.dtype:
            raise RuntimeError(
                f"the magnitude came into the forward as {self.magnitude.dtype}, which rounds it (FSDP2's "
                "MixedPrecisionPolicy(param_dtype=...) does, and DeepSpeed's sections bf16 and fp16); leave them "
                "unset: the layer mixes precisions"
            )
        if self.spec.norm_gradient == "exact" and self.lora_A is not None and torch.is_grad_enabled():
            norm = self._with_gradient(norm)
        return norm

    def _with_gradient(self, norm: Tensor) -> Tensor:
        dim, found = self.magnitude_dim, []
        for block, (L, U) in zip(self.blocks(), self.block_factors(), strict=True):
            assert L is not None and U is not None
            own = norm[block.norms(dim, slice(0, U.shape[1]))]
            parts = [part[block.rows] for part in self.weight_parts]
            found.append(norm_with_gradient(own, parts, L, U, self.spec.scaling, dim, self.layout))
        return found[0] if len(found) == 1 else torch.cat(found)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """(m/n) * (W + s B A) in the weight's dtype and orientation, a new tensor."""
        self._require_whole()
        merged = self.matrix[:].detach().clone()
        self.merge_into(
            merged, norm_ratio(self.magnitude, self.current_norm()) if self.magnitude is not None else None
        )
        return merged

    @torch.no_grad()
    def merge_into(self, weight: Tensor, ratio: Tensor | None) -> None:
        """Write (m/n) * (W + s B A) over a dense W that lies as the layer's does; `ratio`: m/n."""
        dim = self.magnitude_dim
        for block, (L, U) in zip(self.blocks(), self.block_factors(), strict=True):
            own = None if ratio is None else ratio[block.norms(dim, slice(0, weight.shape[1]))]
            merge_(weight[block.rows], L, U, self.spec.scaling, own, dim)

    def _computes_base(self) -> bool:
        """Whether the base alone. Never for a backward: checkpointing would recompute it with the adapters on."""
        if self.base_alone and torch.is_grad_enabled():
            raise RuntimeError("inside of adapters_off nothing is differentiated: call backward() outside of it")
        return self.base_alone

    def _in_compute_dtype(self, x: Tensor, *more: Any) -> Tensor:
        """`_adapted` of x, and of the weight, in the weight's dtype or, under autocast, in autocast's."""
        self._require_whole()
        if not torch.is_autocast_enabled(x.device.type):
            return self._adapted(x, list(self.weight_parts), self.layout, *more)
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            if self.layout is None:
                return self._adapted(x.to(dtype), [self.weight.to(dtype)], None, *more)
            return self._adapted(x.to(dtype), list(self.weight_parts), replace(self.layout, dtype=dtype), *more)

    def _adapted(self, x: Tensor, parts: list[Tensor], layout: Nf4 | None, *more: Any) -> Tensor:
        raise NotImplementedError

    def _trained(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """A, B, the magnitude and the norm of a forward."""
        return self.lora_A, self.lora_B, self.magnitude, self._norm_for_forward()

    @property
    def _dropout(self) -> float:
        return self.spec.dropout if self.training else 0.0

    def _kept_wide(self) -> list[Tensor]:
        trained = [t for t in (self.lora_A, self.lora_B, self.magnitude, self.norm) if t is not None]
        return trained + super()._kept_wide()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoraLayer":
        dtype = self.base_dtype
        super()._apply(fn, recurse)
        if self.base_dtype != dtype:
            self.mark_norm_stale()  # a rounded weight has another norm
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.norm_is_cached = False  # the original's optimizer does not refresh a copy
        self.base_alone = False  # nor does the original's adapters_off end for it

    def extra_repr(self) -> str:
        s = self.spec
        kind = "lora" if not s.magnitude else "dora" if s.rank else "magnitude only"
        shape = f"{self.in_features}, {self.out_features}"
        return f"{shape}, {kind}, rank={s.rank}, scaling={s.scaling:g}, axis={s.axis}"


def _after_load(layer: DoraLayer, _: object) -> None:
    layer.mark_norm_stale()


class DoraLinear(DoraLayer):
    """y = (m/n) * ((W + s B A) x) + bias. Takes over `weight` and `bias` of a linear layer (no copy).

    `transposed` is Conv1D's layout: weight [in, out].
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, spec: AdapterSpec, transposed: bool = False
    ):
        self.transposed = transposed
        super().__init__(weight, bias, spec)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the weight's dtype (under autocast, in autocast's)."""
        return self._base(x) if self._computes_base() else self._in_compute_dtype(x)

    def _base(self, x: Tensor) -> Tensor:
        """To the bit what the layer was before: nn.Linear's product, Conv1D's or PackedLinear's."""
        self._require_whole()
        if self.layout is None and not self.transposed:
            return F.linear(x, self.weight, self.bias)
        return frozen_linear(x, self.weight_parts, self.bias, self.layout, self.transposed)

    def _adapted(self, x: Tensor, parts: list[Tensor], layout: Nf4 | None) -> Tensor:
        return adapted_linear(
            x,
            parts,
            *self._trained(),
            self.bias if self.bias is None else self.bias.to(x.dtype),
            scaling=self.spec.scaling,
            axis=self.spec.axis,
            transposed=self.transposed,
            dropout=self._dropout,
            layout=layout,
        )


class DoraEmbedding(DoraLayer):
    """Rows of (m/n) * (W + s (B A)^T), W [vocab, dim], A [r, vocab], B [dim, r]. Tied weights stay tied."""

    transposed = True

    def __init__(self, weight: nn.Parameter, spec: AdapterSpec, padding_idx: int | None = None):
        super().__init__(weight, None, spec)
        self.padding_idx = padding_idx  # read by some models; the frozen base needs no special case for it

    def initial_factors(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        A, B = super().initial_factors(generator)  # as in PEFT, A is the zero one: only rows seen are moved
        return A.zero_(), nn.init.normal_(B, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., dim], in the weight's dtype."""
        self._require_whole()
        if self._computes_base():
            return F.embedding(ids, self.weight)
        return adapted_embedding(
            ids,
            self.weight,
            *self._trained(),
            scaling=self.spec.scaling,
            axis=self.spec.axis,
        )
