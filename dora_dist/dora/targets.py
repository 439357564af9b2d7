"""Which modules of a model become DoRA layers and which are trained in full, by a configuration's names and globs.

Only looks at the model, so that all mistakes are told before anything is changed.
"""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dora_dist.config import DoraConfig
from dora_dist.dora.experts import ExpertsLayout
from dora_dist.dora.experts_layout import FIRST, LAST, experts_layout, unknown_experts
from dora_dist.dora.linear_subclasses import computes_linear
from dora_dist.errors import UserError, nearest
from dora_dist.quant.modules import FrozenExperts, PackedLinear

_GLOB = set("*?[")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Projection:
    """One projection of a mixture's experts, which the model holds as a parameter. Chosen like a module."""

    experts: nn.Module
    key: str  # the parameter's name there
    weight: Tensor  # without values: [out, in] of one expert, or the parameter's shape where that is not known
    layout: ExpertsLayout | None  # None: not known, so it cannot be adapted


@dataclass(frozen=True)
class Choice:
    """What a configuration means in one model; names are in the model's order."""

    targets: dict[str, nn.Module | Projection]  # to be adapted
    magnitude_only: set[str]  # the targets that train the magnitude alone
    saved: list[str]  # trained in full
    left_out: list[str]  # meant too, but idle: they take no part in the loss
    too_small: list[str]  # meant by all-linear or a glob, but a side is smaller than the rank
    halved: list[str]  # gate_up_proj of experts where only gate_proj or up_proj is named


def choose(model: nn.Module, config: DoraConfig, idle: Collection[str]) -> Choice:
    """The modules that `config` means. UserError: see `inject_dora`."""
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    places = with_projections(model)
    _require_all_match("dora.modules_to_save", config.modules_to_save, modules)
    meant_in_full = [name for name in modules if matches(name, config.modules_to_save)]
    saved = _without_idle("dora.modules_to_save", config.modules_to_save, meant_in_full, idle)
    saved = [name for name in saved if not inside(name.rpartition(".")[0], saved)]  # what stands in another
    _refuse_idle_parts(saved, idle)
    _check_ties(model, saved)

    candidates = [name for name, m in places.items() if is_target_kind(m)]
    free = [name for name in candidates if not inside(name, saved)]
    magnitude_only = _selected("dora.magnitude_only", config.magnitude_only, places, free)
    names = [t for t in config.target_list() if t != "all-linear"]
    meant = _selected("dora.targets", names, places, free) | magnitude_only
    chosen = set(_without_idle("dora.targets", [*names, *config.magnitude_only], sorted(meant), idle))
    if "all-linear" in config.target_list():
        heads = output_heads(model)
        linear = {name for name in free if is_linear(places[name]) and places[name] not in heads}
        meant |= linear
        chosen |= linear.difference(idle)
    small = {
        name for name in chosen.intersection(candidates) - magnitude_only if _is_small(name, places[name], config)
    }
    too_small = small - _named(small, names, chosen - small)
    chosen -= too_small
    if not chosen:
        raise UserError("dora.targets: nothing to adapt; name at least one module, or all-linear")
    targets = {name: module for name, module in places.items() if name in chosen}
    _check_targets(targets, candidates, saved)
    _require_all_match("dora.rank_pattern", config.rank_pattern, targets)
    _require_all_match("dora.alpha_pattern", config.alpha_pattern, targets)
    left_out = [name for name in places if name in idle and (name in meant or name in meant_in_full)]
    halved = [n for n in free if n not in meant and _half_of(n, [*names, *config.magnitude_only])]
    return Choice(targets, magnitude_only, saved, left_out, [n for n in places if n in too_small], halved)


def with_projections(model: nn.Module) -> dict[str, nn.Module | Projection]:
    """All modules by name, and behind each that holds experts its projections."""
    found: dict[str, nn.Module | Projection] = {}
    made: dict[nn.Module, dict[str, Projection]] = {}  # a module may have several names
    for name, module in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        if module not in made:
            layout = experts_layout(module)
            shapes = unknown_experts(name, module) if layout is None else layout.shapes
            made[module] = {
                key: Projection(module, key, torch.empty(shape, dtype=own.dtype, device="meta"), layout)
                for key, shape in shapes.items()
                if (own := module._parameters.get(key)) is not None
            }
        found[name] = module
        found |= {f"{name}.{key}": projection for key, projection in made[module].items()}
    return found


