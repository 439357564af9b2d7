"""PEFT's format, translated both ways: the tensors' keys and the settings. docs/adapters.md lists them.

PEFT finds modules by loose rules: `target_modules` by dotted suffix, `modules_to_save` by any suffix
("classifier" takes "pre_classifier" too), patterns by regular expression. What is written here means our
modules and no others under these rules, and what PEFT wrote is read by them. An adapter that PEFT cannot
express (one magnitude per input feature) gets a `peft_type` of our own, and says why: PEFT refuses it instead of
loading it wrong.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_dist.adapters.peft_parameters import (
    Place,
    expert_places,
    is_listed,
    name_in_peft,
    taken_for_experts,
    wrapped_in,
)
from dora_dist.config import DoraConfig
from dora_dist.dora.experts import DoraExperts, ExpertsForward
from dora_dist.dora.inject import injection_of
from dora_dist.dora.layers import DoraEmbedding, DoraLayer
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.dora.targets import Projection, inside, is_linear, rank_and_alpha, with_projections
from dora_dist.errors import UserError
from dora_dist.parallel.gather import Stacked
from dora_dist.quant.modules import FrozenExperts

PREFIX = "base_model.model."
OWN_TYPE = "DORA_DIST"
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
_SEQ_CLS_HEADS = ("classifier", "score")  # what PEFT trains in full whenever the task is SEQ_CLS
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")  # torch.compile, checkpoint_wrapper
# Not read: what selects or computes something else, and bases that were changed to fit the initial A and B.
_UNSUPPORTED = (
    "layers_to_transform", "exclude_modules", "trainable_token_indices", "layer_replication",
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "megatron_config", "arrow_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def plain_name(name: str) -> str:
    """What a module or parameter is called where nothing is wrapped."""
    return _WRAPPERS.sub("", name)


def adapted_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers by the names they have in the base model."""
    return {plain_name(name): layer for name, layer in dora_layers(model).items()}


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by key."""
    for layer, places, path in _places(model):
        for place, factor in zip(places, (layer.lora_A, layer.lora_B), strict=True):
            if factor is not None:
                yield PREFIX + place.key, factor
        if layer.magnitude is not None:
            yield f"{PREFIX}{path}.lora_magnitude_vector", layer.magnitude
    for name in injection_of(model).saved:
        yield from _own_tensors(model, name)


def stacked_tensors(model: nn.Module) -> dict[str, Stacked]:
    """How those tensors of an adapter's file lie that lie otherwise than in the model, by key."""
    found = (place for _, places, _ in _places(model) for place in places)
    return {PREFIX + place.key: place.stacked for place in found if place.stacked is not None}


def zero_factors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """PEFT has no magnitude without A and B: zeros of rank 1 stand in. Their shapes in the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, places, _ in _places(model):
        if layer.lora_A is None:
            count = layer.num_experts if isinstance(layer, DoraExperts) else 1
            sizes = ((count, layer.in_features), (count * layer.out_features, 1))
            shapes |= {PREFIX + place.key: size for place, size in zip(places, sizes, strict=True)}
    return shapes


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What PEFT wants besides: frozen modules that it takes for `modules_to_save` by their last letters."""
    saved = injection_of(model).saved
    for name in _module_names(model):
        taken = name.endswith(tuple(saved)) and not inside(name, saved)
        if taken and not dora_layers(model.get_submodule(name)):
            yield from _own_tensors(model, name)


