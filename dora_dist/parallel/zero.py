"""DeepSpeed ZeRO-1, 2 and 3. The only file that imports DeepSpeed, and only where a run asks for it.

ZeRO-3 flattens each parameter and gives every rank one contiguous range, which may begin and end inside a row;
norms are taken from that range alone. ZeRO-1 and 2 keep parameters whole and shard the optimizer.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dora_dist.config import TrainConfig
from dora_dist.errors import UserError
from dora_dist.parallel.engine import AdamState, Engine, LossScale, OptimizerState, adam_state, state_tensors
from dora_dist.parallel.gather import ShardedTensor
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import (
    GroupShards,
    Rectangle,
    RowsOfCopies,
    Shards,
    Whole,
    as_matrix,
    flat_rectangles,
)


class ZeroShards(GroupShards):
    """The shard protocol over ZeRO-3's partitions. A rank's range of a parameter is `ceil(numel / ranks)` elements
    long, padded at the end. Parameters of which DeepSpeed keeps a whole copy need no gathering."""

    def __init__(self, parameter: Any):
        from deepspeed.accelerator import get_accelerator

        # Not the weights' device: they may be offloaded.
        super().__init__(parameter.ds_process_group, torch.device(get_accelerator().current_device_name()))

    def shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if _is_partitioned(parameter) else parameter.shape

    def rectangles(self, parameter: Any) -> list[Rectangle]:
        if not _is_partitioned(parameter):
            return [Rectangle(as_matrix(parameter.detach()))]
        start = self.index * parameter.ds_tensor.ds_numel
        held = max(0, parameter.ds_numel - start)
        return flat_rectangles(parameter.ds_tensor.detach()[:held], start, parameter.ds_shape)

    def after_write(self, parameter: Any) -> None:
        if _is_partitioned(parameter):
            if _is_whole_now(parameter):
                parameter.partition()
            parameter.ds_secondary_tensor = None  # hpZ's copy: partition() may have made it of the old values
        _renew_master(parameter)

    def is_split(self, parameter: Tensor) -> bool:
        return _is_partitioned(parameter)

    def must_gather(self, parameter: Tensor) -> bool:
        return _is_partitioned(parameter) and not _is_whole_now(parameter)

    def rows_aligned(self, weight: Any, factor: Any, groups: int) -> bool:
        partitioned = _is_partitioned(weight) and _is_partitioned(factor)
        return partitioned and self.split_between(self.shape(weight)[0], groups)

    def _gather_split(self, parameters: list[Any]) -> list[Tensor]:
        parts = [p.ds_tensor.detach() for p in parameters]
        slots = [p.ds_tensor.ds_numel for p in parameters]
        return self._all_gather(parts, slots, [p.ds_shape for p in parameters])


class _WholeWithMasters(Whole):
    """ZeRO-1 and 2: parameters are whole, and the optimizer works on copies of them."""

    def after_write(self, parameter: Tensor) -> None:
        _renew_master(parameter)


def find_shards(model: nn.Module) -> Shards | None:
    """The shards of a model that DeepSpeed partitioned, by whoever's engine; None if it did not."""
    if not is_managed(model):
        return None
    partitioned = next((p for p in model.parameters() if _is_partitioned(p)), None)
    return ZeroShards(partitioned) if partitioned is not None else _WholeWithMasters(dist.get_rank() == 0)


def is_managed(model: nn.Module) -> bool:
    """Whether a DeepSpeed engine owns the optimizer states of `model`."""
    if "deepspeed" not in sys.modules:  # this is asked after every step
        return False
    return any(_is_partitioned(p) or hasattr(p, "_hp_mapping") for p in model.parameters())


def takes_steps(given: object) -> bool:
    """Whether this is a DeepSpeed engine, or an engine's optimizer."""
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    return hasattr(given, "was_step_applied") or isinstance(given, DeepSpeedOptimizer)


