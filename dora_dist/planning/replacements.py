"""All that a rehearsal replaces in torch, in DeepSpeed and in this package, and what stands there instead."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from dora_dist.dora import norm_math, products
from dora_dist.models import weights
from dora_dist.planning.fake_group import every_rank_alike, shapes_uncounted
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
) -> Iterator[list[str]]:
    """Around a rehearsal of `model`; the names of what is replaced. Without `every_piece` it goes through the
    first piece of a weight alone.

    Raises:
        LookupError: something is not there, or was replaced in vain.
    """
    names = []
    with ExitStack() as around:

        def replace(owner: Any, name: str, make: Callable, needed: bool = False) -> None:
            names.append(around.enter_context(replaced(owner, name, make, needed)))

        if gpu:
            replace(F, "scaled_dot_product_attention", _without_dropout)
        for module, name in () if every_piece else _PIECES:
            replace(module, name, _first_of)
        for module, name, answer in every_rank_alike(zero=strategy.startswith("zero")):
            replace(module, name, lambda _, answer=answer: answer)
        replace(model, "to", lambda _: lambda *_, **__: model)  # torch cannot swap fake parameters
        replace(torch, "compile", _uncompiled)
        replace(*shapes_uncounted(tracer.paused), needed=strategy == "fsdp")
        replace(torch.UntypedStorage, "resize_", tracer.following)
        yield names


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Callable], needed: bool = False) -> Iterator[str]:
    """What `make` makes of `owner.name` in its place; its full name. A name that another version has moved would
    be replaced in vain.

    Raises:
        LookupError: it is not there, or nothing has called it that is `needed`.
    """
    full = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not hasattr(owner, name):
        raise LookupError(f"{full} is to be replaced in a rehearsal, and is not there")
    calls, stand_in = 0, make(getattr(owner, name))

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return stand_in(*arguments, **options)

    with mock.patch.object(owner, name, counted):
        yield full
    if needed and not calls:
        raise LookupError(f"{full} was replaced in a rehearsal, and nothing called it")


def _uncompiled(_: Callable) -> Callable:
    """Of a library that decorates functions with torch.compile: nothing here computes, and inductor's import takes
    longer than a step."""
    return lambda model=None, **_: model or (lambda function: function)


def _without_dropout(attend: Callable) -> Callable:
    """GPUs' kernels drop without holding what they drop; a CPU's attention would fall back to its definition."""
    return lambda *arguments, dropout_p=0.0, **options: attend(*arguments, **options)


def _first_of(pieces: Callable) -> Callable:
    return lambda *arguments: list(islice(pieces(*arguments), 1))
