"""DeepSpeed's configuration, made from ours: there is no second file to keep in step.

`parallel.deepspeed` is laid over it, for what only DeepSpeed knows (bucket sizes, prefetching, hpZ ...). What our
own keys decide, and what would round magnitudes or norms, is refused there by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_dist.config import RunConfig
from dora_dist.errors import UserError, nearest

_PREFIX = "parallel.deepspeed"
# DeepSpeed's key -> the key of ours that decides it.
_OURS = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "train_batch_size": "train.micro_batch_size, train.accumulation and the number of processes",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "activation_checkpointing": "train.activation_checkpointing",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
    "zero_optimization.stage": "parallel.strategy",
    "zero_optimization.cpu_offload": "parallel.cpu_offload",
    "zero_optimization.cpu_offload_param": "parallel.cpu_offload",
}
# DeepSpeed's keys that may be added. Those inside zero_optimization DeepSpeed itself checks.
_FREE = (
    "zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
    "flops_profiler", "dump_state", "log_level",
)  # fmt: skip
_REFUSED = {
    "zero_quantized_weights": "would train on other weights than those whose norms are taken",
    "zero_quantized_nontrainable_weights": "stores weights from which the norms cannot be taken",
    "zenflow": "splits the optimizer step, after which the norms are renewed",
}
_NEEDED = {"compute_grad_norm": True, "elastic_checkpoint": False, "legacy_stage1": False}
_BUCKET = 1 << 24  # elements at most; DeepSpeed's own 5e8 would hold 2 GB for gradients of a few MB


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements, which buffers are measured by."""

    block: int  # the largest block's
    trained: int  # all that is trained


def deepspeed_config(config: RunConfig, sizes: Sizes, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` gets, for a zero1, zero2 or zero3 run.

    ZeRO-3 keeps two blocks of weights: the one that computes and the next. With DeepSpeed's own limits, of 1e9
    elements, a model of that size would stay whole on every rank from its second step on.

    There is no bf16 or fp16 section: DeepSpeed then leaves dtypes alone, so the base has `model.dtype` and A, B
    and m are fp32, in storage and in use.

    Raises:
        UserError: `parallel.deepspeed` contradicts one of our keys (both are named), or asks for what cannot be.
    """
    stage = int(config.parallel.strategy.removeprefix("zero"))
    extra = _without_auto(config.parallel.deepspeed)
    bucket = max(1, min(_BUCKET, sizes.trained))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero["stage3_max_live_parameters"] = 2 * sizes.block
        zero["stage3_prefetch_bucket_size"] = sizes.block
        zero["stage3_max_reuse_distance"] = 0
    if config.parallel.cpu_offload:
        offload = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_optimizer"] = offload
        if stage == 3:
            zero["offload_param"] = dict(offload)
    ours = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.accumulation,
        "train_batch_size": config.train.micro_batch_size * config.train.accumulation * world_size,
        "gradient_clipping": config.train.max_grad_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, offloaded or not
        "zero_optimization": zero,
    }
    _check(ours, extra, config.parallel.cpu_offload, stage)
    return _merged(ours, extra)


def _check(ours: Mapping[str, Any], extra: Mapping[str, Any], cpu_offload: bool, stage: int) -> None:
    for key, value in extra.items():
        if key not in _OURS and key not in _FREE:
            raise UserError(f"{_PREFIX}.{key}: not a DeepSpeed key that can be set here; {nearest(key, _FREE)}")
        _check_decided(key, ours.get(key), value)
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError(f"{_PREFIX}.zero_optimization: expected a section of keys, found {zero!r}")
    for key, value in zero.items():
        name = f"{_PREFIX}.zero_optimization.{key}"
        _check_decided(f"zero_optimization.{key}", ours["zero_optimization"].get(key), value)
        if key in _REFUSED and value:
            raise UserError(f"{name}: {value!r} is not supported: it {_REFUSED[key]}")
        if key in _NEEDED and value is not _NEEDED[key]:
            raise UserError(f"{name}: {value!r} is not supported; leave it {str(_NEEDED[key]).lower()}")
        if key in ("offload_optimizer", "offload_param"):
            _check_offload(name, value, cpu_offload, stage)


def _check_decided(key: str, ours: Any, value: Any) -> None:
    disabled = isinstance(value, Mapping) and value.get("enabled") is False
    if key in _OURS and value != ours and not disabled:
        raise UserError(f"{_PREFIX}.{key}: {value!r} contradicts {_OURS[key]}, which decides this; leave it out")


def _check_offload(name: str, value: Any, cpu_offload: bool, stage: int) -> None:
    device = value.get("device", "cpu" if cpu_offload else "none") if isinstance(value, Mapping) else None
    if device == "nvme":
        raise UserError(f"{name}.device: nvme is not supported: every step reads the weights' norms; use cpu")
    if device != "cpu" and cpu_offload:
        raise UserError(f"{name}: {value!r} contradicts parallel.cpu_offload: true; leave one of them out")
    if name.endswith("offload_param") and device == "cpu" and stage < 3:
        raise UserError(f"{name}: only zero3 shards parameters; parallel.strategy is zero{stage}")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's "auto" means what it means here: taken from the other settings."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value != "auto"
    }
