"""A model of transformers over a 4-bit base, for loops that are not ours."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_dist.config import ModelConfig, QuantConfig
from dora_dist.dora.targets import inside, is_linear
from dora_dist.errors import UserError
from dora_dist.io.headers import read_json
from dora_dist.models.build import materialize, open_files
from dora_dist.models.files import SafetensorsFiles
from dora_dist.models.huggingface import check_model, classifier_head, meta_model, resolve_model
from dora_dist.models.quantize import pack_linears
from dora_dist.models.weights import fill_random, load_slices, missing_from
from dora_dist.parallel.shards import Whole
from dora_dist.quant.bitsandbytes_files import check_quantization


def load_quantized(
    model: str | Path,
    quant: QuantConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    task: Any = "causal_lm",
    num_labels: int | None = None,
    attention: Any = "sdpa",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A transformers model with linear layers and experts in 4 bits (NF4), for `inject_dora` or `load_adapter` and
    whatever trains it then: accelerate, DeepSpeed, transformers' Trainer with `DoraTrainerMixin`.

    A process reads a few rows at a time and holds the 4-bit model and little else. Where accelerate has one rank
    load (`cpu_ram_efficient_loading`), the others read nothing and hold zeros until that rank sends them its own.

    Args:
        model: a directory in Hugging Face layout, or a hub id; safetensors in 16 or 32 bits, FP8, MXFP4, or in
            bitsandbytes' nf4.
        quant: default: `QuantConfig(scheme="nf4")`.
        dtype: what the 4 bits stand for, and what the rest is held in.
        task: or "sequence_classification" or "reward_model", whose head is new where the files have none.
        device: where it lies, and where weights are quantized.

    Raises:
        UserError: the model cannot be read so, or is not there; `quant.skip` matches nothing.
    """
    from transformers.modeling_utils import set_zero3_state

    quant = quant or QuantConfig(scheme="nf4")
    if quant.scheme != "nf4":
        raise UserError(f"load_quantized: quant.scheme is {quant.scheme!r}; valid: 'nf4'")
    name: Any = str(dtype).removeprefix("torch.")
    config = ModelConfig(str(model), task, num_labels, name, attention=attention)
    directory = resolve_model(config.path)
    quantized = check_quantization(directory, quant)
    with (
        set_zero3_state()
    ):  # as if DeepSpeed's Init were there already: it would split the model before it is read
        made: Any = meta_model(config, directory)
    check_model(made, task, packing=False, checkpointing=False)
    files = open_files(made, directory, False, quantized)
    quant = quant if config.causal else _without_head(quant, made)
    pack_linears(made, quant, int(os.environ.get("WORLD_SIZE", 1)), files.block_sizes())
    files.take_stacks(made)
    _fill(made, files, torch.device(device))
    made.config.use_cache = read_json(directory / "config.json").get("use_cache", True)
    made.config._name_or_path = made.name_or_path = str(model)
    loaded: nn.Module = made.eval()
    return loaded


def _without_head(quant: QuantConfig, model: nn.Module) -> QuantConfig:
    head = classifier_head(model)
    linears = [f"^{name}" for name, m in model.named_modules() if is_linear(m) and inside(name, head)]
    return replace(quant, skip=[*quant.skip, *linears])


def _fill(model: nn.Module, files: SafetensorsFiles, device: torch.device) -> None:
    reads = _reads_here()
    new = torch.empty_like if reads else torch.zeros_like  # zeros take no memory before they are written to
    materialize(model, lambda p: nn.Parameter(new(p, device=device), requires_grad=p.requires_grad), device)
    if reads:
        _read(model, files, device)


def _reads_here() -> bool:
    from transformers.integrations.fsdp import is_fsdp_enabled

    return not is_fsdp_enabled() or int(os.environ.get("RANK", 0)) == 0


def _read(model: nn.Module, files: SafetensorsFiles, device: torch.device) -> None:
    heads = tuple(f"{name}." for name in classifier_head(model))
    new = missing_from(files, model)
    for name in new:
        if not heads or not name.startswith(heads):
            raise UserError(
                f"load_quantized: {str(files.directory)!r} holds no {name!r} that can be read by slices"
            )
    load_slices(model, files, Whole(), device)
    fill_random(model, new, 0, getattr(model.config, "initializer_range", 0.02), Whole())
