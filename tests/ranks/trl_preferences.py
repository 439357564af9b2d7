"""Run on ranks by trl_runs.py: TRL's DPOTrainer and KTOTrainer with the mixin beside our loop on the same rows."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from dora_dist import load_adapter, save_adapter
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.integrations import DoraTrainerMixin
from tests.ranks.trl_runs import PLACES, RATES, SETTINGS, Case, Noting, Watch, fresh_accelerate, own_trainer
from tests.support.models import make_labelled, make_pairs
from tests.support.rounding import MODEL, TRAINED, assert_near

STEPS, GLOBAL_BATCH, RATE, BETA = 5, 4, 0.02, 0.3
KINDS = {"dpo": {}, "dpo nf4": {"quant": {"scheme": "nf4"}}, "kto": {}}


class Own(NamedTuple):
    """Our own loop, which the trainers are held against."""

    losses: list[float]
    metrics: list[dict[str, float]]
    gradients: dict[str, torch.Tensor]  # the first step's, of the magnitudes
    rows: Dataset  # in the order in which they came
    initial: Path  # the adapter before the first step


def run_config(kind: str, directory: str, rows: Path) -> dict[str, Any]:
    return {
        "model": {"path": directory, "dtype": "float32", "task": "preference"},
        "dora": {"rank": 2, "alpha": 6, "targets": "all-linear"},
        "data": {"train": str(rows), "seq_len": 64},
        "train": {
            "steps": STEPS, "micro_batch_size": GLOBAL_BATCH, "lr": RATE, "schedule": "constant", "beta": BETA,
            "objective": kind.partition(" ")[0], **RATES,
        },
        "parallel": {"strategy": "single"},
        **KINDS[kind],
    }  # fmt: skip


@cache
def own_loop(kind: str, directory: str, out: Path) -> Own:
    out.mkdir(parents=True)
    make, per_row = (make_labelled, 1) if kind == "kto" else (make_pairs, 2)
    rows = make(out / "rows.jsonl", 12)
    trainer, data = own_trainer(run_config(kind, directory, rows), out)
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
        seen += [lines[unit[0] // per_row] for unit in data.plan.unit_rows(step)]
    return Own(losses, metrics, gradients, Dataset.from_list(seen), out / "initial")


class Dpo(Noting, DoraTrainerMixin, DPOTrainer):
    pass


class Kto(Noting, DoraTrainerMixin, KTOTrainer):
    pass


def check(kind: str, case: Case, out: Path) -> None:
    """`out`: for what our own loop needs."""
    one_process = {name: value for name, value in case.environment.items() if name not in PLACES}
    fresh_accelerate(case._replace(setting="single", environment=one_process))
    own, model = own_loop(kind, case.directory, out), None
    if kind.endswith("nf4"):
        model = own_trainer(run_config(kind, case.directory, out / "rows.jsonl"), out)[0].built.model
    fresh_accelerate(case)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
        load_adapter(model, own.initial)
    # KTOTrainer takes the mean of what it compares from a process's micro-batch; so let that be all.
    size = GLOBAL_BATCH if kind == "kto" else 1
    make, config_of = (Kto, KTOConfig) if kind == "kto" else (Dpo, DPOConfig)
    config = config_of(
        output_dir=str(case.out), max_steps=STEPS, per_device_train_batch_size=size, bf16=False, max_length=None,
        gradient_accumulation_steps=GLOBAL_BATCH // case.ranks // size, learning_rate=RATE,
        lr_scheduler_type="constant", beta=BETA, train_sampling_strategy="sequential", save_strategy="no",
        report_to="none", disable_tqdm=True, logging_steps=1, activation_checkpointing=False,
        dataloader_pin_memory=False, ddp_backend="gloo" if case.ranks > 1 else None, **SETTINGS[case.setting],
    )  # fmt: skip
    trainer = make(
        model=model,
        args=config,
        train_dataset=own.rows,
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
        assert {name: line[name] for name in want} == pytest.approx(want, rel=TRAINED, abs=TRAINED)
    assert own.metrics[-1]["rewards/margins"] > 0.1
