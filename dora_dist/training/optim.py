"""The optimizer, its schedule, and the model that it trains."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dora_dist.config import TrainConfig
from dora_dist.errors import UserError
from dora_dist.models.build import Blueprint, ShardedModel, build
from dora_dist.parallel.engine import Engine, LossScale
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import Strategy


@dataclass(frozen=True)
class TrainableModel(ShardedModel):
    """The same with what takes its optimizer steps."""

    processes: Processes
    engine: Engine
    optimizer: torch.optim.Optimizer


def build_to_train(blueprint: Blueprint, strategy: Strategy) -> TrainableModel:
    built, config = build(blueprint, strategy), blueprint.config
    optimizer = make_optimizer(built.model, config.train, built.shards.shape)
    loss_scale = LossScale(active=config.model.dtype == "float16")
    engine = strategy.engine(built.model, optimizer, config.train, loss_scale)
    return TrainableModel(**vars(built), processes=strategy.processes, engine=engine, optimizer=optimizer)


def make_optimizer(
    model: nn.Module, config: TrainConfig, shape: Callable[[nn.Parameter], Sequence[int]] = lambda p: p.shape
) -> torch.optim.Optimizer:
    """What `train.optimizer` names, over `parameter_groups`.

    Raises:
        UserError: `train.optimizer` needs bitsandbytes, which is not there.
    """
    made = optimizer_class(config)
    rates = (config.lr, config.weight_decay, config.magnitude_lr, config.lora_plus_ratio)
    return made(
        parameter_groups(model, *rates, shape),
        **({"fused": True} if made is torch.optim.AdamW else {}),  # one kernel for all tensors of a group
    )


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    magnitude_lr: float | None,
    lora_plus_ratio: float | None,
    shape: Callable[[nn.Parameter], Sequence[int]],
) -> list[dict[str, Any]]:
    """The trainable parameters, with the magnitudes' and B's own learning rates where asked for.

    Weight decay is for matrices: it would pull magnitudes, norms' weights and biases towards 0, where m = |W| is
    the base model. `shape`: a whole parameter's, where a sharded model's say less.
    """
    rates = {"magnitude": magnitude_lr or lr, "lora_B": lr * (lora_plus_ratio or 1.0)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(name.rpartition(".")[2], lr)
            decay = weight_decay if len(shape(parameter)) >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def optimizer_class(config: TrainConfig) -> Callable[..., torch.optim.Optimizer]:
    """What `train.optimizer` names. Those of bitsandbytes keep the moments of tensors of at least 4096 elements in
    8 bits; the paged one lets them move to the host where a GPU is full.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that are not used here
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError(
            f"train.optimizer: {config.optimizer} needs bitsandbytes: pip install 'dora-dist[quant]'"
        ) from None
    return optim.AdamW8bit if config.optimizer == "adamw8bit" else optim.PagedAdamW8bit


def lr_factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Step (from 0) -> factor on the learning rate: linear warm-up, then the schedule down to 0."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if config.schedule == "linear" else 1.0

    return factor
