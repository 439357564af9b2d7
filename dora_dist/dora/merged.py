"""Whole weights from what ranks hold: each lays its own part into zeros, merged where it is adapted, and all are
summed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_cache import factors_needed_whole, own_blocks
from dora_dist.dora.norm_math import merge_, norm_ratio
from dora_dist.parallel.shards import Shards, Whole, as_matrix
from dora_dist.quant.modules import BaseWeight
from dora_dist.quant.nf4 import TILE_ELEMENTS, PackedMatrix, pieces


@torch.no_grad()
def merged_weight(layer: DoraLayer, shards: Shards) -> Tensor:
    """(m/n) * (W + s B A) of a layer whose norm is fresh, whole on every rank, as the weight is stored. Takes two
    collectives and, besides the result, a tile."""
    wanted: list[Tensor] = [*factors_needed_whole(layer, shards)]
    wanted += [] if layer.magnitude is None else [layer.magnitude]
    whole = dict(zip(wanted, shards.gather(wanted), strict=True))
    shape = shards.shape(layer.weight) if layer.layout is None else layer.layout.shape
    merged, dim, ratio = _zeros(shape, layer.base_dtype, layer.weight, shards), layer.magnitude_dim, None
    if layer.magnitude is not None and layer.norm is not None:
        ratio = norm_ratio(whole[layer.magnitude].to(merged.device), layer.norm.to(merged.device))
    for own, block, cols, L_NR, U_RK in own_blocks(layer, whole, shards):
        place = merged[block.rows, cols]
        _copy(own, place)
        L_NR, U_RK = (None if t is None else t.to(merged.device) for t in (L_NR, U_RK))
        merge_(
            place, L_NR, U_RK, layer.spec.scaling, None if ratio is None else ratio[block.norms(dim, cols)], dim
        )
    return _summed(merged, shards)


@torch.no_grad()
def whole_tensor(tensor: Tensor, held: BaseWeight | None, dtype: torch.dtype, shards: Shards) -> Tensor:
    """What is not adapted, in `dtype`, in the same way. `held`: where it is in 4 bits, the layer that has it."""
    own: Iterable[tuple[Tensor | PackedMatrix, slice, slice]] = ()
    if shards.owns(tensor):
        own = held.own_rows(shards) if held else ((r.values, r.rows, r.cols) for r in shards.rectangles(tensor))
    shape = shards.shape(tensor) if held is None or held.layout is None else held.layout.shape
    whole = _zeros(shape, dtype, tensor, shards)
    for values, rows, cols in own:
        _copy(values, as_matrix(whole)[rows, cols])
    return _summed(whole, shards)


def _zeros(shape: Iterable[int], dtype: torch.dtype, like: Tensor, shards: Shards) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=like.device if isinstance(shards, Whole) else shards.device)


def _copy(own: Tensor | PackedMatrix, place: Tensor) -> None:
    """A tile at a time: of what is in 4 bits no more is dense."""
    for rows in pieces(slice(0, own.shape[0]), max(1, TILE_ELEMENTS // max(1, own.shape[1]))):
        place[rows] = own[rows]


def _summed(whole: Tensor, shards: Shards) -> Tensor:
    """Their bytes: exact for any dtype."""
    shards.sum_(whole.view(-1).view(torch.uint8))
    return whole
