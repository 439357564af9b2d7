"""What AdamW keeps of a tensor, in fp32 whatever the optimizer has it in: to be read, or written and committed."""

from typing import Any, Protocol

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = 256  # values that share a scale in bitsandbytes' optimizers


class AdamState(Protocol):
    step: Tensor  # [] fp32: the steps taken
    moments: dict[str, Tensor]  # like the tensor, fp32, by name

    def commit(self) -> None:
        """Give what was written to `step` and `moments` to the optimizer."""


def adam_state(optimizer: torch.optim.Optimizer, held: Tensor) -> AdamState:
    """The state of a tensor that the optimizer updates; zeros before its first step."""
    return _EightBit(optimizer, held) if hasattr(optimizer, "init_state") else _Plain(optimizer, held)


class _Plain:
    """torch's: what is read and written is the state itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, held: Tensor):
        state = optimizer.state[held]
        if not state:
            fused = optimizer.defaults.get("fused")  # whose step counts live where the tensors do
            state["step"] = torch.zeros((), device=held.device if fused else "cpu")
            state |= {name: torch.zeros_like(held.detach()) for name in MOMENTS}
        self.step: Tensor = state["step"]
        self.moments: dict[str, Tensor] = {name: state[name] for name in MOMENTS}

    def commit(self) -> None:
        pass


class _EightBit:
    """bitsandbytes': codes of 8 bits and a scale for every 256 values; in small tensors fp32.

    Decoded on the host. Committing what was decoded from the same blocks restores codes and scales that decode to
    the same bits.
    """

    def __init__(self, optimizer: Any, held: Tensor):
        self._state = optimizer.state[held]
        if not self._state:
            where = [
                (group, number, place)
                for number, group in enumerate(optimizer.param_groups)
                for place, p in enumerate(group["params"])
                if p is held
            ]
            (group, number, place) = where[0]
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
    best_codes = best_scale = done = None
    for scale in tried:
        safe = torch.where(scale > 0, scale, 1)[:, None]
        codes = torch.bucketize(blocks / safe, middles).to(torch.uint8)
        exact = (values[codes.long()] * scale[:, None] == blocks).all(dim=1)
        if best_codes is None or best_scale is None or done is None:
            best_codes, best_scale, done = codes, scale.clone(), exact
            continue
        better = exact & ~done
        best_codes[better], best_scale[better] = codes[better], scale[better]
        done |= exact
    assert best_codes is not None and best_scale is not None
    return best_codes.flatten()[:count], best_scale