def after_each_step(engine: Any, call: Callable[[], None]) -> None:
    """Have `call` run once after every step that changes parameters: not between micro-batches, not for a step
    skipped for overflow. (The torch optimizer inside has a hook too, but it runs once per sub-group.)

    Args:
        engine: or its optimizer, which is what accelerate and Lightning hand out.

    Raises:
        UserError: its parameters cannot be trusted: magnitudes rounded to 16 bits, or linked to the wrong masters.
    """
    is_engine = hasattr(engine, "was_step_applied")
    optimizer = engine.optimizer if is_engine else engine
    if engine.bfloat16_enabled() or engine.fp16_enabled() if is_engine else optimizer.dtype.itemsize < 4:
        raise UserError(
            "DeepSpeed's sections bf16 and fp16 round magnitudes, A and B: leave them out, and load the base in "
            "the dtype that it shall have"
        )
    if getattr(optimizer, "round_robin_gradients", False):
        raise UserError("DeepSpeed's round_robin_gradients confuses the parameters' masters: leave it out")
    step = engine.step

    def step_and_call(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        if engine.was_step_applied() if is_engine else not optimizer.overflow:
            call()
        return result

    engine.step = step_and_call


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor")


def _is_whole_now(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


def _renew_master(parameter: Any) -> None:
    """Copy a written parameter to the fp32 one that the optimizer updates, where that is another tensor."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "_z3_optimizer"):
        safe_set_local_fp32_param(parameter, parameter.ds_tensor.detach().clone())
    elif getattr(parameter, "_hp_mapping", None) is not None:
        safe_set_full_fp32_param(parameter, parameter.detach().clone())


class Zero:
    """The strategy: `settings` is DeepSpeed's configuration, which also names the stage."""

    needs_group = True

    def __init__(self, processes: Processes, settings: dict[str, Any]):
        self.processes, self.settings = processes, settings
        self.stage: int = settings["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        self.files = {"deepspeed.json": json.dumps(settings, indent=2) + "\n"}
        self.deepspeed = import_deepspeed(processes)
        _check_settings(settings)

    def shard(self, model: nn.Module) -> None:
        with _numbers_its_gpu(self.processes):
            self.deepspeed.init_distributed()
            if self.stage == 3:
                self._partition = _partitioner(self.settings)

    def parameter(self, meta: nn.Parameter) -> nn.Parameter:
        """For ZeRO-3 the parameter is whole for a moment, one at a time."""
        empty = torch.empty_like(meta, device=self.processes.device)
        parameter = nn.Parameter(empty, requires_grad=meta.requires_grad)
        if self.stage == 3:
            self._partition(parameter)
        return parameter

    def shards(self, model: nn.Module) -> Shards:
        found = find_shards(model)
        if found is not None:
            return found
        by_rows = RowsOfCopies(self.processes.rank, self.processes.world_size, self.processes.sum_)
        return _WholeWithMasters(self.processes.is_main, by_rows)

    def engine(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, loss_scale: LossScale
    ) -> Engine:
        with _numbers_its_gpu(self.processes):
            engine, *_ = self.deepspeed.initialize(model=model, optimizer=optimizer, config=self.settings)
        return ZeroEngine(engine, loss_scale)


@contextmanager
def _numbers_its_gpu(processes: Processes) -> Iterator[None]:
    """DeepSpeed takes LOCAL_RANK for the number of the GPU, which it is not where each process sees its own alone.
    Plain python sets none."""
    index = processes.device.index
    before = os.environ.setdefault("LOCAL_RANK", str(processes.local_rank))
    os.environ["LOCAL_RANK"] = before if index is None else str(index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


class ZeroEngine:
    """DeepSpeed's engine behind the calls of the training loop."""

    def __init__(self, engine: Any, loss_scale: LossScale):
        self.module, self.loss_scale = engine, loss_scale

    def micro_batch(self, last: bool) -> AbstractContextManager:
        self.module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        if self.loss_scale.active:
            self.module.optimizer.override_loss_scale(self.loss_scale.value)
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        self.module.step()
        norm = self.module.get_global_grad_norm()
        grad_norm = torch.as_tensor(norm, dtype=torch.float32).reshape(())
        self.loss_scale.accepts(grad_norm)
        return grad_norm

    def optimizer_state(self, named: Sequence[tuple[str, Any]]) -> OptimizerState:
        zero = self.module.optimizer
        held: dict[Tensor, AdamState] = {}
        tensors: list[ShardedTensor] = []
        for name, parameter in named:
            flat, place, start = _state_range(zero, parameter)
            if flat not in held:
                held[flat] = adam_state(zero.optimizer, flat)
            shape = parameter.ds_shape if _is_partitioned(parameter) else parameter.shape
            own = [flat_rectangles(moment[place], start, shape) for moment in held[flat].moments.values()]
            tensors += state_tensors(name, shape, held[flat], own, owned=True, is_writer=dist.get_rank() == 0)
        return OptimizerState(tensors, held.values(), partial(dist.all_reduce, group=zero.dp_process_group))


def _state_range(zero: Any, parameter: Any) -> tuple[Tensor, slice, int]:
    """The flat fp32 vector that the optimizer updates on this rank for `parameter` and others, the part of it that
    is the parameter's, and the parameter's element at which that part begins."""
    if _is_partitioned(parameter):
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = dist.get_rank(parameter.ds_process_group) * length
        held = max(0, min(length, parameter.ds_numel - start))  # the end is padded
        return zero.fp32_partitioned_groups_flat[group], slice(offset, offset + held), start
    group = next(i for i, owned in enumerate(zero.bit16_groups) if any(p is parameter for p in owned))
    flat, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
    if mapping is None:  # other ranks hold all of it
        return flat, slice(0, 0), 0
    place, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
    return flat, slice(place.start, place.start + place.numel), start


def import_deepspeed(processes: Processes) -> Any:
    """The package, quiet and without compiling anything. Raises a UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "parallel.strategy: zero1, zero2 and zero3 need DeepSpeed: pip install 'dora-dist[deepspeed]'"
        ) from None
    if processes.device.type == "cpu":
        # Its shared-memory collectives are compiled at first use (minutes); gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renamed collectives that DeepSpeed calls in every layer.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _check_settings(settings: dict[str, Any]) -> None:
    """Have DeepSpeed check what it will be given, before any weight is read."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
        DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"parallel.deepspeed.zero_optimization.{key}: {first['msg']}, found {first['input']!r}"
        ) from None
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"parallel.deepspeed: {' '.join(str(error).split())}") from None


def _partitioner(settings: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What turns a whole parameter into this rank's partition of it."""
    from deepspeed import zero

    class Partitioned(zero.Init):
        def _zero_init_param(self, parameter: Any) -> None:
            # The original sends rank 0's values to all; here there are none yet.
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    # The empty module has DeepSpeed replace F.linear, for the process, by one that does not keep gathered weights
    # of frozen layers until their backward.
    init = Partitioned(module=nn.Module(), config_dict_or_path=settings)

    def partition(parameter: nn.Parameter) -> None:
        init._convert_to_zero_parameters([parameter])

    return partition
