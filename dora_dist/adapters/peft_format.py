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

from dora_dist.adapters.peft_parameters import is_listed, name_in_peft, taken_for_experts
from dora_dist.config import DoraConfig
from dora_dist.dora.inject import injection_of
from dora_dist.dora.layers import DoraEmbedding, DoraLayer
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.dora.targets import inside, is_linear, rank_and_alpha
from dora_dist.errors import UserError

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


def adapted_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers by the names they have in the base model."""
    return {_WRAPPERS.sub("", name): layer for name, layer in dora_layers(model).items()}


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by key."""
    for name, layer in adapted_layers(model).items():
        for key, factor in zip(_factor_keys(name, layer), (layer.lora_A, layer.lora_B), strict=True):
            if factor is not None:
                yield key, factor
        if layer.magnitude is not None:
            yield f"{PREFIX}{name}.lora_magnitude_vector", layer.magnitude
    for name in injection_of(model).saved:
        yield from _own_tensors(model, name)


def zero_factors(model: nn.Module) -> dict[str, tuple[int, int]]:
    """PEFT has no magnitude without A and B: zeros of rank 1 stand in. Their shapes."""
    shapes = {}
    for name, layer in adapted_layers(model).items():
        if layer.lora_A is None:
            key_A, key_B = _factor_keys(name, layer)
            shapes[key_A], shapes[key_B] = (1, layer.in_features), (layer.out_features, 1)
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
    taken = taken_for_experts(model, layers)
    modules = [name for name in layers if name not in taken]
    others = [n for n in _module_names(model) if n not in modules and not _is_saved_by_peft(n, saved)]
    peft_names = {name: f"{name}.weight" if name in taken else name for name in layers}
    ranks = {n: rank_and_alpha(n, config)[0] if layer.spec.rank else 1 for n, layer in layers.items()}
    alphas = {n: rank_and_alpha(n, config)[1] for n in layers}
    own_axis = {} if config.magnitude_axis == "out" else {"magnitude_axis": config.magnitude_axis}
    reason = _why_not_for_peft(config, layers, saved, taken)
    return {
        "peft_type": OWN_TYPE if reason else "LORA",
        **({"not_for_peft": reason} if reason else {}),
        "task_type": task,
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0 if taken and not reason else config.dropout,  # PEFT has none for parameters
        "use_dora": config.method == "dora",
        "use_rslora": config.rslora,
        "fan_in_fan_out": any(
            layer.transposed and not isinstance(layer, DoraEmbedding) for layer in layers.values()
        ),
        "bias": "none",
        "inference_mode": True,
        "target_modules": _target_modules(modules, others),
        **({"target_parameters": [peft_names[name] for name in taken]} if taken else {}),
        "modules_to_save": sorted(injection.saved) or None,
        "rank_pattern": {_exactly(peft_names[n]): r for n, r in ranks.items() if r != config.rank},
        "alpha_pattern": {_exactly(peft_names[n]): a for n, a in alphas.items() if a != config.alpha},
        **own_axis,
    }


def _why_not_for_peft(
    config: DoraConfig, layers: Mapping[str, DoraLayer], saved: Iterable[str], taken: Sequence[str]
) -> str | None:
    if config.magnitude_axis != "out":
        return f"magnitude_axis {config.magnitude_axis}: PEFT has one magnitude per output feature"
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
    magnitude_only = [n for n in adapted if config.get("use_dora") and _has_zero_factors(n, tensors)]
    adapted += _selected_weights(model, config, path)
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


def _factor_keys(name: str, layer: DoraLayer) -> tuple[str, str]:
    infix = "lora_embedding_{}" if isinstance(layer, DoraEmbedding) else "lora_{}.weight"
    return f"{PREFIX}{name}.{infix.format('A')}", f"{PREFIX}{name}.{infix.format('B')}"


def _own_tensors(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    for suffix, parameter in model.get_submodule(name).named_parameters():
        yield f"{PREFIX}{name}.{suffix}", parameter


def _module_names(model: nn.Module) -> list[str]:
    return [_WRAPPERS.sub("", name) for name, _ in model.named_modules() if name]


def _task_type(model: nn.Module, saved: Iterable[str]) -> str | None:
    """None also for a classifier with a frozen head: for SEQ_CLS PEFT expects a trained one in the file."""
    model = getattr(model, "_orig_mod", model)
    task = next((t for suffix, t in _TASK_TYPES.items() if type(model).__name__.endswith(suffix)), None)
    heads = (name for name in _module_names(model) if name.endswith(_SEQ_CLS_HEADS))
    return None if task == "SEQ_CLS" and not all(inside(name, saved) for name in heads) else task


def _target_modules(adapted: Iterable[str], others: list[str]) -> list[str] | str:
    """Last parts of names where they mean the adapted modules alone, else whole names, else an expression."""
    for names in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        endings = tuple("." + name for name in names)
        if not any(other in names or other.endswith(endings) for other in others):
            return names
    return "|".join(re.escape(name) for name in sorted(adapted))


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
    """The linear layers whose weights `target_parameters` mean to PEFT."""
    targets = config.get("target_parameters") or []
    weights = {_WRAPPERS.sub("", f"{n}.weight"): n for n, m in model.named_modules() if is_linear(m)}
    named = (_WRAPPERS.sub("", name) for name, _ in model.named_parameters(remove_duplicate=False))
    found = [name for name in named if is_listed(name, targets)]
    unknown = next((name for name in found if name not in weights), None)
    if unknown is not None or (targets and not found):
        told = (
            "match no parameter of this model"
            if unknown is None
            else f"mean {unknown!r}, no linear layer's weight"
        )
        raise UserError(f"{path}: target_parameters {targets!r} {told}")
    return [_WRAPPERS.sub("", weights[name]) for name in found]


def _is_saved_by_peft(name: str, to_save: Iterable[str]) -> bool:
    """Whether PEFT leaves a module out of the targets because `modules_to_save` covers it."""
    return any(re.match(rf"(^|.*\.){pattern}($|\..*)", name) for pattern in to_save)


def _stands_in_one_of(name: str, to_save: Iterable[str]) -> bool:
    """Whether PEFT would copy a module as part of one that it takes for one of `modules_to_save`."""
    return any(part.endswith(tuple(to_save)) for part in accumulate(name.split("."), "{}.{}".format))


def _has_zero_factors(name: str, tensors: dict[str, Tensor]) -> bool:
    infixes = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    factors = [t for infix in infixes if (t := tensors.get(f"{PREFIX}{name}.{infix}")) is not None]
    return len(factors) == 2 and factors[0].shape[0] == 1 and not any(t.any() for t in factors)


def _exactly(name: str) -> str:
    return "^" + re.escape(name)