def to_peft_config(model: nn.Module, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json of an injected model."""
    injection, layers = injection_of(model), adapted_layers(model)
    config = injection.config
    task = _task_type(model, injection.saved)
    saved = [*injection.saved, *(_SEQ_CLS_HEADS if task == "SEQ_CLS" else ())]
    experts = [name for name, layer in layers.items() if isinstance(layer, DoraExperts)]
    taken = taken_for_experts(model, [name for name in layers if name not in experts])
    projections = _list_of(experts, _parameter_names(model))
    parameters = [*(experts if projections is None else projections), *(f"{name}.weight" for name in taken)]
    modules = [name for name in layers if name not in (*experts, *taken)]
    others = [n for n in _module_names(model) if n not in modules and not _is_saved_by_peft(n, saved)]
    peft_names = {name: f"{name}.weight" if name in taken else name for name in layers}
    ranks = {n: rank_and_alpha(n, config)[0] if layer.spec.rank else 1 for n, layer in layers.items()}
    alphas = {n: rank_and_alpha(n, config)[1] for n in layers}
    own_axis = {} if config.magnitude_axis == "out" else {"magnitude_axis": config.magnitude_axis}
    reason = _why_not_for_peft(config, layers, saved, experts, taken)
    if projections is None:
        reason = f"{experts[0]}: PEFT takes other parameters whose names end so, too"
    return {
        "peft_type": OWN_TYPE if reason else "LORA",
        **({"not_for_peft": reason} if reason else {}),
        "task_type": task,
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0 if parameters and not reason else config.dropout,  # PEFT has none for parameters
        "use_dora": config.method == "dora",
        "use_rslora": config.rslora,
        "fan_in_fan_out": any(
            layer.transposed and not isinstance(layer, DoraEmbedding) for layer in layers.values()
        ),
        "bias": "none",
        "inference_mode": True,
        "target_modules": _target_modules(modules, others),
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": sorted(injection.saved) or None,
        "rank_pattern": {_exactly(peft_names[n]): r for n, r in ranks.items() if r != config.rank},
        "alpha_pattern": {_exactly(peft_names[n]): a for n, a in alphas.items() if a != config.alpha},
        **own_axis,
    }


def _why_not_for_peft(
    config: DoraConfig,
    layers: Mapping[str, DoraLayer],
    saved: Iterable[str],
    experts: Sequence[str],
    taken: Sequence[str],
) -> str | None:
    if config.magnitude_axis != "out":
        return f"magnitude_axis {config.magnitude_axis}: PEFT has one magnitude per output feature"
    if experts and config.method == "dora":
        return f"{experts[0]}: PEFT has no DoRA for fused experts; dora_dist's load_adapter reads this file"
    if taken and config.method == "dora":
        return f"{taken[0]}: PEFT takes layers of this name for fused experts, and has no DoRA for those"
    bent = [name for name in layers if _is_saved_by_peft(name, saved) or _stands_in_one_of(name, saved)]
    return f"{bent[0]}: PEFT takes it for one of modules_to_save, by its last letters" if bent else None


def from_peft_config(
    config: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module, path: Path
) -> DoraConfig:
    """What to inject into the bare `model` for an adapter; `path` is its adapter_config.json."""
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        key = unsupported[0]
        raise UserError(f"{path}: {key}: {config[key]!r} is not supported")
    to_save = config.get("modules_to_save") or []
    names = _module_names(model)
    adapted = [n for n in _selected(config, names, path) if not _is_saved_by_peft(n, to_save)]
    adapted += _selected_weights(model, config, path)
    magnitude_only = [n for n in _with_zero_factors(adapted, model, tensors) if config.get("use_dora")]
    ranks, alphas = ({n: value_for(n, kind, config) for n in adapted} for kind in ("rank", "alpha"))
    settings: dict[str, Any] = {
        "method": "dora" if config.get("use_dora") else "lora",
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "targets": ["^" + n for n in adapted if n not in magnitude_only],
        "magnitude_only": ["^" + n for n in magnitude_only],
        "rslora": config.get("use_rslora", False),
        "rank_pattern": {"^" + n: r for n, r in ranks.items() if r != config["r"]},
        "alpha_pattern": {"^" + n: a for n, a in alphas.items() if a != config["lora_alpha"]},
        "modules_to_save": ["^" + n for n in names if to_save and n.endswith(tuple(to_save))],
        "magnitude_axis": config.get("magnitude_axis", "out"),
    }
    try:
        return DoraConfig(**settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def value_for(name: str, kind: str, config: Mapping[str, Any]) -> Any:
    """The rank or alpha that PEFT gives a module: of the first pattern that fits its name, else of all."""
    for pattern, value in (config.get(f"{kind}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name_in_peft(name, config)):
            return value
    return config["r" if kind == "rank" else "lora_alpha"]


def _places(model: nn.Module) -> Iterator[tuple[DoraLayer, tuple[Place, Place], str]]:
    """Each layer, where A and B are in a file, and the path before the magnitude's key."""
    layers = adapted_layers(model)
    paths = wrapped_in([name for name, layer in layers.items() if isinstance(layer, DoraExperts)])
    mixtures = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, ExpertsForward)}
    for name, layer in layers.items():
        if isinstance(layer, DoraExperts):
            experts = mixtures[name.rpartition(".")[0]]
            yield layer, expert_places(paths[name], experts, experts.layout), paths[name]
        else:
            infix = "lora_embedding_{}" if isinstance(layer, DoraEmbedding) else "lora_{}.weight"
            yield layer, (Place(f"{name}.{infix.format('A')}"), Place(f"{name}.{infix.format('B')}")), name


