"""The pieces of the loop: strategy choice, optimizer groups, schedules, loss scale, what is logged."""

import itertools
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_dist.config import (
    DataConfig,
    DoraConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from dora_dist.dora.inject import inject_dora
from dora_dist.errors import UserError
from dora_dist.models.build import make_blueprint, materialize, sizes_of
from dora_dist.parallel.engine import LossScale
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import lr_factor, make_optimizer
from dora_dist.training.run_log import RunLog


def processes(world: int) -> Processes:
    made = Processes()
    made.world_size = world
    return made


def run_config(parallel: dict) -> RunConfig:
    return RunConfig(ModelConfig(path="m"), DataConfig(train="t"), parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("world", "memory", "settings", "expected"),
    [
        (1, 1, {}, "single"),
        (2, 1e9, {}, "ddp"),
        (2, 100, {}, "fsdp"),  # 4 x 4 fp32 weights are 64 bytes: more than half of 100
        (2, 1e9, {"cpu_offload": True}, "fsdp"),
        (4, 1e9, {"replicas": 2}, "fsdp"),
        (2, 1, {"strategy": "ddp"}, "ddp"),
        (1, 1e9, {"strategy": "fsdp"}, "fsdp"),
    ],
)
def test_auto_goes_by_world_size_and_memory(world, memory, settings, expected):
    model = nn.Sequential(nn.Linear(4, 4, bias=False, device="meta"))
    config = run_config(settings)
    chosen = choose_strategy(config.parallel, config.train, sizes_of(model), processes(world), memory)
    assert chosen.name == expected


def test_single_refuses_several_processes():
    config = run_config({"strategy": "single"})
    with pytest.raises(UserError, match="2 were launched"):
        choose_strategy(config.parallel, config.train, sizes_of(nn.Linear(1, 1)), processes(2))


def test_learning_rates_of_magnitudes_and_of_b():
    model = inject_dora(nn.Sequential(nn.Linear(4, 4)), DoraConfig(rank=2, targets="all-linear"))
    config = TrainConfig(lr=1e-3, magnitude_lr=5e-3, lora_plus_ratio=16, weight_decay=0.1)
    groups = make_optimizer(model, config).param_groups
    rates = {tuple(p.shape): group["lr"] for group in groups for p in group["params"]}
    assert rates == {(4,): 5e-3, (4, 2): 16e-3, (2, 4): 1e-3}
    assert {tuple(p.shape): group["weight_decay"] for group in groups for p in group["params"]} == {
        (4,): 0.0, (4, 2): 0.1, (2, 4): 0.1,
    }  # fmt: skip


def test_weight_decay_leaves_vectors_alone_also_where_their_shards_are_flat():
    """Of modules_to_save: a norm's weight and a bias. ZeRO-3's parameters call themselves empty vectors."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    whole = {parameter: parameter.shape for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1), whole.__getitem__).param_groups
    decayed = [whole[p] for group in groups for p in group["params"] if group["weight_decay"]]
    assert decayed == [(2, 3)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end(schedule):
    factor = lr_factor(TrainConfig(schedule=schedule, warmup_steps=4), steps=20)
    values = [factor(step) for step in range(20)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[4:]))
    assert values[-1] == 1.0 if schedule == "constant" else 0 < values[-1] < 0.1


def test_an_overflow_halves_the_loss_scale_and_skips():
    scale = LossScale(active=True)
    start = scale.value
    assert not scale.accepts(torch.tensor(float("inf")))
    assert scale.value == start / 2
    assert all(scale.accepts(torch.tensor(1.0)) for _ in range(1000))
    assert scale.value == start
    assert LossScale(active=False).value == 1.0


def test_materialize_keeps_ties_and_buffers():
    model = nn.Sequential(nn.Embedding(5, 3, device="meta"), nn.Linear(3, 5, bias=False, device="meta"))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.arange(3))
    inject_dora(model, DoraConfig(rank=1, targets=["0"]))
    materialize(model, lambda meta: nn.Parameter(torch.empty_like(meta, device="cpu")), torch.device("cpu"))
    assert model[1].weight is model[0].weight
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.table.tolist() == [0, 1, 2]


def test_a_buffer_that_nothing_would_fill_is_refused_by_name(tiny_llama, monkeypatch):
    from transformers.models.llama import modeling_llama

    def with_scale(self, config, __init__=modeling_llama.LlamaMLP.__init__):
        __init__(self, config)
        self.register_buffer("scale", self.up_proj.weight.abs().amax(), persistent=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_scale)
    config = RunConfig(ModelConfig(path=str(tiny_llama), dtype="float32"), DataConfig(train="unused"))
    with pytest.raises(UserError, match=r"makes its buffer 'model\.layers\.0\.mlp\.scale' from weights"):
        make_blueprint(config, tiny_llama)
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    model.register_buffer("table", torch.ones(3, device="meta"), persistent=False)
    with pytest.raises(AssertionError, match="table"):
        materialize(model, lambda meta: nn.Parameter(torch.empty_like(meta, device="cpu")), torch.device("cpu"))


def test_wandb_gets_the_metrics(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        id="run-1", log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(settings["config"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunLog(LogConfig(wandb=True), tmp_path, 1, {"a": 1}, is_main=True) as log:
        log.evaluation(0, {"eval_loss": 2.0})
        log.training(1, {"loss": 1.0, "grad_norm": None, "tokens_per_second": 1.0, "step_seconds": 1.0, "lr": 0.1})
    assert calls[0] == {"a": 1}
    assert calls[1] == (0, {"eval_loss": 2.0})
    assert "grad_norm" not in calls[2][1]
    assert calls[3] == "end"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_missing_logger_is_named(monkeypatch, tmp_path, logger):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"log.{logger}"):
        RunLog(LogConfig(**{logger: True}), Path(tmp_path), 1, {}, is_main=True)
