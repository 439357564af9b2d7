"""Adapters as files in PEFT's format: written from shards without gathering the base, read, and merged.

`adapter_model.safetensors` and `adapter_config.json`; peft_format.py knows what stands in them.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_dist.errors import UserError, nearest
from dora_dist.inject import forget_injection, inject_dora, injection_of, is_sharded
from dora_dist.layers import DoraEmbedding, DoraLayer
from dora_dist.norms import dora_layers, find_shards, refresh_norms
from dora_dist.peft_format import (
    OWN_TYPE,
    PREFIX,
    adapted_layers,
    from_peft_config,
    frozen_tensors,
    to_peft_config,
    trained_tensors,
    value_for,
    zero_factors,
)
from dora_dist.shards import Shards, as_matrix, write_whole

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_GATHER_BYTES = 256 << 20  # of whole tensors at a time: a large trained embedding is not all gathered twice


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
    tensors: dict[str, Tensor] = {}
    for key, whole in _gathered(chain(trained_tensors(model), frozen_tensors(model)), shards):
        if shards.is_writer:
            tensors[key] = whole.cpu().contiguous()
    if not shards.is_writer:
        return
    tensors = _without_aliases({**tensors, **zero_factors(model)})
    config = json.dumps(to_peft_config(model, base_model), indent=2) + "\n"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / _TENSORS, lambda path: save_file(tensors, path, {"format": "pt"}))
    _replace(directory / _CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path, shards: Shards | None = None) -> nn.Module:
    """Read a PEFT adapter into `model`, injecting DoRA as its configuration says where that was not done yet.

    The model is not touched before the whole adapter has been checked. Cached norms are renewed.

    Raises:
        UserError: a file is missing or damaged, or the adapter does not fit the model: the tensor or setting
            is named.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    shards = shards or find_shards(model)
    if dora_layers(model):
        _check(directory, config, tensors, model, model, shards)
    else:
        dora_config = from_peft_config(config, tensors, model, directory / _CONFIG)
        trial = model if is_sharded(model) else _meta_copy(model)  # inject_dora refuses a sharded one
        _check(directory, config, tensors, inject_dora(trial, dora_config), model, shards)
        inject_dora(model, dora_config)
    shards.settle(model)
    for key, parameter in trained_tensors(model):
        write_whole(parameter, tensors[key], shards)
    for layer in dora_layers(model).values():
        layer.mark_norm_stale()
    refresh_norms(model, shards)
    return model


def check_adapter_files(directory: str | Path, key: str) -> None:
    """Raise a UserError that names the setting `key` unless `directory` holds a readable adapter."""
    try:
        _read(Path(directory))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Replace every DoRA layer by the plain layer with the merged weight, in place, and return the model.

    A weight tied to another module is merged into a copy: the other keeps the base's. `modules_to_save` go
    back to the base's dtype.

    Raises:
        UserError: the model is sharded; merge an unsharded copy (load the base, `load_adapter`, then this).
    """
    injection_of(model)
    if is_sharded(model):
        raise UserError(
            "merge_adapter needs whole weights, but this model is sharded: save_adapter, load the base "
            "model in one process, load_adapter into it, and merge there"
        )
    unties = _adapts_a_tied_weight(model)
    plain = {layer: _plain_layer(layer) for layer in dora_layers(model).values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, DoraLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain[module])
    if unties:
        for module in model.modules():
            if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
                module.config.tie_word_embeddings = False  # type: ignore[union-attr]
    forget_injection(model)
    return model


def _plain_layer(layer: DoraLayer) -> nn.Module:
    weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
    plain: nn.Module
    with torch.device("meta"):
        if isinstance(layer, DoraEmbedding):
            plain = nn.Embedding(layer.in_features, layer.out_features, layer.padding_idx)
        elif layer.transposed:
            from transformers.pytorch_utils import Conv1D

            plain = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = weight
    if not isinstance(plain, nn.Embedding):
        plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)


def _adapts_a_tied_weight(model: nn.Module) -> bool:
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return any(owners[layer.weight] > 1 for layer in dora_layers(model).values())


def _meta_copy(model: nn.Module) -> nn.Module:
    """The model's structure without its values, to try an injection on."""
    tensors = chain(model.parameters(), model.buffers())
    empty = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    for p in model.parameters():
        empty[id(p)] = nn.Parameter(empty[id(p)], requires_grad=p.requires_grad)
    return copy.deepcopy(model, empty)


