"""Put DoRA into a model: choose modules by name, swap them for DoRA layers over the same weights, freeze the
rest.

Works on any nn.Module, on the meta device too. Nothing is changed before everything has been checked.
"""

import fnmatch
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_dist.config import DoraConfig
from dora_dist.dora.layers import AdapterSpec, DoraEmbedding, DoraLayer, DoraLinear
from dora_dist.errors import UserError, nearest
from dora_dist.io.fingerprint import Base

_GLOB = set("*?[")


@dataclass(frozen=True)
class Injection:
    """What `inject_dora` did to a model; kept as `model.dora`."""

    config: DoraConfig
    layers: tuple[str, ...]  # names of the adapted modules
    saved: tuple[str, ...]  # names of the modules trained in full
    saved_dtypes: dict[str, torch.dtype]  # the base's, of their parameters
    casts: tuple[RemovableHandle, ...]  # the hooks around modules trained in fp32 inside a 16-bit model
    base: Base | None = None  # what the model was before, where that is known
    left_out: tuple[str, ...] = ()  # modules that the configuration means, but which take no part in the loss


def inject_dora(
    model: nn.Module, config: DoraConfig, base: Base | None = None, idle: Collection[str] = ()
) -> nn.Module:
    """Swap the targets of `config` for DoRA layers, in place, and return the model.

    Targets are nn.Linear, transformers' Conv1D (GPT-2) and nn.Embedding modules. The layers share the model's
    weights; afterwards only A, B, the magnitudes and `modules_to_save` (held in fp32) require gradients. At
    first the model computes what it computed before. On the meta device values are left to
    `initialize_adapters`.

    Args:
        base: what the model is; `save_adapter` writes it down, and `load_adapter` refuses adapters of another.
        idle: modules that take no part in the loss: left out, unless a name or glob means nothing else.

    Raises:
        UserError: a name matches nothing (the closest names are given), a module is of another kind, a rank
            exceeds its layer, a name means idle modules alone, or the model was injected or sharded before.
    """
    if any(isinstance(m, DoraLayer) for m in model.modules()):
        raise UserError("the model already has DoRA layers; inject_dora works once per model")
    if is_sharded(model):
        raise UserError(
            "the model is sharded already: call inject_dora first, then fully_shard or deepspeed.initialize"
        )
    targets, magnitude_only, saved, left_out = _choose(model, config, set(idle))
    specs = {name: _spec(name, module, name in magnitude_only, config) for name, module in targets.items()}
    _check_patterns(targets, config)
    _check_ties(model, saved)

    model.requires_grad_(False)
    replaced: dict[nn.Module, DoraLayer] = {}
    for name, module in targets.items():
        replaced[module] = replaced.get(module) or _make_layer(module, specs[name])
        set_module(model, name, replaced[module])
    dtypes = {
        name: parameter.dtype  # before ties are widened
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if inside(name, saved)
    }
    narrow = {name: _narrowest_dtype(model.get_submodule(name)) for name in saved}
    casts = [h for name, dtype in narrow.items() for h in _train_in_full(model.get_submodule(name), dtype)]
    injection = Injection(config, tuple(targets), tuple(saved), dtypes, tuple(casts), base, tuple(left_out))
    model.dora = injection  # type: ignore[assignment]
    return model


def forget_injection(model: nn.Module) -> None:
    """The modules trained in full go back to the base's dtype, and the model no longer counts as injected."""
    injection = injection_of(model)
    for cast in injection.casts:
        cast.remove()
    for name, dtype in injection.saved_dtypes.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    del model.dora


def is_sharded(model: nn.Module) -> bool:
    """By FSDP2 (DTensors) or ZeRO-3."""
    return any(hasattr(p, "placements") or hasattr(p, "ds_tensor") for p in model.parameters())


