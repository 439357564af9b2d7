"""DeepSpeed's configuration, made from ours: there is no second file to keep in step.

`parallel.deepspeed` is laid over it, for what only DeepSpeed knows (bucket sizes, prefetching, hpZ ...). What our
own keys decide, and what would round magnitudes or norms, is refused there by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_dist.config import ParallelConfig, TrainConfig
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
    "zero_optimization", "communication_data_type", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
    "flops_profiler", "dump_state", "log_level",
)  # fmt: skip
# Inside zero_optimization: keys that only one value of goes with us, and why.
_ONLY = {
    "zero_quantized_weights": (False, "it would train on other weights than those whose norms are taken"),
    "zero_quantized_nontrainable_weights": (False, "norms cannot be taken from what it stores"),
    "zenflow": (None, "it splits the optimizer step, after which the norms are renewed"),
    "round_robin_gradients": (False, "it links parameters to the wrong masters"),
    "module_granularity_threshold": (0, "DeepSpeed fails with it where a base is frozen"),
    "compute_grad_norm": (True, "the run reports the gradients' norm"),
    "elastic_checkpoint": (False, "DeepSpeed's checkpoints are not written"),
    "legacy_stage1": (False, "DeepSpeed does not have it any more"),
}
_OFFLOAD_ONLY = {"ratio": 1.0, "super_offload": False}  # DeepSpeed has these for its own optimizer alone
_BUCKET = 1 << 24  # elements at most; DeepSpeed's own 5e8 would hold 2 GB for gradients of a few MB


@dataclass(frozen=True)
class Sizes:
    """Of a model: what the strategy and its buffers are measured by."""

    weight_bytes: int  # of the base model
    block: int  # the largest block's elements
    trained: int  # all that is trained


def deepspeed_config(
    parallel: ParallelConfig, train: TrainConfig, sizes: Sizes, world_size: int, on_gpu: bool
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets, for a zero1, zero2 or zero3 run.

    ZeRO-3 keeps two blocks of weights: the one that computes and the next. With DeepSpeed's own limits, of 1e9
    elements, a model of that size would stay whole on every rank from its second step on. Nor are A, B and m kept
    whole, which would have to be gathered one by one after each step: a block's come with its weights.

    There is no bf16 or fp16 section: DeepSpeed then leaves dtypes alone, so the base has `model.dtype` and A, B
    and m are fp32, in storage and in use.

    Raises:
        UserError: `parallel.deepspeed` contradicts one of our keys (both are named), or asks for what cannot be.
    """
    stage = int(parallel.strategy.removeprefix("zero"))
    extra = _without_auto(parallel.deepspeed)
    bucket = max(1, min(_BUCKET, sizes.trained))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero["stage3_max_live_parameters"] = 2 * sizes.block
        zero["stage3_prefetch_bucket_size"] = sizes.block
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_param_persistence_threshold"] = 0
    if parallel.cpu_offload:
        offload = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_optimizer"] = offload
        if stage == 3:
            zero["offload_param"] = dict(offload)
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, offloaded or not
        "zero_allow_untested_optimizer": True,  # bitsandbytes', which DeepSpeed does not know
        "zero_optimization": zero,
    }
    batch = train.micro_batch_size * train.accumulation * world_size
    extra = _undecided("", extra, {**ours, "train_batch_size": batch})
    for key in extra:
        if key not in _FREE:
            raise UserError(f"{_PREFIX}.{key}: not a DeepSpeed key that can be set here; {nearest(key, _FREE)}")
    if "zero_optimization" in extra:
        section = extra["zero_optimization"]
        if not isinstance(section, Mapping):
            raise UserError(f"{_PREFIX}.zero_optimization: expected a section of keys, found {section!r}")
        extra["zero_optimization"] = _undecided("zero_optimization.", section, zero)
        _check_zero(extra["zero_optimization"], parallel.cpu_offload, stage, world_size, on_gpu)
    return _merged(ours, extra)


def _undecided(prefix: str, section: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ours do not decide. Those that say what ours say, or nothing, are left out."""
    left = {}
    for key, value in section.items():
        owner = _OURS.get(prefix + key)
        if owner is None:
            left[key] = value
            continue
        off = isinstance(value, Mapping) and value.get("enabled") in (False, "auto")
        agrees = value == ours[key] if key in ours else not value or off
        if not agrees:
            raise UserError(
                f"{_PREFIX}.{prefix}{key}: {value!r} contradicts {owner}, which decides this; leave it out"
            )
    return left


def _check_zero(zero: Mapping[str, Any], cpu_offload: bool, stage: int, world_size: int, on_gpu: bool) -> None:
    for key, value in zero.items():
        name = f"{_PREFIX}.zero_optimization.{key}"
        only, reason = _ONLY.get(key.removeprefix("stage3_"), (value, ""))
        if value != only:
            raise UserError(f"{name}: {value!r} is not supported: {reason}")
        if key in ("offload_optimizer", "offload_param"):
            _check_offload(name, value, cpu_offload)
        if stage < 3 and (key in ("offload_param", "zero_hpz_partition_size") or key.startswith("stage3_")):
            raise UserError(f"{name}: only zero3 shards parameters; parallel.strategy is zero{stage}")
        if key == "zero_hpz_partition_size" and (not isinstance(value, int) or value < 1 or world_size % value):
            raise UserError(f"{name}: {value!r} does not divide the {world_size} processes")
        if key == "zero_quantized_gradients" and value and not on_gpu:
            raise UserError(f"{name}: DeepSpeed has it on GPUs alone")


def _check_offload(name: str, value: Any, cpu_offload: bool) -> None:
    device = value.get("device", "cpu" if cpu_offload else "none") if isinstance(value, Mapping) else None
    if device == "nvme":
        raise UserError(f"{name}.device: nvme is not supported: every step reads the weights' norms; use cpu")
    if device != "cpu" and cpu_offload:
        raise UserError(f"{name}: {value!r} contradicts parallel.cpu_offload: true; leave one of them out")
    for key, only in _OFFLOAD_ONLY.items() if isinstance(value, Mapping) else ():
        if value.get(key, only) != only:
            raise UserError(
                f"{name}.{key}: {value[key]!r} is not supported: DeepSpeed needs its own optimizer for it"
            )


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's "auto" leaves a key to our other settings; a section that is left to them keeps saying so."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) and value.get("enabled") != "auto" else value
        for key, value in tree.items()
        if value != "auto"
    }
