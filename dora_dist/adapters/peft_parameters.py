"""PEFT's `target_parameters`: adapters on single parameters, above all a mixture's experts. PEFT adds them to a
copy of the weight in each forward, and has no magnitudes or dropout for them.

A parameter [E, out, in] has E adapters in two matrices, A [E r, in], expert by expert, and B [out, r E], where the
expert's index runs fastest. Adapters of several parameters of one module are wrapped one in the other.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from dora_dist.dora.experts import ExpertsLayout
from dora_dist.parallel.gather import Stacked

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


class Place(NamedTuple):
    """Where a file has a factor, and how it lies there."""

    key: str  # without what PEFT begins all keys with
    stacked: Stacked | None = None


def wrapped_in(names: Sequence[str]) -> dict[str, str]:
    """The paths of parameters' adapters, `names` in the model's order: the last one of a module is outside."""
    later: Counter[str] = Counter()
    paths = {}
    for name in reversed(names):
        parent = name.rpartition(".")[0]
        paths[name] = parent + ".base_layer" * later[parent]
        later[parent] += 1
    return paths


def expert_places(path: str, experts: nn.Module, layout: ExpertsLayout) -> tuple[Place, Place]:
    """Where A and B of one projection of `experts` are, of which PEFT keeps the adapter at `path`."""
    A, B, E = f"{path}.lora_A.weight", f"{path}.lora_B.weight", layout.num_experts
    if layout.transposed == bool(getattr(experts, "is_transposed", False)):
        return Place(A, Stacked(E, (0, 1, 2))), Place(B, Stacked(E, (1, 2, 0)))
    # PEFT takes [E, in, out] for [E, out, in] (Llama 4): W^T + s A^T B^T is the same update.
    return Place(B, Stacked(E, (2, 1, 0))), Place(A, Stacked(E, (0, 2, 1)))


def is_listed(name: str, targets: Collection[str]) -> bool:
    """Whether PEFT finds a module or parameter in a list of names."""
    return name in targets or name.endswith(tuple("." + target for target in targets))


def name_in_peft(name: str, config: Mapping[str, Any]) -> str:
    """By which PEFT looks up the rank and alpha of an adapted module."""
    weight = f"{name}.weight"
    return weight if is_listed(weight, config.get("target_parameters") or ()) else name