def matches(name: str, patterns: Collection[str]) -> str | None:
    """The first pattern that is `name`, a dotted suffix of it, "^" and all of it, or a glob that fits it. What
    means the experts of a mixture means their projections, too; what means gate_proj and up_proj of experts means
    gate_up_proj, which holds both."""
    return next(iter(_meant_by(name, patterns)), None)


def _meant_by(name: str, patterns: Collection[str]) -> list[str]:
    """The first pattern that means `name`, or the first two that mean its halves."""
    whole = _first_match(name, patterns)
    if whole is not None:
        return [whole]
    halves = [match for half in _halves(name) if (match := _first_match(half, patterns)) is not None]
    return halves if len(halves) == 2 else []


def _half_of(name: str, patterns: Collection[str]) -> bool:
    return any(_first_match(half, patterns) for half in _halves(name))


def _halves(name: str) -> list[str]:
    """What others call the two that are one in gate_up_proj of a mixture's experts; of another module none."""
    experts, _, last = name.rpartition(".")
    fused = last == FIRST[0] and experts.rpartition(".")[2] == "experts"
    return [f"{experts}.gate_proj", f"{experts}.up_proj"] if fused else []


def _first_match(name: str, patterns: Iterable[str]) -> str | None:
    parent, _, last = name.rpartition(".")
    of_mixture = parent.rpartition(".")[2] == "experts" and last in (*FIRST, LAST)
    names = (name, parent) if of_mixture else (name,)
    for pattern in patterns:
        if _is_glob(pattern):
            if fnmatch.fnmatchcase(name, pattern):
                return pattern
        elif any(n == pattern.removeprefix("^") or n.endswith("." + pattern) for n in names):
            return pattern
    return None


def rank_and_alpha(name: str, config: DoraConfig) -> tuple[int, float]:
    """Of a layer that is not trained by its magnitude alone."""
    rank = _value_for(name, "dora.rank_pattern", config.rank_pattern, config.rank)
    return rank, _value_for(name, "dora.alpha_pattern", config.alpha_pattern, config.alpha)


def _value_for(name: str, key: str, patterns: Mapping[str, T], default: T) -> T:
    values = {patterns[pattern] for pattern in _meant_by(name, patterns)}
    if len(values) > 1:
        raise UserError(f"{key}: gate_proj and up_proj are one matrix, {name!r}; give them one value")
    return next(iter(values), default)


def inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module | Projection) -> bool:
    if isinstance(module, Projection):
        return module.layout is not None
    return isinstance(module, PackedLinear | FrozenExperts) or is_dense_linear(module)


def is_dense_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module) or computes_linear(module)


def is_target_kind(module: nn.Module | Projection) -> bool:
    # An embedding with max_norm rewrites its weight in each forward.
    return is_linear(module) or (type(module) is nn.Embedding and module.max_norm is None)


def _selected(
    key: str, patterns: Iterable[str], places: Mapping[str, nn.Module | Projection], candidates: Collection[str]
) -> set[str]:
    """The modules and projections that `patterns` mean: a name may mean any module (a wrong kind is told), a glob
    only what can be adapted."""
    names = [p for p in patterns if not _is_glob(p)]
    globs = [p for p in patterns if _is_glob(p)]
    _require_all_match(key, names, places, candidates)
    _require_all_match(key, globs, candidates)
    named = {n for n in places if matches(n, names)}
    holders = {n.rpartition(".")[0] for n in named if isinstance(places[n], Projection | FrozenExperts)}
    return (named - holders) | {n for n in candidates if matches(n, globs)}


def _without_idle(key: str, patterns: Iterable[str], meant: list[str], idle: Collection[str]) -> list[str]:
    """The modules `meant` by `patterns` that are not idle. UserError: a pattern means idle ones alone."""
    for pattern in patterns:
        found = [name for name in meant if matches(name, [pattern])]
        if found and all(name in idle for name in found):
            told = f"{found[0]!r}, which takes" if len(found) == 1 else f"{found[0]!r} and other modules that take"
            raise UserError(f"{key}: {pattern!r} means {told} no part in the loss of text; name modules that do")
    return [name for name in meant if name not in idle]


