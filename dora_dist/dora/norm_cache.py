"""Norms of all layers, each rank from its own shard: one gather of the small factors, one sum, once per step.

Cost per rank: 1/N of one pass over the adapted weights, one gather of the factors that a rank does not have in
full (A, but not of experts whose number the ranks divide; for transposed weights B too) and one all-reduce of one
fp32 vector with every layer's norms. In a run, ranks that hold whole copies share the rows likewise, and gather
nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.dora.layers import Block, DoraLayer
from dora_dist.dora.norm_math import squared_norms
from dora_dist.errors import UserError
from dora_dist.parallel import fsdp, zero
from dora_dist.parallel.shards import Shards, Whole, named_generator, write_whole
from dora_dist.quant.nf4 import PackedMatrix, rows_of


def dora_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The adapted layers by name; a layer used twice stands once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DoraLayer)}


def find_shards(model: nn.Module) -> Shards:
    """The protocol's implementation for however `model` is sharded right now."""
    return fsdp.find_shards(model) or zero.find_shards(model) or Whole()


@torch.no_grad()
def refresh_norms(
    model: nn.Module, shards: Shards | None = None, found: Sequence[DoraLayer] | None = None
) -> None:
    """Recompute the cached norm of every DoRA layer from the local shards.

    Two collectives whatever the number of layers; none where weights are whole, or one where `shards` divides the
    rows of copies. Every rank must call it, and never between a forward and its backward. Call it after writing to
    weights, A or B by hand; after an optimizer step, `load_adapter` or `merge_adapter` it has been called.
    `found`: the model's layers, where they have been looked for.
    """
    shards = shards or find_shards(model)
    layers = [each for each in found or dora_layers(model).values() if each.magnitude is not None]
    if not layers:
        return
    shards.reshard(model)
    shards = shards.split_rows()
    factors = _gather_factors(layers, shards)
    norms = [layer.norm for layer in layers if layer.norm is not None]
    flat = torch.zeros(sum(n.numel() for n in norms), dtype=_widest(norms), device=norms[0].device)
    parts = flat.split([n.numel() for n in norms])
    for layer, part in zip(layers, parts, strict=True):
        _add_own_part(layer, part, factors, shards)
    shards.sum_(flat)
    flat.sqrt_()
    for layer, part in zip(layers, parts, strict=True):
        layer.renew_norm(part)


def cache_norms(model: nn.Module, shards: Shards | None = None) -> None:
    """Compute the norms of `model` now and use them in every forward, until `refresh_norms` renews them.

    A state dict that is loaded into a layer makes it compute in the forward until then.
    """
    refresh_norms(model, shards)
    for layer in dora_layers(model).values():
        layer.norm_is_cached = True


def attach_norm_refresh(model: nn.Module, optimizer: object | None, shards: Shards | None = None) -> None:
    """`cache_norms`, and renew them after each step that changes parameters (None: nothing trains the model).

    Exact, because a norm changes only when A or B does. After writing to parameters by hand call
    `refresh_norms(model)`.

    Args:
        optimizer: torch's, DeepSpeed's engine or optimizer, or what accelerate or Lightning made of one of these.

    Raises:
        UserError: `optimizer` is none of these; the model belongs to a DeepSpeed engine, but `optimizer` is not of
            that engine (told at its first step, where the engine comes later); or the engine rounds magnitudes.
    """

    layers, stepping = list(dora_layers(model).values()), _what_steps(optimizer)

    def refresh(*_: object) -> None:
        _require_engine(model, stepping)
        refresh_norms(model, shards, layers)

    _require_engine(model, stepping)
    if isinstance(stepping, torch.optim.Optimizer):
        stepping.register_step_post_hook(refresh)
        for name in ("train", "eval"):  # of schedule-free ones they change the parameters
            _follow(stepping, name, refresh)
    elif stepping is not None:
        zero.after_each_step(stepping, refresh)
    cache_norms(model, shards)  # last: of what is refused above no norm may stay


def _follow(optimizer: Any, name: str, refresh: Callable[[], None]) -> None:
    swap: Callable | None = getattr(optimizer, name, None)
    if swap is None:
        return

    def swap_and_refresh(*args: Any, **options: Any) -> Any:
        done = swap(*args, **options)
        refresh()
        return done

    setattr(optimizer, name, swap_and_refresh)


def _what_steps(given: object | None) -> object | None:
    """What changes the parameters, behind its wrappers. accelerate's passes for a torch optimizer, but calls no
    hooks; nor is it called where a scaler skips the step."""
    found = given
    for _ in range(4):  # wrappers around each other
        hooked = isinstance(found, torch.optim.Optimizer) and hasattr(found, "_optimizer_step_post_hooks")
        if found is None or hooked or zero.takes_steps(found):
            break
        found = getattr(found, "engine", None) or getattr(found, "optimizer", None)
    else:
        found = None
    if found is None and given is not None:
        raise UserError(
            f"attach_norm_refresh: a {type(given).__name__} takes no steps that can be followed; pass the torch "
            "optimizer, what accelerate or Lightning made of it, or DeepSpeed's engine"
        )
    return found


