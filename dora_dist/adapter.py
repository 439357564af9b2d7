"""Adapters in PEFT's file format: written from shards without gathering the base, read, and merged.

`adapter_model.safetensors` and `adapter_config.json`; docs/adapters.md lists the keys. What PEFT cannot express
(one magnitude per input feature) is written under a `peft_type` of our own, so that PEFT refuses it instead of
loading it wrong.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_dist.config import DoraConfig
from dora_dist.errors import UserError, nearest
from dora_dist.inject import inject_dora, injection_of
from dora_dist.layers import DoraEmbedding, DoraLayer
from dora_dist.norms import dora_layers, find_shards, refresh_norms
from dora_dist.shards import Shards, write_whole

_PREFIX = "base_model.model."
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "LMHeadModel": "CAUSAL_LM"}
_OWN_TYPE = "DORA_DIST"
_GATHER_BYTES = (
    256 << 20
)  # of whole tensors at a time, so that a large trained embedding is not all gathered twice


@torch.no_grad()
def save_adapter(
    model: nn.Module, directory: str | Path, base_model: str | None = None, shards: Shards | None = None
) -> None:
    """Write the adapter of an injected model. Under sharding every rank calls it, and one writes.

    Args:
        base_model: what `base_model_name_or_path` shall say; default: what transformers knows the model as.
    """
    injection_of(model)
    shards = shards or find_shards(model)
    shards.settle(model)
    tensors = {key: t.cpu().contiguous() for key, t in _gathered(_named_tensors(model), shards)}
    if not shards.is_writer:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for layer in dora_layers(model).values():
        if layer.lora_A is None:
            tensors.update(_zero_factors(model, layer))
    config = _peft_config(model, base_model)
    _replace(directory / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    _replace(
        directory / "adapter_config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n")
    )


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path, shards: Shards | None = None) -> nn.Module:
    """Read a PEFT adapter into `model`, injecting DoRA as its configuration says where that was not done yet.

    Nothing is written to the model before the whole file has been checked. Cached norms are renewed.

    Raises:
        UserError: a file is missing or damaged, or the adapter does not fit the model: tensor, shape, dtype kind,
            scaling or method are named.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    if not dora_layers(model):
        inject_dora(model, _dora_config(config, tensors, directory))
    wanted = dict(_named_tensors(model))
    _check_tensors(directory, tensors, wanted, model)
    _check_scalings(directory, config, model)
    shards = shards or find_shards(model)
    shards.settle(model)
    for key, parameter in wanted.items():
        write_whole(parameter, tensors[key], shards)
    for layer in dora_layers(model).values():
        layer.mark_norm_stale()
    refresh_norms(model, shards)
    return model


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Replace every DoRA layer by the plain layer with the merged weight, in place, and return the model.

    A weight tied to another module is merged into a copy: the other keeps the base's.

    Raises:
        UserError: the model is sharded; merge an unsharded copy (load the base, `load_adapter`, then this).
    """
    layers = dora_layers(model)
    injection_of(model)
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise UserError(
            "merge_adapter needs whole weights, but this model is sharded: save_adapter, load the base "
            "model in one process, load_adapter into it, and merge there"
        )
    plain = {layer: _plain_layer(layer) for layer in layers.values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, DoraLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain[module])
    if any(isinstance(layer, DoraEmbedding) for layer in plain) and hasattr(model, "config"):
        model.config.tie_word_embeddings = False  # the head, if it was tied, kept the base's weight
    del model.dora
    return model


def _plain_layer(layer: DoraLayer) -> nn.Module:
    weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
    if isinstance(layer, DoraEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=layer.padding_idx)
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
        plain.bias = layer.bias  # type: ignore[assignment]
    else:
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.bias = layer.bias
    plain.weight = weight
    return plain.train(layer.training)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by their key in PEFT's file."""
    for name, layer in dora_layers(model).items():
        infix = "lora_embedding_{}" if isinstance(layer, DoraEmbedding) else "lora_{}.weight"
        for letter, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
            if factor is not None:
                yield f"{_PREFIX}{name}.{infix.format(letter)}", factor
        if layer.magnitude is not None:
            yield f"{_PREFIX}{name}.lora_magnitude_vector", layer.magnitude
    for name in injection_of(model).saved:
        for suffix, parameter in model.get_submodule(name).named_parameters():
            yield f"{_PREFIX}{name}.{suffix}", parameter


def _zero_factors(model: nn.Module, layer: DoraLayer) -> dict[str, Tensor]:
    """PEFT has no magnitude without A and B: rank 1 zeros stand in."""
    name = next(n for n, other in dora_layers(model).items() if other is layer)
    infix = "lora_embedding_{}" if isinstance(layer, DoraEmbedding) else "lora_{}.weight"
    return {
        f"{_PREFIX}{name}.{infix.format('A')}": torch.zeros(1, layer.in_features),
        f"{_PREFIX}{name}.{infix.format('B')}": torch.zeros(layer.out_features, 1),
    }