def _is_small(name: str, module: nn.Module | Projection, config: DoraConfig) -> bool:
    return rank_and_alpha(name, config)[0] > min(shape_of(module))


def shape_of(module: nn.Module | Projection) -> tuple[int, ...]:
    """Of the matrix to be adapted; of experts that of one."""
    if isinstance(module, PackedLinear | FrozenExperts):
        return module.out_features, module.in_features
    weight: Any = module.weight
    return tuple(weight.shape)


def _named(small: set[str], patterns: Iterable[str], others: Collection[str]) -> set[str]:
    """Those of `small` that a name means, or a glob that means none of the `others`."""
    strict = [p for p in patterns if not _is_glob(p) or not any(matches(name, [p]) for name in others)]
    return {name for name in small if matches(name, strict)}


def _refuse_idle_parts(saved: Iterable[str], idle: Iterable[str]) -> None:
    for name in saved:
        inner = min((n for n in idle if inside(n, [name])), default=None)
        if inner is not None:
            raise UserError(
                f"dora.modules_to_save: {name!r} holds {inner!r}, which takes no part in the loss of text; name "
                "the parts that do"
            )


def _require_all_match(
    key: str, patterns: Collection[str], names: Collection[str], candidates: Collection[str] | None = None
) -> None:
    """UserError: a pattern matches none of `names`; it proposes `candidates`, where they are others."""
    for pattern in patterns:
        if any(matches(name, [pattern]) for name in names):
            continue
        fused = next((name for name in names if _half_of(name, [pattern])), None)
        if fused is not None and matches(fused, patterns):
            continue
        if fused is not None:
            raise UserError(
                f"{key}: {pattern!r} is half of {fused!r}; name both gate_proj and up_proj, or gate_up_proj"
            )
        shown = names if candidates is None else candidates
        last_parts = {name.rpartition(".")[2] for name in shown}
        valid = {part for part in last_parts if not part.isdigit()}
        if "." in pattern:
            valid.update(shown)
        either = "; all-linear fits every model" if key == "dora.targets" else ""
        raise UserError(f"{key}: {pattern!r} matches no module; {nearest(pattern, valid)}{either}")


def _check_targets(targets: Mapping[str, nn.Module | Projection], candidates: list[str], saved: list[str]) -> None:
    for name, module in targets.items():
        if isinstance(module, Projection) and module.layout is None:
            shapes = ", ".join(f"{key} {shape}" for key, shape in unknown_experts(name, module.experts).items())
            raise UserError(
                f"dora.targets: {name.rpartition('.')[0]!r} is a {type(module.experts).__name__}, whose experts "
                f"({shapes}) lie or compute in a way that is not known; valid is to adapt the attention alone"
                f"{_such_as(n for n in candidates if 'att' in n)}"
            )
        if not is_target_kind(module):
            other = ", which does not compute as nn.Linear does" if isinstance(module, nn.Linear) else ""
            if type(module).__module__.startswith("bitsandbytes."):
                other = "; load the model with dora_dist.load_quantized"
            held = [n for n in candidates if n.startswith(name + ".")]
            glob = f"; '*.{name.rpartition('.')[2]}.*' means those in it" if held else ""
            raise UserError(
                f"dora.targets: {name!r} is a {type(module).__name__}{other}; targets are Linear, Conv1D and "
                f"Embedding modules, and experts as one parameter{_such_as(held)}{glob}"
            )
        if inside(name, saved):
            raise UserError(f"dora.targets: {name!r} is trained in full by dora.modules_to_save already")


def _such_as(names: Iterable[str]) -> str:
    first = next(iter(names), None)
    return "" if first is None else f", such as {first!r}"


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


def output_heads(model: nn.Module) -> set[nn.Module]:
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


def _is_glob(pattern: str) -> bool:
    return not _GLOB.isdisjoint(pattern)