def _require_engine(model: nn.Module, stepping: object) -> None:
    if isinstance(stepping, torch.optim.Optimizer) and zero.is_managed(model):
        raise UserError(
            "attach_norm_refresh: DeepSpeed trains this model; call it after deepspeed.initialize, with the "
            "engine in the optimizer's place"
        )


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int, shards: Shards | None = None) -> None:
    """Fresh A and B, and m = n by the very arithmetic that makes the forward's norm: step 0 is the base model.

    A layer's values depend on the seed and its name alone, so every strategy and world size starts alike.
    """
    shards = shards or find_shards(model)
    shards.reshard(model)
    for name, layer in dora_layers(model).items():
        if layer.lora_A is not None and layer.lora_B is not None:
            A, B = layer.initial_factors(named_generator(seed, name))
            write_whole(layer.lora_A, A, shards)
            write_whole(layer.lora_B, B, shards)
    refresh_norms(model, shards)
    for layer in dora_layers(model).values():
        if layer.magnitude is not None and layer.norm is not None:
            write_whole(layer.magnitude, layer.norm, shards)


def _gather_factors(layers: list[DoraLayer], shards: Shards) -> dict[Tensor, Tensor]:
    """The whole A's and B's that this rank needs for its rows, by one collective."""
    wanted = list(dict.fromkeys(p for layer in layers for p in factors_needed_whole(layer, shards)))
    return dict(zip(wanted, shards.gather(wanted), strict=True)) if wanted else {}


def factors_needed_whole(layer: DoraLayer, shards: Shards) -> Iterator[nn.Parameter]:
    """B where a rank's rows of it are not those of its weight; A unless these are whole experts."""
    here = not layer.transposed
    parts = ((layer.lora_B, layer.num_experts * layer.out_features), (layer.lora_A, layer.num_experts))
    for factor, groups in parts:
        if factor is not None:
            here = here and shards.rows_aligned(layer.weight, factor, groups)
            if not here:
                yield factor


def _add_own_part(layer: DoraLayer, part: Tensor, whole: dict[Tensor, Tensor], shards: Shards) -> None:
    """Add the squared norms of this rank's rectangles of one layer to `part`."""
    scaling, dim = layer.spec.scaling, layer.magnitude_dim
    for own, block, cols, L_NR, U_RK in own_blocks(layer, whole, shards):
        part[block.norms(dim, cols)] += squared_norms(own, L_NR, U_RK, scaling, dim, part.device)


def own_blocks(
    layer: DoraLayer, whole: dict[Tensor, Tensor], shards: Shards
) -> Iterator[tuple[Tensor | PackedMatrix, Block, slice, Tensor | None, Tensor | None]]:
    """What counts of this rank's part of a weight M, block by block: rows of M, which ones and which columns, and
    the L and U of M + s L U there. `whole`: the factors needed whole."""
    for matrix, rows, cols in layer.own_rows(shards) if shards.owns(layer.weight) else ():
        for block in blocks(layer, rows):
            L_NR, U_RK = _own_factors(layer, block, whole, shards)
            own = rows_of(matrix, slice(block.rows.start - rows.start, block.rows.stop - rows.start))
            yield own, block, cols, L_NR, None if U_RK is None else U_RK[:, cols]


def blocks(layer: DoraLayer, rows: slice) -> list[Block]:
    """What is gone through one after the other, of these rows of a weight; a rehearsal takes some for all."""
    return layer.blocks(rows)


def _own_factors(
    layer: DoraLayer, block: Block, whole: dict[Tensor, Tensor], shards: Shards
) -> tuple[Tensor | None, Tensor | None]:
    """(L, U) of a block of this rank's rows."""
    if layer.lora_A is None or layer.lora_B is None:
        return None, None
    if layer.transposed:
        L_NR, U_RK = layer.stored_factors(whole[layer.lora_A], whole[layer.lora_B])
        return L_NR[block.rows], U_RK
    B_NR = _rows_of_factor(layer.lora_B, block.rows, whole, shards)
    return B_NR, _rows_of_factor(layer.lora_A, block.ranks, whole, shards)


def _rows_of_factor(factor: nn.Parameter, rows: slice, whole: dict[Tensor, Tensor], shards: Shards) -> Tensor:
    if factor in whole:
        return whole[factor][rows]
    (own,) = shards.rectangles(factor)
    return own.values[rows.start - own.row : rows.stop - own.row]


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