def _gathered(named: Iterator[tuple[str, nn.Parameter]], shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by key, gathered in batches of bounded size."""
    batch: dict[str, nn.Parameter] = {}
    held = 0
    for key, parameter in named:
        if batch and held + parameter.numel() * 4 > _GATHER_BYTES:
            yield from zip(batch, shards.gather(list(batch.values())), strict=True)
            batch, held = {}, 0
        batch[key] = parameter
        held += parameter.numel() * 4
    yield from zip(batch, shards.gather(list(batch.values())), strict=True)


def _peft_config(model: nn.Module, base_model: str | None) -> dict[str, Any]:
    injection = injection_of(model)
    config, layers = injection.config, dora_layers(model)
    ranks = {name: max(1, layer.spec.rank) for name, layer in layers.items()}
    root = config.rank
    alphas = {
        n: layer.spec.scaling * (ranks[n] ** 0.5 if config.rslora else ranks[n])
        for n, layer in layers.items()
    }
    suffixes = {name.rpartition(".")[2] for name in layers}
    class_name = type(model).__name__
    task = next((task for suffix, task in _TASK_TYPES.items() if class_name.endswith(suffix)), None)
    return {
        "peft_type": "LORA" if config.magnitude_axis == "out" else _OWN_TYPE,
        "task_type": task,
        "base_model_name_or_path": base_model
        or getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": root,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.method == "dora",
        "use_rslora": config.rslora,
        "fan_in_fan_out": any(
            layer.transposed and not isinstance(layer, DoraEmbedding) for layer in layers.values()
        ),
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(layers if injection.ambiguous_suffixes else suffixes),
        "modules_to_save": sorted(injection.saved) or None,
        "rank_pattern": {n: r for n, r in ranks.items() if r != root},
        "alpha_pattern": {n: _tidy(a) for n, a in alphas.items() if abs(a - config.alpha) > 1e-9 * a},
        **({} if config.magnitude_axis == "out" else {"magnitude_axis": config.magnitude_axis}),
    }


def _dora_config(config: dict[str, Any], tensors: dict[str, Tensor], directory: Path) -> DoraConfig:
    """The DoraConfig that an adapter's own configuration describes."""
    unsupported = [
        k
        for k in ("layers_to_transform", "exclude_modules", "use_qalora", "trainable_token_indices")
        if config.get(k)
    ]
    if unsupported or config.get("bias", "none") != "none":
        raise UserError(
            f"{directory / 'adapter_config.json'}: {(unsupported or ['bias'])[0]!r} is not supported"
        )
    targets = config.get("target_modules") or []
    adapted = {key[len(_PREFIX) :].split(".lora_")[0] for key in tensors if ".lora_" in key}
    return DoraConfig(
        method="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=sorted(adapted) if isinstance(targets, str) else list(targets),
        rslora=config.get("use_rslora", False),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=list(config.get("modules_to_save") or []),
        magnitude_axis=config.get("magnitude_axis", "out"),
    )


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config_path, weights_path = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{directory}: not a PEFT adapter: {path.name} is missing")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        tensors = load_file(weights_path)
    except ValueError as error:
        raise UserError(f"{config_path}: not valid JSON: {error}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights_path}: not a readable safetensors file: {error}") from None
    for key in ("r", "lora_alpha", "peft_type"):
        if not isinstance(config, dict) or key not in config:
            raise UserError(f"{config_path}: {key!r} is missing")
    if config["peft_type"] not in ("LORA", _OWN_TYPE):
        raise UserError(f"{config_path}: peft_type {config['peft_type']!r} is not supported; LORA is")
    has_magnitudes = any(key.endswith("lora_magnitude_vector") for key in tensors)
    if has_magnitudes != bool(config.get("use_dora")):
        raise UserError(
            f"{config_path}: use_dora is {config.get('use_dora')}, but {weights_path.name} holds "
            f"{'magnitudes' if has_magnitudes else 'no magnitudes'}"
        )
    return config, tensors


def _check_tensors(
    directory: Path, tensors: dict[str, Tensor], wanted: dict[str, nn.Parameter], model: nn.Module
) -> None:
    path = directory / "adapter_model.safetensors"
    stand_ins = {
        k
        for layer in dora_layers(model).values()
        if layer.lora_A is None
        for k in _zero_factors(model, layer)
    }
    for key, parameter in wanted.items():
        if key not in tensors:
            raise UserError(f"{path}: {key!r} is missing; {nearest(key, tensors)}")
        if tensors[key].shape != parameter.shape:
            raise UserError(
                f"{path}: {key!r} is {list(tensors[key].shape)}, the model needs {list(parameter.shape)}"
            )
        if not torch.isfinite(tensors[key]).all():
            raise UserError(f"{path}: {key!r} holds NaN or infinite values")
    for key in tensors.keys() - wanted.keys():
        if key not in stand_ins or tensors[key].any():
            raise UserError(f"{path}: {key!r} belongs to no adapted module of this model")


def _check_scalings(directory: Path, config: dict[str, Any], model: nn.Module) -> None:
    """An adapter trained with another scaling would load without complaint and compute something else."""
    from dora_dist.inject import matches

    for name, layer in dora_layers(model).items():
        if not layer.spec.rank:
            continue
        pattern = matches(name, config.get("alpha_pattern") or {})
        alpha = config["alpha_pattern"][pattern] if pattern else config["lora_alpha"]
        scaling = alpha / (layer.spec.rank**0.5 if config.get("use_rslora") else layer.spec.rank)
        if abs(scaling - layer.spec.scaling) > 1e-6 * scaling:
            raise UserError(
                f"{directory / 'adapter_config.json'}: scales {name!r} by {scaling:g}, the model by "
                f"{layer.spec.scaling:g}; set dora.alpha, dora.rank and dora.rslora as the adapter has them"
            )


def _replace(path: Path, write) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _tidy(value: float) -> float:
    return int(value) if float(value).is_integer() else value
