"""Causal attention during training, without a mask: over whole rows, or over each packed document by itself.

transformers asks its models' attention for a function by name (AttentionInterface) and makes masks for the names
it knows. Inside `CausalAttention.over` a model goes by a name of ours, for which no mask is made:

- packed rows need no mask of T x T entries per row, which costs memory and keeps SDPA from its flash kernels;
- plain rows do not make the host wait: transformers would read the position ids back to look for packed documents.

Padding is at the right, where causal attention never looks. Outside of `over` (generation, a user's own calls) the
model is as transformers made it. The lengths of the documents are known on the host and lie in a variable of this
module, not in an argument: so they reach every model, and every recomputation, on whatever thread it runs.

Legend: B rows, N heads (M of keys and values), T positions, D features of a head.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.device import gpu_is_rehearsed, is_gpu, to_device

_NAME = "sdpa_causal_documents"
_packed: "_Packed | None" = None  # of the micro-batch in work


class CausalAttention:
    """Switches a causal language model of transformers to attention without masks."""

    def __init__(self, model: nn.Module):
        from transformers import AttentionInterface, PretrainedConfig

        AttentionInterface.register(_NAME, _attend)
        found = [getattr(module, "config", None) for module in model.modules()]
        self._configs = list({id(c): c for c in found if isinstance(c, PretrainedConfig)}.values())

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model runs SDPA through transformers' interface, with transformers' masks, causal over all
        of a row."""
        config = model.config.get_text_config()
        source = sys.modules[_own_type(model).__module__]
        return (
            model.config._attn_implementation == "sdpa"
            and model._supports_attention_backend
            and hasattr(source, "create_causal_mask")
            and "allow_is_causal_skip" not in inspect.getsource(source)  # Doge adds to a mask that must be there
            and getattr(config, "is_causal", True)
            and not has_windows(model.config)
        )

    @contextmanager
    def over(self, lengths: Sequence[Sequence[int]] | None) -> Iterator[None]:
        """Around the forward and the backward of a micro-batch. `lengths`: of each row's documents, in their
        order; what follows them is padding. None: each row is one document."""
        global _packed
        before = [config._attn_implementation for config in self._configs]
        _packed = _Packed(lengths) if lengths is not None else None
        try:
            for config in self._configs:
                config._attn_implementation = _NAME
            yield
            if _packed is not None and not _packed.used:
                raise RuntimeError(
                    "this model's attention does not go by documents; train it without data.packing"
                )
        finally:
            _packed = None
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name


def _own_type(model: nn.Module) -> type:
    """The class that transformers wrote: `fully_shard` makes one on top of it."""
    return next(kind for kind in type(model).__mro__ if "modeling" in kind.__module__)


def has_windows(config: Any) -> bool:
    """Whether some layer of a transformers model does not look at the whole row."""
    config = config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    layers = getattr(config, "layer_types", None) or ()
    return any(w for w in (*windows, *layers) if w != "full_attention")


class _Packed:
    """The documents of one micro-batch."""

    def __init__(self, lengths: Sequence[Sequence[int]]):
        self.lengths, self.used = lengths, False
        self._bounds: dict[tuple[int, torch.device], tuple[Tensor, int]] = {}

    def of_row(self, row: int, T: int) -> list[int]:
        """The lengths that a row of T positions is split into, the padding last."""
        lengths = list(self.lengths[row])
        rest = T - sum(lengths)
        return [*lengths, rest] if rest else lengths

    def bounds(self, T: int, device: torch.device) -> tuple[Tensor, int]:
        """(where documents begin and end in the flattened batch, int32 [documents + 1]; the longest)."""
        if (T, device) not in self._bounds:
            lengths = [length for row in range(len(self.lengths)) for length in self.of_row(row, T)]
            bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            self._bounds[T, device] = (to_device(bounds, device), max(lengths))
        return self._bounds[T, device]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, N, T, D], key and value [B, M, T, D] to [B, T, N, D]."""
    from transformers.integrations import sdpa_attention

    sdpa: Any = sdpa_attention.sdpa_attention_forward
    if attention_mask is not None or (_packed is not None and options.get("position_bias") is not None):
        raise RuntimeError(
            "this model brings a mask of its own to its attention, which would undo causality; train it with "
            "model.attention: eager and without data.packing"
        )
    if _packed is None:
        return sdpa(module, query, key, value, None, **options)
    _packed.used = True
    if _fits_varlen(query, value, options):
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return _by_varlen(query, key, value, options.get("scaling"), causal, _packed), None
    rows = []
    for row, parts in enumerate(zip(query, key, value, strict=True)):  # indexing would make the backward add zeros
        lengths = _packed.of_row(row, query.shape[2])
        documents = zip(*(part.split(lengths, dim=1) for part in parts), strict=True)
        outputs = [sdpa(module, *(t[None] for t in qkv), None, **options)[0] for qkv in documents]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


@cache
def varlen() -> Any:
    """torch's varlen_attn; None before torch 2.10. Not imported sooner, since torch._dynamo comes with it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _fits_varlen(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's flash kernel for documents of different lengths can be used."""
    return (
        is_gpu(query.device)
        and varlen() is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not options.get("dropout")
        and options.get("softcap") is None
        and (gpu_is_rehearsed() or torch.cuda.get_device_capability(query.device) >= (8, 0))
    )


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, causal: bool, packed: _Packed
) -> Tensor:
    B, N, T, D = query.shape
    if key.shape[1] != N:  # torch 2.11's has no grouped queries
        key, value = (t.repeat_interleave(N // t.shape[1], dim=1) for t in (key, value))
    bounds, longest = packed.bounds(T, query.device)
    query, key, value = (t.transpose(1, 2).reshape(B * T, N, D) for t in (query, key, value))
    window = (-1, 0) if causal else (-1, -1)
    output = varlen()(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window)
    return output.view(B, T, N, D)
