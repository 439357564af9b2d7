"""The optimizer's state through fp32 and back: to the bit, for torch's AdamW and bitsandbytes' 8-bit ones."""

import pytest
import torch
from torch import nn

from dora_dist.config import TrainConfig
from dora_dist.parallel.engine import MOMENTS, adam_state
from dora_dist.training.optim import optimizer_class


def trained(optimizer: str, steps: int):
    """An optimizer after some steps, over a tensor of many blocks, one with a short last one, and a small one."""
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape)) for shape in ((64, 100), (4111,), (10,))]
    made = optimizer_class(TrainConfig(optimizer=optimizer))(tensors, lr=0.01)
    step(made, tensors, steps)
    return made, tensors


def step(optimizer, tensors, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator) * torch.rand(1, generator=generator) ** 4
        optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_a_state_that_was_read_and_written_trains_on_to_the_bit(optimizer, steps):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    one, tensors = trained(optimizer, steps)
    two, copies = trained(optimizer, 0)
    for tensor, copy in zip(tensors, copies, strict=True):
        copy.data.copy_(tensor.data)
        old, new = adam_state(one, tensor), adam_state(two, copy)
        assert float(old.step) == steps
        new.step.copy_(old.step)
        for name in MOMENTS:
            assert old.moments[name].dtype == torch.float32 and old.moments[name].shape == tensor.shape
            new.moments[name].copy_(old.moments[name])
        new.commit()
    for optimizer_, values in ((one, tensors), (two, copies)):
        step(optimizer_, values, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_other_numbers_take_the_nearest_codes():
    pytest.importorskip("bitsandbytes")
    optimizer, tensors = trained("adamw8bit", 1)
    state = adam_state(optimizer, tensors[0])
    wanted = torch.randn(64, 100)
    state.moments["exp_avg"].copy_(wanted)
    state.commit()
    error = (adam_state(optimizer, tensors[0]).moments["exp_avg"] - wanted).abs().max()
    assert 0 < error < 0.05
