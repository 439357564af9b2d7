"""The one order in which a run's model is made:

    meta model -> inject DoRA -> shard -> read this rank's weights -> magnitudes -> norms

Parameters stay on the meta device until they are sharded, so no rank ever holds more than its own part and the
tensor it is reading. Buffers (rotary frequencies) are real from the start: they are computed, not loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.adapters.adapter import check_adapter_files, load_adapter
from dora_dist.config import RunConfig
from dora_dist.device import free_host_memory
from dora_dist.dora.experts import exclude_from_compilation
from dora_dist.dora.inject import inject_dora
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_cache import cache_norms, initialize_adapters
from dora_dist.errors import UserError
from dora_dist.io.fingerprint import Base, base_fingerprint
from dora_dist.models.coverage import coverage
from dora_dist.models.files import SafetensorsFiles
from dora_dist.models.head_loss import HeadLoss, attach_head_loss, has_plain_logits
from dora_dist.models.huggingface import check_model, classifier_head, load_with_transformers, meta_model
from dora_dist.models.participation import idle_modules
from dora_dist.models.quantize import pack_linears
from dora_dist.models.weights import (
    base_tensors,
    check_shapes,
    fill_random,
    load_slices,
    load_whole,
    missing_from,
)
from dora_dist.parallel.deepspeed_config import Sizes
from dora_dist.parallel.fsdp import Fsdp
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Shards, blocks
from dora_dist.parallel.strategy import Strategy
from dora_dist.quant.bitsandbytes_files import CODES_WITH_SCALES, check_quantization, find_four_bit


@dataclass(frozen=True)
class Blueprint:
    """The model on the meta device, DoRA in place, everything checked that can be checked without weights."""

    config: RunConfig
    model: nn.Module
    files: SafetensorsFiles | None  # None: random weights
    head: tuple[str, ...]  # a classifier's head: its modules outside the base model, trained in full
    base: Base
    head_loss: HeadLoss | None = None  # a causal model's, where the loss may take the logits' place
    all_take_part: bool = True  # in the loss, the trained modules; False: not known yet
    coverage: tuple[str, ...] = ()  # lines on which share of the base is adapted, and what is not


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the injected model, its weights read."""

    model: nn.Module
    shards: Shards
    head_loss: HeadLoss | None  # see Blueprint
    all_take_part: bool  # see Blueprint


def make_blueprint(config: RunConfig, directory: Path, world_size: int = 1, from_files: bool = True) -> Blueprint:
    """The injected meta model of a run. Reads config.json and the headers of the weight files, no weight; without
    `from_files` config.json alone."""
    from_files = from_files and config.model.init == "pretrained"
    quantized = check_quantization(directory, config.quant) if from_files else {}
    model = meta_model(config.model, directory)
    check_model(model, config.model.task, config.data.packing, config.train.activation_checkpointing)
    files = open_files(model, directory, config.model.allow_pickle, quantized) if from_files else None
    base = Base(base_fingerprint(files, directory, config.train.seed), str(config.quant))
    if config.dora.init_from is not None and from_files:
        check_adapter_files(config.dora.init_from, base, config.dora.accept_other_base, "dora.init_from")
    plain_logits = config.model.causal and has_plain_logits(model)
    head = () if config.model.causal else classifier_head(model)
    saved = [*config.dora.modules_to_save, *(h for h in head if h not in config.dora.modules_to_save)]
    idle = idle_modules(model, config.dora.modules_to_save)
    inject_dora(model, replace(config.dora, modules_to_save=saved), base, idle or ())
    told = tuple(coverage(model, idle or ()))
    if config.quant.scheme == "nf4":
        split = world_size if config.parallel.strategy == "zero3" else 1
        pack_linears(model, config.quant, split, files.block_sizes() if files is not None else {})
    if files is not None:
        files.take_stacks(model)
    head_loss = attach_head_loss(model) if plain_logits else None
    return Blueprint(config, model, files, head, base, head_loss, idle is not None, told)


def open_files(
    model: nn.Module, directory: Path, allow_pickle: bool, quantized: Mapping[str, Any]
) -> SafetensorsFiles:
    """The weight files of a model that is as transformers makes it. `quantized`: what config.json says of them."""
    files = SafetensorsFiles(directory, allow_pickle)
    if quantized.get("quant_method") in CODES_WITH_SCALES:
        files.take_scaled(quantized)
    elif quantized:
        files.take_four_bit(find_four_bit(files))
    if missing_from(files, model) and not files.four_bit:
        files.take_names(model)
    check_shapes(files, model)
    return files