def injection_of(model: nn.Module) -> Injection:
    injection = getattr(model, "dora", None)
    if not isinstance(injection, Injection):
        if isinstance(getattr(getattr(model, "module", None), "dora", None), Injection):
            raise UserError("this is a wrapper around the injected model: pass its .module")
        raise UserError("the model has no DoRA layers: call inject_dora(model, DoraConfig(...)) first")
    return injection


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that is `name`, a dotted suffix of it, "^" and all of it, or a glob that fits it."""
    for pattern in patterns:
        if _is_glob(pattern):
            if fnmatch.fnmatchcase(name, pattern):
                return pattern
        elif name == pattern.removeprefix("^") or name.endswith("." + pattern):
            return pattern
    return None


def rank_and_alpha(name: str, config: DoraConfig) -> tuple[int, float]:
    """Of a layer that is not trained by its magnitude alone."""
    rank_key, alpha_key = matches(name, config.rank_pattern), matches(name, config.alpha_pattern)
    rank = config.rank_pattern[rank_key] if rank_key else config.rank
    return rank, config.alpha_pattern[alpha_key] if alpha_key else config.alpha


def _choose(
    model: nn.Module, config: DoraConfig, idle: set[str]
) -> tuple[dict[str, nn.Module], set[str], list[str], list[str]]:
    """(targets by name, the names of those that train the magnitude alone, modules trained in full, modules left
    out as `idle`)."""
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    _require_all_match("dora.modules_to_save", config.modules_to_save, modules)
    meant = [name for name in modules if matches(name, config.modules_to_save)]
    saved = _taking_part("dora.modules_to_save", config.modules_to_save, meant, idle)
    _refuse_idle_parts(saved, idle)
    candidates = [name for name, m in modules.items() if is_target_kind(m)]
    free = [name for name in candidates if not inside(name, saved)]
    magnitude_only = _selected("dora.magnitude_only", config.magnitude_only, modules, free)
    names = [t for t in config.target_list() if t != "all-linear"]
    chosen = _selected("dora.targets", names, modules, free) | magnitude_only
    patterns = [*names, *config.magnitude_only]
    left_out = {*meant, *chosen}.intersection(idle)
    chosen = set(_taking_part("dora.targets", patterns, sorted(chosen), idle))
    if "all-linear" in config.target_list():
        head = _output_heads(model)
        linear = {name for name in free if is_linear(modules[name]) and modules[name] not in head}
        left_out |= linear.intersection(idle)
        chosen |= linear.difference(idle)
    if not chosen:
        raise UserError("dora.targets: nothing to adapt; name at least one module, or all-linear")
    targets = {name: modules[name] for name in modules if name in chosen}
    for name, module in targets.items():
        if not is_target_kind(module):
            inner = [n for n in candidates if n.startswith(name + ".")]
            raise UserError(
                f"dora.targets: {name!r} is a {type(module).__name__}; targets are Linear, Conv1D and "
                f"Embedding modules{', such as ' + repr(inner[0]) if inner else ''}"
            )
        if inside(name, saved):
            raise UserError(f"dora.targets: {name!r} is trained in full by dora.modules_to_save already")
    return targets, magnitude_only, saved, [name for name in modules if name in left_out]


def _taking_part(key: str, patterns: Iterable[str], meant: Iterable[str], idle: set[str]) -> list[str]:
    """Those of the modules `meant` by `patterns` that are not idle. UserError: a pattern means idle ones alone."""
    names = list(meant)
    for pattern in patterns:
        found = [name for name in names if matches(name, [pattern])]
        if found and idle.issuperset(found):
            told = f"{found[0]!r}, which takes" if len(found) == 1 else f"{found[0]!r} and other modules that take"
            raise UserError(f"{key}: {pattern!r} means {told} no part in the loss of text; name modules that do")
    return [name for name in names if name not in idle]


def _refuse_idle_parts(saved: Iterable[str], idle: Iterable[str]) -> None:
    for name in saved:
        inner = min((n for n in idle if inside(n, [name])), default=None)
        if inner is not None:
            raise UserError(
                f"dora.modules_to_save: {name!r} holds {inner!r}, which takes no part in the loss of text; name "
                "the parts that do"
            )


def _selected(key: str, patterns: Iterable[str], modules: Iterable[str], candidates: list[str]) -> set[str]:
    """The modules that `patterns` mean: a name may mean any module (a wrong kind is told), a glob only those
    that can be adapted."""
    names = [p for p in patterns if not _is_glob(p)]
    globs = [p for p in patterns if _is_glob(p)]
    _require_all_match(key, names, modules, candidates)
    _require_all_match(key, globs, candidates)
    return {n for n in modules if matches(n, names)} | {n for n in candidates if matches(n, globs)}


def _require_all_match(
    key: str, patterns: Iterable[str], modules: Iterable[str], candidates: Iterable[str] | None = None
) -> None:
    names = list(modules)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            shown = list(candidates) if candidates is not None else names
            valid = {_suffix(name) for name in shown if not _suffix(name).isdigit()}
            if "." in pattern:
                valid |= set(shown)
            raise UserError(f"{key}: {pattern!r} matches no module; {nearest(pattern, valid)}")


def _check_patterns(targets: Iterable[str], config: DoraConfig) -> None:
    _require_all_match("dora.rank_pattern", config.rank_pattern, targets)
    _require_all_match("dora.alpha_pattern", config.alpha_pattern, targets)


def _check_ties(model: nn.Module, saved: list[str]) -> None:
    """A weight trained in full under one name and frozen under another cannot stay tied."""
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for names in owners.values():
        free = [n for n in names if not inside(n, saved)]
        if free and len(free) < len(names):
            held = next(n for n in names if n not in free)
            raise UserError(
                f"dora.modules_to_save: {held!r} is tied to {free[0]!r}; name both modules (they are trained "
                "as one weight) or neither"
            )


def _spec(name: str, module: nn.Module, magnitude_only: bool, config: DoraConfig) -> AdapterSpec:
    rank, alpha = rank_and_alpha(name, config)
    shape = module.weight.shape
    assert isinstance(shape, torch.Size)
    if magnitude_only:
        rank = 0
    elif rank > min(shape):
        raise UserError(
            f"dora.rank: {rank} is larger than the smaller side of {name!r} {tuple(shape)}; "
            f"at most {min(shape)} (dora.rank_pattern sets a rank for single layers)"
        )
    return AdapterSpec(
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if config.rslora else rank) if rank else 1.0,
        dropout=config.dropout,
        magnitude=config.method == "dora",
        axis=config.magnitude_axis,
        norm_gradient=config.norm_gradient,
        init=config.init,
    )


def _make_layer(module: nn.Module, spec: AdapterSpec) -> DoraLayer:
    layer: DoraLayer
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        layer = DoraEmbedding(weight, spec, module.padding_idx)
    else:
        layer = DoraLinear(weight, module.bias, spec, transposed=_is_conv1d(module))  # type: ignore[arg-type]
    layer.train(module.training)
    if not weight.is_meta:
        layer.reset_parameters()
    return layer


def _narrowest_dtype(module: nn.Module) -> torch.dtype:
    return min((p.dtype for p in module.parameters()), key=lambda d: d.itemsize, default=torch.float32)


def _train_in_full(module: nn.Module, base_dtype: torch.dtype) -> list[RemovableHandle]:
    """Train a module's own weights, held in fp32, inside a model that computes in 16 bits."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    if base_dtype.itemsize >= 4:
        return []
    cast = _CastAround(base_dtype)
    return [
        module.register_forward_pre_hook(cast.inputs, with_kwargs=True),
        module.register_forward_hook(cast.output),
    ]


@dataclass(frozen=True)
class _CastAround:
    """Hooks: inputs to the module's own dtype, its output to the dtype of the model around it."""

    dtype: torch.dtype

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        own = next(p.dtype for p in module.parameters())
        return tuple(_cast(a, own) for a in args), {k: _cast(v, own) for k, v in kwargs.items()}

    def output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return _cast(output, self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_glob(pattern: str) -> bool:
    return not _GLOB.isdisjoint(pattern)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    # Exact types: a subclass may compute something else in its forward.
    return type(module) is nn.Linear or _is_conv1d(module)


def is_target_kind(module: nn.Module) -> bool:
    # An embedding with max_norm rewrites its weight in each forward.
    return is_linear(module) or (type(module) is nn.Embedding and module.max_norm is None)


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The modules that make a model's final outputs: what transformers calls output embeddings, or, in a
    classifier, the linear layers outside the base model."""
    heads = set()
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is not None:
        heads.add(head)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(base, nn.Module):
        heads |= set(model.modules()) - set(base.modules())
    return heads


def inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
