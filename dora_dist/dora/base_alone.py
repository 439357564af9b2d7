"""The base model out of an injected one, for as long as it is needed: a reference that takes no memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dora_dist.dora.inject import injection_of
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.errors import UserError


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, every DoRA layer of an injected `model` computes its base alone, under `torch.no_grad()`.

    The output is the base model's to the bit, without the adapters' dropout; only experts in one parameter are
    summed in an order of ours. Works on shards, in 4 bits and compiled, without communication; where the model is
    sharded, every rank enters. Contexts nest, and end with an exception, too.

    Raises:
        UserError: modules are trained in full; what they were before is not kept.
        RuntimeError: inside, a forward with gradients or one that activation checkpointing repeats.
    """
    saved = injection_of(model).saved
    if saved:
        names = ", ".join(map(repr, saved))
        raise UserError(
            f"adapters_off: {names} (dora.modules_to_save) are trained in full and not kept as they were; "
            "leave them out, or load the base a second time"
        )
    layers = list(dora_layers(model).values())
    before = [layer.base_alone for layer in layers]
    for layer in layers:
        layer.base_alone = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, alone in zip(layers, before, strict=True):
            layer.base_alone = alone
