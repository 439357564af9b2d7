"""One optimizer step: what the training loop asks of an engine, the engine of the torch strategies, fp16's loss
scale, and AdamW's state: in fp32 whatever the optimizer has it in, to be read, or written and committed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dora_dist.config import TrainConfig
from dora_dist.parallel.gather import ShardedTensor
from dora_dist.parallel.shards import Rectangle, Shards, as_matrix

MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = 256  # values that share a scale in bitsandbytes' optimizers


class LossScale:
    """Dynamic loss scaling for fp16, whose small gradients would underflow: halved when a step overflows (that
    step is skipped), doubled after 1000 good ones. Always 1 for other dtypes."""

    def __init__(self, active: bool):
        self.active, self.value, self.good_steps = active, 2.0**14 if active else 1.0, 0

    def accepts(self, grad_norm: Tensor) -> bool:
        if not self.active:
            return True
        finite = bool(torch.isfinite(grad_norm))
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % 1000 == 0:
            self.value *= 2
        return finite


class Engine(Protocol):
    """Backward passes, then one step. Every rank calls each method at the same point."""

    module: nn.Module
    """What to call for a training forward: the model, or a wrapper around it."""

    loss_scale: LossScale

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around the forward and the backward of one of the step's micro-batches; `last` of them."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, which are averaged over the ranks."""

    def step(self) -> Tensor:
        """Clip and update, on all ranks or, where the gradient is not finite, on none: then nothing changes but
        the loss scale. Returns the global gradient norm before clipping."""

    def optimizer_state(self, named: Sequence[tuple[str, nn.Parameter]]) -> "OptimizerState":
        """What the optimizer keeps of these parameters, to read, or to write and commit; zeros before the first
        step."""


class OptimizerState(NamedTuple):
    tensors: list[ShardedTensor]  # of each parameter: NAME.exp_avg, NAME.exp_avg_sq, NAME.step
    held: Iterable["AdamState"]  # of the tensors that the optimizer updates
    sum_: Callable[[Tensor], object]  # over the ranks that share one copy of the state, in place

    def commit(self) -> None:
        """Give what was written to `tensors` to the optimizer."""
        for state in self.held:
            state.commit()


def state_tensors(
    name: str, shape: Sequence[int], state: "AdamState", own: list[list[Rectangle]], owned: bool, is_writer: bool
) -> Iterator[ShardedTensor]:
    """This rank's part of one parameter's state; `own`: of each moment. Every rank has the step."""
    for kind, rectangles in zip(state.moments, own, strict=True):
        yield ShardedTensor(f"{name}.{kind}", torch.float32, tuple(shape), rectangles, owned)
    yield ShardedTensor(f"{name}.step", torch.float32, (), [Rectangle(as_matrix(state.step))], is_writer)