def _own_tensors(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    for suffix, parameter in model.get_submodule(name).named_parameters():
        yield f"{PREFIX}{name}.{suffix}", parameter


def _module_names(model: nn.Module) -> list[str]:
    """As PEFT sees them: the projections of experts are parameters."""
    modules = ((plain_name(name), module) for name, module in model.named_modules())
    return [name for name, module in modules if name and not isinstance(module, DoraExperts | FrozenExperts)]


def _parameter_names(model: nn.Module) -> list[str]:
    """Of those that are not adapted, as PEFT sees them."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, module in model.named_modules() if isinstance(module, FrozenExperts)]
    return [plain_name(name) for name in names]


def _task_type(model: nn.Module, saved: Iterable[str]) -> str | None:
    """None also for a classifier with a frozen head: for SEQ_CLS PEFT expects a trained one in the file."""
    model = getattr(model, "_orig_mod", model)
    task = next((t for suffix, t in _TASK_TYPES.items() if type(model).__name__.endswith(suffix)), None)
    heads = (name for name in _module_names(model) if name.endswith(_SEQ_CLS_HEADS))
    return None if task == "SEQ_CLS" and not all(inside(name, saved) for name in heads) else task


def _target_modules(adapted: Iterable[str], others: list[str]) -> list[str] | str:
    """A list where one means the adapted modules alone, else an expression."""
    names = _list_of(adapted, others)
    return "|".join(re.escape(name) for name in sorted(adapted)) if names is None else names


def _list_of(adapted: Iterable[str], others: Iterable[str]) -> list[str] | None:
    """Last parts of names where they mean the adapted alone, else whole names, if these do."""
    for names in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        if not any(is_listed(other, names) for other in others):
            return names
    return None


def _selected(config: dict[str, Any], names: list[str], path: Path) -> list[str]:
    """The names that `target_modules` means to PEFT."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        selected = [name for name in names if re.fullmatch(targets, name)]
    else:
        selected = [name for name in names if is_listed(name, targets)]
    if not selected and (targets or not config.get("target_parameters")):
        raise UserError(f"{path}: target_modules {targets!r} match no module of this model")
    return selected


def _selected_weights(model: nn.Module, config: dict[str, Any], path: Path) -> list[str]:
    """The linear layers and projections of experts whose weights `target_parameters` mean to PEFT."""
    targets = config.get("target_parameters") or []
    weights = {
        _WRAPPERS.sub("", name if isinstance(place, Projection | FrozenExperts) else f"{name}.weight"): name
        for name, place in with_projections(model).items()
        if is_linear(place)
    }
    found = [name for name in _parameter_names(model) if is_listed(name, targets)]
    unknown = next((name for name in found if name not in weights), None)
    if unknown is not None or (targets and not found):
        told = (
            "match no parameter of this model"
            if unknown is None
            else f"mean {unknown!r}, which no layer here is for"
        )
        raise UserError(f"{path}: target_parameters {targets!r} {told}")
    return [_WRAPPERS.sub("", weights[name]) for name in found]


def _is_saved_by_peft(name: str, to_save: Iterable[str]) -> bool:
    """Whether PEFT leaves a module out of the targets because `modules_to_save` covers it."""
    return any(re.match(rf"(^|.*\.){pattern}($|\..*)", name) for pattern in to_save)


def _stands_in_one_of(name: str, to_save: Iterable[str]) -> bool:
    """Whether PEFT would copy a module as part of one that it takes for one of `modules_to_save`."""
    return any(part.endswith(tuple(to_save)) for part in accumulate(name.split("."), "{}.{}".format))


def _with_zero_factors(adapted: Sequence[str], model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Those of rank 1, all zeros: what has its magnitude alone trained."""
    places = with_projections(model)
    counts = {n: p.layout.num_experts for n in adapted if isinstance(p := places[n], Projection) and p.layout}
    paths = wrapped_in(list(counts))
    infixes = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")

    def is_zero(name: str) -> bool:
        keys = (f"{PREFIX}{paths.get(name, name)}.{infix}" for infix in infixes)
        factors = [tensors[key] for key in keys if key in tensors]
        of_rank_1 = len(factors) == 2 and factors[0].shape[0] == counts.get(name, 1)
        return of_rank_1 and not any(t.any() for t in factors)

    return [name for name in adapted if is_zero(name)]


def _exactly(name: str) -> str:
    return "^" + re.escape(name)
