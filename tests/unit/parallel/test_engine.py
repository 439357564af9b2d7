"""What an optimizer step asks of the devices: waits where the host needs a value, and operators by the list."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.config import TrainConfig
from dora_dist.parallel.engine import LossScale, TorchEngine
from dora_dist.parallel.shards import Whole


class Calls(TorchDispatchMode):
    """The names of the operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def stepped(parameters: list[nn.Parameter], device: str, loss_scale: bool = False) -> tuple[Calls, TorchEngine]:
    optimizer = torch.optim.AdamW(parameters, fused=True)
    config = TrainConfig(max_grad_norm=0.5)
    engine = TorchEngine(nn.Module(), optimizer, Whole(), config, LossScale(loss_scale), torch.device(device))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with Calls() as calls:
        engine.step()
    return calls, engine


def test_with_offloaded_parameters_the_host_waits_for_what_the_gpu_has_found(monkeypatch):
    """A stand-in for fsdp with cpu_offload on a GPU, where the meta device is the GPU. A copy for which nobody
    waits gives the optimizer a found_inf that has not arrived: NaN in all parameters, or a good step left out."""
    to, waits = torch.Tensor.to, []

    def noted(tensor, *args, non_blocking=False, **kwargs):
        if not tensor.is_meta or torch.device(args[0]).type == "meta":
            return to(tensor, *args, non_blocking=non_blocking, **kwargs)
        waits.append(not non_blocking)
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    engine = stepped([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))], "meta")[1]
    assert waits and all(waits)
    assert engine.optimizer.found_inf.device.type == "cpu"


@pytest.mark.parametrize("loss_scale", [False, True])
def test_a_step_makes_as_many_calls_for_many_tensors_as_for_few(loss_scale):
    few, many = (
        stepped([nn.Parameter(torch.ones(3, 2)) for _ in range(count)], "cpu", loss_scale)[0].names
        for count in (2, 20)
    )
    once_a_tensor = {"detach", "zeros", "zeros_like"}  # a view; the state that a first step makes
    assert [n for n in few if n not in once_a_tensor] == [n for n in many if n not in once_a_tensor]


def test_a_step_clips_and_skips_what_is_not_finite():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = TorchEngine(
        nn.Module(), optimizer, Whole(), TrainConfig(max_grad_norm=0.5), LossScale(True), torch.device("cpu")
    )
    scale = engine.loss_scale.value
    parameter.grad = torch.full((4,), 3.0 * scale)
    assert engine.step().item() == pytest.approx(6.0)
    assert parameter.detach().norm().item() == pytest.approx(0.5)
    before = parameter.detach().clone()
    parameter.grad = torch.tensor([1.0, torch.inf, 1.0, 1.0])
    assert not torch.isfinite(engine.step())
    assert torch.equal(parameter.detach(), before) and engine.loss_scale.value == scale / 2
