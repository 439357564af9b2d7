"""The optimizers of `train.optimizer`: 8-bit ones against AdamW, alone and under ZeRO, and their refusals."""

import sys

import pytest
import torch
from torch import nn

from dora_dist.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dora_dist.errors import UserError
from dora_dist.models.build import sizes_of
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import make_optimizer, optimizer_class
from tests.support.ranks import run_ranks

EIGHT_BIT = ["adamw8bit", "paged_adamw8bit"]


def run_config(optimizer: str, **parallel) -> RunConfig:
    return RunConfig(
        ModelConfig("unused"),
        DataConfig("unused"),
        train=TrainConfig(optimizer=optimizer),
        parallel=ParallelConfig(**parallel),
    )


class Quadratic(nn.Module):
    """Distances to fixed targets; `lora_A` is large enough for 8-bit moments, `magnitude` is not."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.targets = {
            "lora_A": torch.randn(64, 128, generator=generator),
            "lora_B": torch.randn(128, 64, generator=generator),
            "magnitude": torch.rand(128, generator=generator) + 1,
        }
        for name, target in self.targets.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(target)))

    def forward(self) -> torch.Tensor:
        return sum(((p - self.targets[name]) ** 2).mean() for name, p in self.named_parameters())


def losses(optimizer: str, steps: int = 400, **settings) -> tuple[list[float], torch.optim.Optimizer, nn.Module]:
    model = Quadratic()
    made = make_optimizer(model, TrainConfig(optimizer=optimizer, lr=0.01, **settings))
    seen = []
    for _ in range(steps):
        made.zero_grad()
        loss = model()
        loss.backward()
        made.step()
        seen.append(loss.item())
    return seen, made, model


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", EIGHT_BIT)
def test_eight_bits_converge_as_adamw(optimizer):
    pytest.importorskip("bitsandbytes")
    want, _, _ = losses("adamw")
    got, made, model = losses(optimizer)
    assert want[-1] < 0.01 * want[0]
    for a, b in zip(got, want, strict=True):
        assert abs(a - b) < 0.01 * want[0]
    assert made.state[model.lora_A]["state1"].dtype == torch.uint8
    assert made.state[model.magnitude]["state1"].dtype == torch.float32  # too small to be worth it


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_groups_and_decay_are_the_same(optimizer):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    settings = {"magnitude_lr": 0.002, "lora_plus_ratio": 4.0, "weight_decay": 0.3}
    _, made, model = losses(optimizer, steps=0, **settings)
    assert [(g["lr"], g["weight_decay"]) for g in made.param_groups] == [(0.01, 0.3), (0.04, 0.3), (0.002, 0.0)]
    assert [g["params"][0] for g in made.param_groups] == [model.lora_A, model.lora_B, model.magnitude]


@pytest.mark.parametrize("optimizer", EIGHT_BIT)
def test_without_bitsandbytes(optimizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=rf"^train\.optimizer: {optimizer} needs bitsandbytes: pip install"
    ) as error:
        optimizer_class(TrainConfig(optimizer=optimizer))
    assert "\n" not in str(error.value)
    assert optimizer_class(TrainConfig()) is torch.optim.AdamW


@pytest.mark.parametrize("optimizer", EIGHT_BIT)
def test_fsdp_is_refused(optimizer):
    with pytest.raises(UserError, match=rf"^train\.optimizer: {optimizer} .*parallel\.strategy: fsdp"):
        run_config(optimizer, strategy="fsdp")
    config = run_config(optimizer, cpu_offload=True)
    with pytest.raises(UserError, match=rf"^train\.optimizer: {optimizer} .*auto chose"):
        choose_strategy(config.parallel, config.train, sizes_of(nn.Linear(2, 2)), Processes())


SCRIPT = """
import sys

import torch
from torch import nn

from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.models.build import sizes_of
from dora_dist.cli import leave
from dora_dist.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dora_dist.parallel.engine import LossScale
from dora_dist.training.optim import make_optimizer

processes = Processes()
processes.start(60, needed=True)
for stage in sys.argv[1:]:
    ends = []
    for optimizer in ("adamw", "adamw8bit"):
        train = TrainConfig(optimizer=optimizer, lr=3e-3, max_grad_norm=None)
        config = RunConfig(
            ModelConfig("unused"), DataConfig("unused"), train=train, parallel=ParallelConfig(strategy=stage)
        )
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128))
        x = torch.randn(64, 128)
        y = 0.1 * x @ torch.randn(128, 16) @ torch.randn(16, 128) / 4
        strategy = choose_strategy(config.parallel, config.train, sizes_of(model), processes)
        strategy.shard(model)
        made = make_optimizer(model, train)
        engine = strategy.engine(model, made, train, LossScale(active=False))
        for _ in range(60):
            loss = ((engine.module(x) - y) ** 2).mean()
            engine.backward(loss)
            engine.step()
        ends.append(loss.item())
        states = [value for state in made.state.values() for value in state.values()]
        eight_bit = any(torch.is_tensor(value) and value.dtype == torch.uint8 for value in states)
        assert eight_bit == (optimizer == "adamw8bit")
    assert ends[0] < 0.01 and abs(ends[1] - ends[0]) < 0.1 * ends[0] + 1e-4, ends
processes.stop()
leave(0)
"""


@pytest.mark.ranks
def test_under_ddp_and_zero(tmp_path):
    """ZeRO gives the optimizer flat pieces; what they hold in 8 bits still trains."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = run_ranks(2, script, "ddp", "zero1", "zero3")
    assert run.returncode == 0, run.stderr[-3000:]
