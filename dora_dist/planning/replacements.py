"""All that a rehearsal replaces in torch, in DeepSpeed and in this package, and what stands there instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from dora_dist.dora import norm_math, products
from dora_dist.models import weights
from dora_dist.planning.fake_group import every_rank_alike, ignore_moves, shapes_uncounted
from dora_dist.planning.patches import Patches
from dora_dist.planning.trace import Tracer
from dora_dist.quant import modules

# What goes through a weight or an activation piece by piece holds the same for each.
_PIECES = (
    (modules, "pieces"), (weights, "_pieces"), (norm_math, "row_tiles"), (products, "row_tiles"),
    (products, "token_tiles"),
)  # fmt: skip


@contextmanager
def replacements(
    model: nn.Module, strategy: str, tracer: Tracer, gpu: bool = True, every_piece: bool = False
) -> Iterator[Patches]:
    """Around a rehearsal of `model`. Without `every_piece` it goes through the first piece of a weight alone.

    Raises:
        LookupError: something is not there, or was replaced in vain.
    """
    with Patches() as patches:
        if gpu:
            patches.replace(F, "scaled_dot_product_attention", _without_dropout)
        for module, name in () if every_piece else _PIECES:
            patches.replace(module, name, _first_of)
        every_rank_alike(patches, zero=strategy.startswith("zero"))
        ignore_moves(patches, model)
        patches.replace(torch, "compile", _uncompiled)
        shapes_uncounted(patches, tracer.paused, needed=strategy == "fsdp")
        tracer.follow_resizes(patches)
        yield patches
        patches.check()


def _uncompiled(_: Callable) -> Callable:
    """Of a library that decorates functions with torch.compile: nothing here computes, and inductor's import takes
    longer than a step."""
    return lambda model=None, **_: model or (lambda function: function)


def _without_dropout(attend: Callable) -> Callable:
    """GPUs' kernels drop without holding what they drop; a CPU's attention would fall back to its definition."""
    return lambda *arguments, dropout_p=0.0, **options: attend(*arguments, **options)


def _first_of(pieces: Callable) -> Callable:
    return lambda *arguments: list(islice(pieces(*arguments), 1))
