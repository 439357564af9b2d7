"""Losses and gradient norms of small runs, step by step, against those that curves.json holds.

A change that shall leave the numbers alone leaves these alone to the bit, on one machine:

    python -m tests.runs.test_curves --exact    compares every bit, also of the whole quickstart
    python -m tests.runs.test_curves --write    renews curves.json, after a change that shall change the numbers

Other machines round otherwise, so the tests allow for that.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import ROOT
from tests.support.models import make_rows, make_tiny_distilbert, make_tiny_llama
from tests.support.ranks import run_ranks
from tests.support.rounding import TRAINED

pytestmark = pytest.mark.ranks

STORED = Path(__file__).with_name("curves.json")
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
KEYS = {"loss": TRAINED, "grad_norm": 10 * TRAINED, "eval_loss": TRAINED}  # how far each may lie from the stored


@dataclass(frozen=True)
class Run:
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """Laid over those of `small_config`."""


def sharded(ranks: int, **parallel: Any) -> Run:
    """The same 8 rows a step as one process takes."""
    return Run(ranks, {"train.micro_batch_size": 4 // ranks, **{f"parallel.{k}": v for k, v in parallel.items()}})


SMALL = {
    "single": Run(),
    "nf4": Run(settings={"quant.scheme": "nf4"}),
    "classification": Run(settings={"model.task": "sequence_classification", "model.num_labels": 2}),
    "ddp": sharded(2, strategy="ddp"),
    "fsdp": sharded(2, strategy="fsdp"),
    "hybrid": sharded(4, strategy="fsdp", replicas=2),
    "zero2": sharded(2, strategy="zero2"),
    "zero3": sharded(
        2, strategy="zero3", deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    ),
}
FEW_STEPS = {"train.steps": 5, "train.micro_batch_size": 2, "data.eval": None, "log.sample_prompts": []}


def small_config(folder: Path, classifies: bool) -> dict[str, Any]:
    """A run of 5 steps of 8 rows, over a model and rows that are made in `folder`."""
    rows = make_rows(folder / "rows.jsonl", 24)
    if classifies:
        texts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
        labelled = ({"text": text, "label": i % 2} for i, text in enumerate(texts))
        rows.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    make_model = make_tiny_distilbert if classifies else make_tiny_llama
    return {
        "model": {"path": str(make_model(folder / "model")), "dtype": "float32"},
        "dora": {"rank": 2, "alpha": 4, "targets": "all-linear"},
        "data": {"train": str(rows), "eval": str(rows), "seq_len": 32},
        "train": {"steps": 5, "micro_batch_size": 4, "accumulation": 2, "lr": 0.01, "warmup_steps": 1},
    }


def curve(name: str, folder: Path) -> dict[str, list[float]]:
    """The numbers of one run, as its metrics.jsonl has them."""
    if name.startswith("quickstart"):
        run = Run(2, FEW_STEPS if name == "quickstart" else {})
        path = QUICKSTART
    else:
        run, path = SMALL[name], folder / "config.yaml"
        path.write_text(yaml.safe_dump(small_config(folder, name == "classification")))
    overrides = {**run.settings, "log.every": 1, "output_dir": str(folder / "run")}
    arguments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    done = run_ranks(run.ranks, ROOT / "launch" / "train.py", "--config", str(path), *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {key: found for key in KEYS if (found := [line[key] for line in lines if key in line])}


@pytest.mark.parametrize("name", ["quickstart", *SMALL])
def test_losses_are_the_stored_ones(name, tmp_path, monkeypatch):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    monkeypatch.chdir(ROOT)  # the quickstart's paths are relative
    got, want = curve(name, tmp_path), json.loads(STORED.read_text())["curves"][name]
    assert got.keys() == want.keys()
    for key, values in want.items():
        assert got[key] == pytest.approx(values, rel=KEYS[key]), key


def main(write: bool) -> int:
    machine = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}
    curves = {}
    for name in (*SMALL, "quickstart", "quickstart, whole"):
        with tempfile.TemporaryDirectory() as folder:
            curves[name] = curve(name, Path(folder))
    if write:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in curves.items())
        STORED.write_text(f'{{"machine": {json.dumps(machine)},\n"curves": {{\n{lines}\n}}}}\n')
        return 0
    stored = json.loads(STORED.read_text())
    print(f"stored on {stored['machine']}, compared on {machine}")
    for name, found in curves.items():
        print(f"{name}: {'equal to the bit' if found == stored['curves'][name] else 'DIFFERENT'}")
    return int(curves != stored["curves"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--exact", action="store_true", help="compare every bit")
    mode.add_argument("--write", action="store_true", help="renew the stored curves")
    sys.exit(main(parser.parse_args().write))