class TorchEngine:
    """Autograd and a torch optimizer, on each rank's own part of every gradient."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        shards: Shards,
        config: TrainConfig,
        loss_scale: LossScale,
        device: torch.device,
        accumulating: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`accumulating`: around the micro-batches whose gradients are not exchanged yet; their forward, too,
        because DDP decides there what its backward does."""
        self.module, self.optimizer, self.shards = module, optimizer, shards
        self.max_grad_norm, self.loss_scale = config.max_grad_norm, loss_scale
        self.device, self.accumulating = device, accumulating
        self.fused = bool(optimizer.defaults.get("fused"))
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.counted = [shards.owns(p) for p in self.trained]
        self.home = self.trained[0].device  # of the parameters, which may be offloaded; `device` computes

    def micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.accumulating()

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale.value).backward()

    def step(self) -> Tensor:
        grad_norm = self._clip()
        if self.loss_scale.accepts(grad_norm):
            if self.fused:  # it changes nothing where this is 1, and no host waits for a device to say so
                self.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
                self.optimizer.step()
            elif torch.isfinite(grad_norm):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def optimizer_state(self, named: Sequence[tuple[str, nn.Parameter]]) -> OptimizerState:
        shards = self.shards
        held = [adam_state(self.optimizer, p) for _, p in named]
        tensors: list[ShardedTensor] = []
        for (name, p), state in zip(named, held, strict=True):
            own = [shards.rectangles(moment) for moment in state.moments.values()]
            tensors += state_tensors(name, shards.shape(p), state, own, shards.owns(p), shards.is_writer)
        return OptimizerState(tensors, held, shards.sum_)

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """Undo the loss scale and clip to max_grad_norm, on each rank's own part. Returns the global norm, on the
        parameters' device."""
        limit, scale = self.max_grad_norm, self.loss_scale.value
        own: list[Tensor] = []
        counted: list[Tensor] = []
        for parameter, counts in zip(self.trained, self.counted, strict=True):
            if parameter.grad is not None:
                parts = [part.values for part in self.shards.rectangles(parameter.grad)]
                own += parts
                counted += parts if counts else []
        squares = torch.nn.utils.get_total_norm(counted).square().reshape(1).to(self.device)
        self.shards.sum_(squares)
        # From a GPU to the host this waits. The fused optimizer's own copy of found_inf would not: it would read a
        # value that has not arrived.
        grad_norm = squares.to(self.home).sqrt().squeeze(0) / scale
        if own and (limit is not None or scale != 1):
            factor = torch.ones_like(grad_norm) / scale
            if limit is not None:
                factor *= (limit / (grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(own, factor)
        return grad_norm


@dataclass
class AdamState:
    """torch's: what is read and written is the state itself."""

    step: Tensor  # [] fp32: the steps taken
    moments: dict[str, Tensor]  # like the tensor, fp32, by name

    def commit(self) -> None:
        """Give what was written to `step` and `moments` to the optimizer."""


def adam_state(optimizer: torch.optim.Optimizer, held: Tensor) -> AdamState:
    """The state of a tensor that the optimizer updates; zeros before its first step."""
    if hasattr(optimizer, "init_state"):
        return _EightBit(optimizer, held)
    state = optimizer.state[held]
    if not state:
        fused = optimizer.defaults.get("fused")  # whose step counts live where the tensors do
        state["step"] = torch.zeros((), device=held.device if fused else "cpu")
        state |= {name: torch.zeros_like(held.detach()) for name in MOMENTS}
    return AdamState(state["step"], {name: state[name] for name in MOMENTS})


class _EightBit(AdamState):
    """bitsandbytes': codes of 8 bits and a scale for every 256 values; in small tensors fp32.

    Decoded on the host. Committing what was decoded from the same blocks restores codes and scales that decode to
    the same bits.
    """

    def __init__(self, optimizer: Any, held: Tensor):
        self._state = optimizer.state[held]
        if not self._state:
            for number, group in enumerate(optimizer.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if parameter is held:
                        optimizer.init_state(group, held, number, place)
        self.step = torch.tensor(float(self._state["step"]))
        self.moments = {name: self._decoded(i) for i, name in enumerate(MOMENTS, 1)}

    def commit(self) -> None:
        self._state["step"] = int(self.step)
        for i, name in enumerate(MOMENTS, 1):
            held, values = self._state[f"state{i}"], self.moments[name]
            if held.dtype == torch.uint8:
                codes, scales = encode(values.flatten(), self._state[f"qmap{i}"].cpu())
                held.copy_(codes.view(held.shape))
                self._state[f"absmax{i}"].copy_(scales)

    def _decoded(self, i: int) -> Tensor:
        held = self._state[f"state{i}"]
        if held.dtype != torch.uint8:
            return held
        values, scales = self._state[f"qmap{i}"].cpu(), self._state[f"absmax{i}"].cpu()
        return decode(held.flatten().cpu(), scales, values).view(held.shape)


def decode(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """[n] codes, [blocks] scales and the 256 values of the codes -> [n]."""
    return values[codes.long()] * scales.repeat_interleave(_BLOCK)[: codes.numel()]


def encode(decoded: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes [n] and scales [blocks] of fp32 numbers [n]. Of numbers that were decoded, such as decode
    to the same bits: the scale is a block's largest magnitude, unless that was the lowest of the codes' values,
    which is not -1, or rounding has moved it."""
    count = decoded.numel()
    blocks = torch.nn.functional.pad(decoded, (0, -count % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1)
    lowest = largest / values[0].abs() if values[0] < 0 else largest
    tried = [largest, lowest]
    for scale in (largest, lowest):
        tried += [torch.nextafter(scale, torch.full_like(scale, end)) for end in (float("inf"), 0.0)]
    middles = (values[1:] + values[:-1]) / 2
    codes, scales = blocks.new_empty(blocks.shape, dtype=torch.uint8), largest.clone()
    done = torch.zeros_like(largest, dtype=torch.bool)
    for scale in [*tried, largest]:  # at last what none of them gives exactly
        safe = torch.where(scale > 0, scale, 1)[:, None]
        nearest = torch.bucketize(blocks / safe, middles).to(torch.uint8)
        exact = (values[nearest.long()] * scale[:, None] == blocks).all(dim=1)
        codes[~done], scales[~done] = nearest[~done], scale[~done]
        done |= exact
    return codes.flatten()[:count], scales
