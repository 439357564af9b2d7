"""Run on ranks by trl_runs.py: TRL's DPOTrainer with the mixin beside our own loop, on the same pairs."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dora_dist import load_adapter, save_adapter
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.integrations import DoraTrainerMixin
from tests.ranks.trl_runs import RATES, SETTINGS, Case, Noting, Watch, fresh_accelerate, own_trainer
from tests.support.models import make_pairs
from tests.support.rounding import MODEL, TRAINED, assert_near

STEPS, GLOBAL_BATCH, RATE = 5, 4, 0.02
METRICS = [f"{what}/{which}" for what in ("rewards", "logps") for which in ("chosen", "rejected")]
METRICS += ["rewards/margins", "rewards/accuracies"]


class OwnPairs(NamedTuple):
    losses: list[float]
    metrics: list[dict[str, float]]
    gradients: dict[str, torch.Tensor]  # the first step's, of the magnitudes
    pairs: Dataset  # in the order in which they came
    initial: Path


def own_loop(directory: str, out: Path) -> OwnPairs:
    out.mkdir()
    rows = make_pairs(out / "pairs.jsonl", 12)
    config = {
        "model": {"path": directory, "dtype": "float32", "task": "preference"},
        "dora": {"rank": 2, "alpha": 6, "targets": "all-linear"},
        "data": {"train": str(rows), "seq_len": 64},
        "train": {
            "steps": STEPS, "micro_batch_size": GLOBAL_BATCH, "lr": RATE, "schedule": "constant", "beta": 0.3,
            **RATES,
        },
        "parallel": {"strategy": "single"},
    }  # fmt: skip
    trainer, data = own_trainer(config, out)
    save_adapter(trainer.built.model, out / "initial")
    gradients: dict[str, torch.Tensor] = {}
    take_step = trainer.built.engine.step

    def note_and_step() -> torch.Tensor:
        layers = dora_layers(trainer.built.model)
        gradients.update(gradients or {name: layer.magnitude.grad.clone() for name, layer in layers.items()})
        return take_step()

    trainer.built.engine.step = note_and_step
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    losses, metrics, seen = [], [], []
    for step in range(STEPS):
        batch = data.plan.global_batch(step)
        losses.append(trainer.train_step(batch)[0].item())
        metrics.append(trainer.step_metrics(batch.targets))
        seen += [lines[unit[0] // 2] for unit in data.plan.unit_rows(step)]
    return OwnPairs(losses, metrics, gradients, Dataset.from_list(seen), out / "initial")


class Dpo(Noting, DoraTrainerMixin, DPOTrainer):
    pass


def check_dpo(case: Case) -> None:
    own: OwnPairs = case.own
    fresh_accelerate(case)
    model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(case.out), max_steps=STEPS, per_device_train_batch_size=1, bf16=False, max_length=None,
        gradient_accumulation_steps=GLOBAL_BATCH // case.ranks, learning_rate=RATE, lr_scheduler_type="constant",
        beta=0.3, train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=1, activation_checkpointing=False, dataloader_pin_memory=False,
        ddp_backend="gloo" if case.ranks > 1 else None, **SETTINGS[case.setting],
    )  # fmt: skip
    trainer = Dpo(
        model=load_adapter(model, own.initial),
        args=config,
        train_dataset=own.pairs,
        processing_class=AutoTokenizer.from_pretrained(case.directory),
        **RATES,
    )
    trainer.add_callback(Watch(trainer))
    trainer.train()
    assert trainer.losses == pytest.approx(own.losses, rel=TRAINED)
    for layer, gradient in own.gradients.items():
        assert_near(trainer.gradients[layer], gradient, MODEL, about=layer)
    logged = [line for line in trainer.state.log_history if "rewards/margins" in line]
    for line, want in zip(logged, own.metrics, strict=True):
        assert {name: line[name] for name in METRICS} == pytest.approx(want, rel=TRAINED, abs=TRAINED)
    assert own.metrics[-1]["rewards/margins"] > 0.1
