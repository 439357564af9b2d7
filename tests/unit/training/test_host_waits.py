"""A training step never makes the host wait for the device: nothing is read back from it."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.config import DataConfig, DoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.models import head_loss
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer
from tests.support.models import make_labelled, make_pairs

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "is_nonzero",
}
SETTINGS = {
    "plain": {},
    "packed": {"packing": True},
    "checkpointed": {"packing": True, "checkpointing": True},
    "bf16": {"dtype": "bfloat16"},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
}


class Watch(TorchDispatchMode):
    """Notes what reads a value: operators by themselves, and methods that read memory without one."""

    def __init__(self, host):
        super().__init__()
        self.reads, self._host = [], {id(t) for t in host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in READS or masked) and id(args[0]) not in self._host:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def also_methods(self, monkeypatch):
        def watched(name, method):
            def call(tensor, *args, **kwargs):
                if id(tensor) not in self._host:
                    self.reads.append(name)
                return method(tensor, *args, **kwargs)

            return call

        with monkeypatch.context() as patch, self:
            for name in ("tolist", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
            yield


def make_trainer(model, rows, packing=False, checkpointing=False, dtype="float32", objective=None):
    task = "preference" if objective else "causal_lm"
    if objective:
        rows = {"dpo": make_pairs, "kto": make_labelled}[objective](rows.with_name(f"{objective}.jsonl"), 8)
    config = RunConfig(
        model=ModelConfig(path=str(model), dtype=dtype, task=task),
        data=DataConfig(train=str(rows), seq_len=48, packing=packing),
        dora=DoraConfig(rank=2, targets="all-linear"),
        train=TrainConfig(
            steps=4,
            micro_batch_size=2,
            accumulation=2,
            activation_checkpointing=checkpointing,
            objective=objective,
        ),
        parallel=ParallelConfig(strategy="single"),
    )
    processes = Processes()
    blueprint = make_blueprint(config, model)
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    data = RunData(config.data, config.train, config.model.task, blueprint.model, load_tokenizer(model), processes)
    built = build_to_train(blueprint, strategy)
    trainer = Trainer(built, config.model, config.train, packing, data.steps)
    return trainer, data.plan.global_batch


def watched_step(trainer, batch_of, monkeypatch):
    """What a step, not the first, reads. The batch and the optimizer's count of steps are the host's own."""
    trainer.train_step(batch_of(0))
    batch = batch_of(1)
    counts = [state["step"] for state in trainer.built.optimizer.state.values()]
    watch = Watch([*counts, *(t for micro in batch.micro_batches for t in micro.values())])
    find = head_loss.supervised_positions

    def on_the_host(targets):
        assert any(targets is tensor for micro in batch.micro_batches for tensor in micro.values())
        with torch.utils._python_dispatch._disable_current_modes():
            return find(targets)

    monkeypatch.setattr(head_loss, "supervised_positions", on_the_host)
    with watch.also_methods(monkeypatch):
        trainer.train_step(batch)
    return watch.reads


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_reads_nothing_back(name, tiny_llama, tiny_rows, monkeypatch):
    trainer, batch_of = make_trainer(tiny_llama, tiny_rows, **SETTINGS[name])
    assert watched_step(trainer, batch_of, monkeypatch) == []


def test_a_step_does_not_walk_over_the_modules(tiny_llama, tiny_rows, monkeypatch):
    """Thousands in a large model, in Python."""
    trainer, batch_of = make_trainer(tiny_llama, tiny_rows)
    trainer.train_step(batch_of(0))
    walks = []
    for name in ("train", "modules", "named_modules"):
        method = getattr(torch.nn.Module, name)

        def noted(module, *args, name=name, method=method, **kwargs):
            if module is trainer.built.model:
                walks.append(name)
            return method(module, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, name, noted)
    trainer.train_step(batch_of(1))
    assert walks == []
    trainer.sample(None, [], 1)
    trainer.train_step(batch_of(2))
    assert walks.count("train") == 2 and trainer.built.model.training  # eval is train(False)


def test_the_watch_sees_what_transformers_reads(tiny_llama, tiny_rows, monkeypatch):
    """Left to make masks, transformers looks into the position ids in each forward."""
    trainer, batch_of = make_trainer(tiny_llama, tiny_rows)
    trainer.objective.forward.attention = None
    assert len(watched_step(trainer, batch_of, monkeypatch)) == 2  # once in each micro-batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_on_a_gpu_does_not_synchronize(name, tiny_llama, tiny_rows):
    trainer, batch_of = make_trainer(tiny_llama, tiny_rows, **SETTINGS[name])
    trainer.train_step(batch_of(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(batch_of(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
