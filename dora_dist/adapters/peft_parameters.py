"""PEFT's `target_parameters`: adapters on single parameters. PEFT merges them into a copy of the weight in each
forward, and has no magnitudes or dropout for them.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

# With transformers 5, PEFT takes these last words of `target_modules` for parts of fused experts.
_TAKEN = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the `names` of linear layers that PEFT would take for experts of this model: a mixture's dense and
    shared layers. Their weights can be named among `target_parameters`."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        return []
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kind = {"mixtral": "mixtral", **_MODEL_TO_CONVERSION_PATTERN}.get(model_type, "")
    return [name for name in names if name.rpartition(".")[2] in _TAKEN.get(kind, ())]


def is_listed(name: str, targets: Collection[str]) -> bool:
    """Whether PEFT finds a module or parameter in a list of names."""
    return name in targets or name.endswith(tuple("." + target for target in targets))


def name_in_peft(name: str, config: Mapping[str, Any]) -> str:
    """By which PEFT looks up the rank and alpha of an adapted module."""
    weight = f"{name}.weight"
    return weight if is_listed(weight, config.get("target_parameters") or ()) else name
