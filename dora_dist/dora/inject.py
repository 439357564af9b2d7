"""Put DoRA into a model: swap modules for DoRA layers over the same weights, and freeze the rest.

Works on any nn.Module, on the meta device too. Nothing is changed before everything has been checked.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_dist.config import DoraConfig
from dora_dist.dora.experts import DoraExperts, complete, own_parameter
from dora_dist.dora.layers import AdapterSpec, DoraEmbedding, DoraLayer, DoraLinear
from dora_dist.dora.targets import Choice, Projection, choose, inside, is_conv1d, rank_and_alpha, shape_of
from dora_dist.errors import UserError
from dora_dist.io.fingerprint import Base
from dora_dist.quant.modules import BaseWeight, FrozenExperts, PackedLinear


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
    too_small: tuple[str, ...] = ()  # modules that all-linear or a glob means, but whose rank exceeds a side
    halved: tuple[str, ...] = ()  # gate_up_proj of experts where only gate_proj or up_proj is named


def inject_dora(
    model: nn.Module, config: DoraConfig, base: Base | None = None, idle: Collection[str] = ()
) -> nn.Module:
    """Swap the targets of `config` for DoRA layers, in place, and return the model.

    Targets are nn.Linear (and subclasses that compute the same), transformers' Conv1D (GPT-2) and nn.Embedding
    modules, and a mixture's experts whose matrices are one parameter (experts.py). The layers share the model's
    weights; afterwards only A, B, the magnitudes and `modules_to_save` (held in fp32) require gradients. At first
    the model computes what it computed before. On the meta device values are left to `initialize_adapters`.
    transformers' `save_pretrained` is refused until the adapters are merged: what it writes would lose them.

    Args:
        base: what the model is; `save_adapter` writes it down, and `load_adapter` refuses adapters of another.
        idle: modules that take no part in the loss: left out, unless a name or glob means nothing else.

    Raises:
        UserError: a name matches nothing (the closest names are given), a module is of another kind, a rank
            exceeds a side of a layer that was named (those that all-linear or a glob means are left out), a name
            means idle modules alone, or the model was injected or sharded before.
    """
    if any(isinstance(m, DoraLayer) for m in model.modules()):
        raise UserError("the model already has DoRA layers; inject_dora works once per model")
    if is_sharded(model):
        raise UserError(
            "the model is sharded already: call inject_dora first, then fully_shard or deepspeed.initialize"
        )
    chosen = _trainable(model, choose(model, config, set(idle)))
    targets, saved = chosen.targets, chosen.saved
    specs = {name: _spec(name, module, name in chosen.magnitude_only, config) for name, module in targets.items()}

    model.requires_grad_(False)
    replaced: dict[nn.Module | Projection, DoraLayer] = {}
    for name, module in targets.items():
        replaced[module] = replaced.get(module) or _make_layer(module, specs[name])
        set_module(model, name, replaced[module])
    for projection in targets.values():
        if isinstance(projection, Projection) and projection.layout is not None:
            complete(projection.experts, projection.layout)
    dtypes = {
        name: parameter.dtype  # before ties are widened
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if inside(name, saved)
    }
    narrow = {name: _narrowest_dtype(model.get_submodule(name)) for name in saved}
    casts = [h for name, dtype in narrow.items() for h in _train_in_full(model.get_submodule(name), dtype)]
    apart = (tuple(names) for names in (chosen.left_out, chosen.too_small, chosen.halved))
    model.dora = Injection(config, tuple(targets), tuple(saved), dtypes, tuple(casts), base, *apart)  # type: ignore[assignment]
    for module in _transformers_models(model):
        module.save_pretrained = _refuse_to_save
    return model


def forget_injection(model: nn.Module) -> None:
    """The modules trained in full go back to the base's dtype, and the model no longer counts as injected."""
    injection = injection_of(model)
    for cast in injection.casts:
        cast.remove()
    for name, dtype in injection.saved_dtypes.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    for module in _transformers_models(model):
        module.__dict__.pop("save_pretrained", None)
    del model.dora


def _transformers_models(model: nn.Module) -> list[Any]:
    """The model and its parts that transformers could save by themselves."""
    return [module for module in model.modules() if hasattr(module, "save_pretrained")]


def _refuse_to_save(*_: object, **__: object) -> None:
    """transformers would write our layers' tensors beside the base's config.json, and reading that gives the base
    without its adapter, or nothing: it cannot undo its fusing of experts."""
    raise UserError(
        "save_pretrained: from_pretrained would not read the adapter; save_adapter(model, directory) writes it, "
        "merge_adapter(model) leaves a plain model to save, `dora-dist merge` writes a run's merged model, and "
        "transformers' trainers save the adapter with DoraTrainerMixin"
    )


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


def _spec(name: str, module: nn.Module | Projection, magnitude_only: bool, config: DoraConfig) -> AdapterSpec:
    rank, alpha = rank_and_alpha(name, config)
    shape = shape_of(module)
    if magnitude_only:
        rank = 0
    elif rank > min(shape):
        raise UserError(
            f"dora.rank: {rank} is larger than the smaller side of {name!r} {shape}; "
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


def _trainable(model: nn.Module, chosen: Choice) -> Choice:
    """The same. UserError: what is to be trained in full is in 4 bits."""
    for name, module in model.named_modules():
        if isinstance(module, BaseWeight) and module.layout is not None and inside(name, chosen.saved):
            raise UserError(f"dora.modules_to_save: {name!r} is in 4 bits; load it with quant.skip: [{name}]")
    return chosen


def _make_layer(module: nn.Module | Projection, spec: AdapterSpec) -> DoraLayer:
    layer: DoraLayer
    if isinstance(module, Projection):
        assert module.layout is not None
        weight = own_parameter(module.experts, module.key, module.layout)
        layer = DoraExperts(weight, spec, module.layout.num_experts).train(module.experts.training)
    elif isinstance(module, FrozenExperts):
        layer = DoraExperts(module.without_values(), spec, module.num_experts).train(module.training)
        layer.hold(module)
    elif isinstance(module, PackedLinear):
        layer = DoraLinear(module.without_values(), module.bias, spec, module.transposed).train(module.training)
        layer.hold(module)
    elif isinstance(module, nn.Embedding):
        layer = DoraEmbedding(module.weight, spec, module.padding_idx)  # type: ignore[arg-type]
        layer.train(module.training)
    else:
        layer = DoraLinear(module.weight, module.bias, spec, transposed=is_conv1d(module))  # type: ignore[arg-type]
        layer.train(module.training)
    if not layer.weight.is_meta:
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


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner._parameters.pop(attribute, None)  # a projection of experts
    setattr(owner, attribute, module)