def _gathered(named: Iterator[tuple[str, nn.Parameter]], shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by key, gathered in batches of bounded size."""
    batch: dict[str, Tensor] = {}
    held = 0
    for key, parameter in named:
        size = shards.shape(parameter).numel() * 4
        if batch and held + size > _GATHER_BYTES:
            yield from zip(batch, shards.gather(list(batch.values())), strict=True)
            batch, held = {}, 0
        batch[key] = parameter
        held += size
    yield from zip(batch, shards.gather(list(batch.values())), strict=True)


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied weight stands in the file once for each of its names; safetensors refuses shared memory."""
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(tensor.data_ptr(), key)
    return {key: t if first[t.data_ptr()] == key else t.clone() for key, t in tensors.items()}


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config_path, weights_path = directory / _CONFIG, directory / _TENSORS
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{directory}: not a PEFT adapter: {path.name} is missing")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path}: not valid JSON: {error}") from None
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights_path}: not a readable safetensors file: {error}") from None
    for key, kind in (("peft_type", str), ("r", int), ("lora_alpha", int | float)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise UserError(f"{config_path}: {key!r} is missing or of the wrong type")
    if config["peft_type"] not in ("LORA", OWN_TYPE):
        raise UserError(f"{config_path}: peft_type {config['peft_type']!r} is not supported; LORA is")
    has_magnitudes = any(key.endswith("lora_magnitude_vector") for key in tensors)
    if has_magnitudes != bool(config.get("use_dora")):
        raise UserError(
            f"{config_path}: use_dora is {config.get('use_dora')}, but {weights_path.name} holds "
            f"{'magnitudes' if has_magnitudes else 'no magnitudes'}"
        )
    return config, tensors


def _check(
    directory: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    injected: nn.Module,
    model: nn.Module,
    shards: Shards,
) -> None:
    """That the adapter fits `injected`: `model` or, while that is bare, a trial copy of it without values."""
    path = directory / _TENSORS
    wanted = dict(trained_tensors(injected))
    seen: dict[Tensor, str] = {}
    for key, parameter in wanted.items():
        if key not in tensors:
            raise UserError(f"{path}: {key!r} is missing; {nearest(key, tensors)}")
        values = tensors[key]
        needed = shards.shape(parameter)
        if values.shape != needed:
            raise UserError(f"{path}: {key!r} is {list(values.shape)}, the model needs {list(needed)}")
        if not values.is_floating_point() or not torch.isfinite(values).all():
            raise UserError(f"{path}: {key!r} holds NaN, infinite or whole values")
        other = seen.setdefault(parameter, key)
        if not torch.equal(values, tensors[other]):
            raise UserError(f"{path}: {key!r} and {other!r} differ, but in the model they are one tied weight")
    zeros = zero_factors(injected)
    frozen = dict(model.named_parameters(remove_duplicate=False))
    for key in tensors.keys() - wanted.keys():
        stands_in = key in zeros and not tensors[key].any()
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")  # PEFT adds frozen weights to its files
        if not stands_in and not (name in frozen and _equal(frozen[name], tensors[key], shards)):
            raise UserError(f"{path}: {key!r} belongs to no adapted module of this model, nor is it the base's")
    _check_settings(directory / _CONFIG, config, injected)


def _check_settings(path: Path, config: dict[str, Any], model: nn.Module) -> None:
    """An adapter of another scaling or axis would load without complaint and compute something else."""
    axis = config.get("magnitude_axis", "out")
    for name, layer in adapted_layers(model).items():
        rank, alpha = layer.spec.rank, value_for(name, "alpha", config)
        if layer.magnitude is not None and layer.spec.axis != axis:
            raise UserError(f"{path}: has magnitudes of axis {axis!r}, the model of {layer.spec.axis!r}")
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank) if rank else layer.spec.scaling
        if abs(scaling - layer.spec.scaling) > 1e-6 * scaling:
            raise UserError(
                f"{path}: scales {name!r} by {scaling:g}, the model by {layer.spec.scaling:g}; set "
                "dora.alpha, dora.rank and dora.rslora as the adapter has them"
            )


def _equal(parameter: Tensor, values: Tensor, shards: Shards) -> bool:
    if shards.shape(parameter) != values.shape:
        return False
    matrix = as_matrix(values)
    parts = ((own.values, matrix[own.rows, own.cols]) for own in shards.rectangles(parameter))
    return all(torch.equal(own, part.to(own)) for own, part in parts)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
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