def sizes_of(model: nn.Module) -> Sizes:
    """What the choice of a strategy needs to know."""
    weights = sum(t.nbytes for t in base_tensors(model).values())
    block = max((sum(p.numel() for p in block.parameters()) for block in blocks(model)), default=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(weights, block or sum(p.numel() for p in model.parameters()), trained)


def build(blueprint: Blueprint, strategy: Strategy) -> ShardedModel:
    """Shard the blueprint's model, and read this rank's weights."""
    config, model = blueprint.config, blueprint.model
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    shard(model, strategy, blueprint.head_loss)
    materialize(model, strategy.parameter, strategy.processes.device)
    shards = strategy.shards(model)
    _load(blueprint, shards, strategy.processes)
    strategy.processes.wait_for_all()  # some disks are slower than others
    initialize_adapters(model, config.train.seed, shards)
    if config.dora.init_from is not None:
        load_adapter(model, config.dora.init_from, shards, config.dora.accept_other_base)
    cache_norms(model, shards)  # the training loop renews them, and times it
    if config.train.compile:
        exclude_from_compilation()
        for block in blocks(model):
            block.compile()
    return ShardedModel(model, shards, blueprint.head_loss, blueprint.all_take_part)


def shard(model: nn.Module, strategy: Strategy, head_loss: HeadLoss | None) -> None:
    """Shard a model that is on the meta device."""
    strategy.shard(model)
    if head_loss is not None and isinstance(strategy, Fsdp):
        head = model.get_output_embeddings()  # type: ignore[operator]
        strategy.gather_in_backward_if(head, head_loss.backward_reads_head)


@torch.no_grad()
def materialize(
    model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter], buffer_device: torch.device
) -> None:
    """Replace meta parameters by what `make` makes of them, keeping ties, and move buffers. Norms and what a
    checkpoint holds are left without values, to be computed and loaded."""
    real: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in real:
                    real[parameter] = make(parameter)
                module._parameters[name] = real[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer.is_meta:
                    computed = isinstance(module, DoraLayer) and name == "norm"
                    assert computed or name not in module._non_persistent_buffers_set, f"{name} would be garbage"
                    buffer = torch.empty_like(buffer, device=buffer_device)
                module._buffers[name] = buffer.to(buffer_device)


def _read_whole(blueprint: Blueprint) -> list[str]:
    """The base tensors for which transformers must load all: no part of the files is known to hold them.

    Raises:
        UserError: it could not, as the files are quantized.
    """
    files, heads = blueprint.files, tuple(f"{name}." for name in blueprint.head)
    missing = [] if files is None else missing_from(files, blueprint.model)
    missing = [name for name in missing if not name.startswith(heads)]
    if missing and files is not None and (files.four_bit or files.scaled):
        raise UserError(
            f"model.path: {str(files.directory)!r} is quantized and holds no tensor {missing[0]!r}; where names "
            "differ from the model's, only 16-bit checkpoints can be loaded"
        )
    return missing


def describe_loading(blueprint: Blueprint) -> list[str]:
    """A line where the base will be loaded whole, which takes host memory."""
    missing, files = _read_whole(blueprint), blueprint.files
    if not missing or files is None:
        return []
    reason = "these are pickles" if files.pickled else f"{missing[0]!r} cannot be read from them by slices"
    memory = f"{files.bytes / 1e9:,.1f} GB of host memory, of which {free_host_memory() / 1e9:,.1f} GB are free"
    return [f"rank 0 loads all weights in {str(files.directory)!r}, as {reason}: that takes {memory}"]


def _load(blueprint: Blueprint, shards: Shards, processes: Processes) -> None:
    config, model, files = blueprint.config.model, blueprint.model, blueprint.files
    std = getattr(model.config, "initializer_range", 0.02)
    seed = blueprint.config.train.seed
    if files is None:
        fill_random(model, base_tensors(model), seed, std, shards)
        return
    if _read_whole(blueprint):
        load_whole(model, partial(load_with_transformers, config, files, blueprint.head), shards, processes)
        return
    load_slices(model, files, shards, processes.device)
    fill_random(model, missing_from(files, model), seed, std, shards)
