"""Adapters as files in PEFT's format: written from shards without gathering the base, read, and merged.

files.py reads and writes the two files; peft_format.py knows what stands in them.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.adapters.files import (
    CONFIG,
    TENSORS,
    AdapterFiles,
    base_metadata,
    check_base,
    check_replaceable,
    read_adapter,
)
from dora_dist.adapters.peft_format import (
    PREFIX,
    adapted_layers,
    from_peft_config,
    frozen_tensors,
    stacked_tensors,
    to_peft_config,
    trained_tensors,
    value_for,
    zero_factors,
)
from dora_dist.dora.experts import DoraExperts, ExpertsForward, restore
from dora_dist.dora.inject import forget_injection, inject_dora, injection_of, is_sharded
from dora_dist.dora.layers import DoraEmbedding, DoraLayer
from dora_dist.dora.norm_cache import dora_layers, find_shards, refresh_norms
from dora_dist.errors import UserError, nearest
from dora_dist.io.durable import PARTIAL, NewFile, replaced, sweep, write_tensors
from dora_dist.io.fingerprint import Base
from dora_dist.io.headers import check_path, read_header
from dora_dist.parallel.gather import ShardedTensor, Stacked, finish, gathered
from dora_dist.parallel.shards import Rectangle, Shards, as_matrix


@torch.no_grad()
def save_adapter(
    model: nn.Module, directory: str | Path, base_model: str | None = None, shards: Shards | None = None
) -> None:
    """Write the adapter of an injected model, and what it was trained on where the model's injection knows it.
    Under sharding every rank calls it, and one writes.

    Args:
        base_model: what `base_model_name_or_path` shall say; default: what transformers knows the model as.
    """
    shards = shards or find_shards(model)
    shards.reshard(model)
    tensors, directory = adapter_tensors(model, shards), Path(directory)
    values = gathered(tensors, shards.sum_, shards.device)
    try:
        if shards.is_writer:
            directory.mkdir(parents=True, exist_ok=True)
            write_adapter(model, base_model, tensors, values, lambda name: replaced(directory / name))
    finally:
        finish(values)  # the other ranks gather, whatever the disk says


def try_saving(
    model: nn.Module, directory: str | Path, base_model: str | None = None, shards: Shards | None = None
) -> None:
    """Write the adapter in trial, to a directory inside `directory` that is removed again: what would fail at the
    end of training (names, shapes, space on the disk) fails here. Every rank calls it.

    Raises:
        OSError, UserError: it cannot be written there.
    """
    shards = shards or find_shards(model)
    directory = Path(directory)
    trial = directory / f"{PARTIAL}trial-{os.getpid()}"
    try:
        if shards.is_writer:
            sweep(directory)  # of a trial that was killed
        save_adapter(model, trial, base_model, shards)
        if shards.is_writer:
            check_replaceable(directory)
            read_header(trial / TENSORS)
    finally:
        if shards.is_writer:
            shutil.rmtree(trial, ignore_errors=True)
            with suppress(OSError):  # it holds an adapter, or cannot be made
                directory.rmdir()


def adapter_tensors(model: nn.Module, shards: Shards) -> list[ShardedTensor]:
    """What an adapter's file holds, in its order: the trained parameters, what PEFT wants besides, and zeros for
    factors that the model does not have."""
    tensors, stacked = [], stacked_tensors(model)
    for key, p in (*trained_tensors(model), *frozen_tensors(model)):
        own, shape = shards.rectangles(p), tuple(shards.shape(p))
        tensors.append(ShardedTensor(key, p.dtype, shape, own, shards.owns(p), stacked.get(key)))
    for key, shape in zero_factors(model).items():
        tensors.append(ShardedTensor(key, torch.float32, shape, [], owned=False, stacked=stacked.get(key)))
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def write_adapter(
    model: nn.Module,
    base_model: str | None,
    tensors: Sequence[ShardedTensor],
    values: Iterable[Tensor],
    new_file: Callable[[str], AbstractContextManager[NewFile]],
) -> None:
    """Write the two files of an adapter, each into what `new_file` opens by its name."""
    config = json.dumps(to_peft_config(model, base_model), indent=2).encode() + b"\n"
    base = injection_of(model).base
    with new_file(TENSORS) as file:
        write_tensors(file, [tensor.head for tensor in tensors], values, base_metadata(base) if base else {})
    with new_file(CONFIG) as file:
        file.write(config)


@torch.no_grad()
def load_adapter(
    model: nn.Module, directory: str | Path, shards: Shards | None = None, accept_other_base: bool = False
) -> nn.Module:
    """Read a PEFT adapter into `model`, injecting DoRA as its configuration says where that was not done yet.

    The model is not touched before the whole adapter has been checked. Cached norms are renewed. Under sharding
    every rank calls it, and reads its own part of each tensor.

    Args:
        accept_other_base: load also what names another base than the model's injection does.

    Raises:
        UserError: a file is missing or damaged, or the adapter does not fit the model: the tensor or setting
            is named.
    """
    directory = Path(directory)
    files = read_adapter(directory)
    shards = shards or find_shards(model)
    if dora_layers(model):
        base = injection_of(model).base
        check_base(directory, files.metadata, base, accept_other_base, tell=shards.is_writer)
        _check(directory, files, model, model, shards)
    else:
        dora_config = from_peft_config(files.config, files.tensors, model, directory / CONFIG)
        trial = model if is_sharded(model) else _meta_copy(model)  # inject_dora refuses a sharded one
        try:
            inject_dora(trial, dora_config)
        except UserError as error:
            raise UserError(f"{directory / CONFIG}: {error}") from None
        _check(directory, files, trial, model, shards)
        inject_dora(model, dora_config)
    shards.reshard(model)
    stacked = stacked_tensors(model)
    for key, parameter in trained_tensors(model):
        for own in shards.rectangles(parameter):
            own.values.copy_(_own_part(files.tensors[key], own, stacked.get(key)))
        shards.after_write(parameter)
    for layer in dora_layers(model).values():
        layer.mark_norm_stale()
    refresh_norms(model, shards)
    return model


def check_adapter_files(directory: str | Path, base: Base, accept_other_base: bool, key: str) -> None:
    """Raise a UserError that names the setting `key` unless `directory` holds a readable adapter of `base`."""
    check_path(directory, key)
    try:
        metadata = read_adapter(Path(directory)).metadata
        check_base(Path(directory), metadata, base, accept_other_base, tell=False)
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
    for module in model.modules():
        if isinstance(module, ExpertsForward) and any(isinstance(m, DoraExperts) for m in module.children()):
            restore(module)
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


def _check(directory: Path, files: AdapterFiles, injected: nn.Module, model: nn.Module, shards: Shards) -> None:
    """That the adapter fits `injected`: `model` or, while that is bare, a trial copy of it without values."""
    path, tensors = directory / TENSORS, files.tensors
    wanted, stacked = dict(trained_tensors(injected)), stacked_tensors(injected)
    seen: dict[Tensor, str] = {}
    for key, parameter in wanted.items():
        if key not in tensors:
            raise UserError(f"{path}: {key!r} is missing; {nearest(key, tensors)}")
        values = tensors[key]
        needed = shards.shape(parameter)
        if key in stacked:
            needed = stacked[key].file_shape(needed)
        if values.shape != needed:
            raise UserError(f"{path}: {key!r} is {list(values.shape)}, the model needs {list(needed)}")
        other = seen.setdefault(parameter, key)
        if other != key and not torch.equal(values, tensors[other]):
            raise UserError(f"{path}: {key!r} and {other!r} differ, but in the model they are one tied weight")
    faults: dict[str, bool] = {}  # in this rank's part
    for key, parameter in wanted.items():
        parts = (_own_part(tensors[key], own, stacked.get(key)) for own in shards.rectangles(parameter))
        faults[key] = not tensors[key].is_floating_point() or not all(part.isfinite().all() for part in parts)
    zeros, frozen = zero_factors(injected), dict(model.named_parameters(remove_duplicate=False))
    for key in (key for key in tensors if key not in wanted):
        stands_in = key in zeros and not tensors[key].any()
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")  # PEFT adds frozen weights to its files
        faults[key] = not stands_in and not (name in frozen and _equal(frozen[name], tensors[key], shards))
    found = torch.tensor([float(fault) for fault in faults.values()], device=shards.device)
    shards.sum_(found)  # a fault in one rank's part is all ranks' error
    for key, count in zip(faults, found.tolist(), strict=True):
        if count and key in wanted:
            raise UserError(f"{path}: {key!r} holds NaN, infinite or whole values")
        if count:
            raise UserError(f"{path}: {key!r} belongs to no adapted module of this model, nor is it the base's")
    _check_settings(directory / CONFIG, files.config, injected)


def _own_part(stored: Tensor, own: Rectangle, stacked: Stacked | None) -> Tensor:
    """What a file's tensor, which is mapped, has for a rank's rectangle."""
    rows = as_matrix(stored)[own.rows] if stacked is None else stacked.from_file(stored, own.rows)
    return rows[:, own.cols]


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
    parts = ((own.values, _own_part(values, own, None)) for own in shards.rectangles(parameter))
    return all(torch.equal(own, part.to(own)) for own, part in parts)
