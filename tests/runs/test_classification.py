"""task: sequence_classification, as the field's DistilBERT tutorials do it."""

import csv
import json
import random

import pytest
import yaml
from safetensors.torch import load_file

from dora_dist.cli import main
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.rounding import TRAINED

LINES = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Rows that a letter decides."""
    path = tmp_path_factory.mktemp("reviews") / "train.csv"
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(64):
            word = "".join(draw.choice("abcdefg") for _ in range(6))
            writer.writerow([("zz" if i % 2 else "yy") + word, i % 2])
    return path


@pytest.fixture
def config(tiny_distilbert, reviews, tmp_path):
    text = {
        "model": {
            "path": str(tiny_distilbert),
            "task": "sequence_classification",
            "num_labels": 2,
            "dtype": "float32",
        },
        "dora": {"rank": 4, "targets": LINES},
        "data": {"train": str(reviews), "eval": str(reviews), "seq_len": 16},
        "train": {"steps": 30, "micro_batch_size": 16, "lr": 0.02},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "c.yaml"


def evaluations(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["eval_loss"], line["eval_accuracy"]) for line in lines if "eval_loss" in line]


def test_distilbert_learns_and_its_head_is_saved(config, tmp_path):
    assert main(["train", "--config", str(config)]) == 0
    (loss_before, _), (loss_after, accuracy) = evaluations(tmp_path / "run")
    assert loss_after < 0.5 * loss_before
    assert accuracy > 0.9
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    assert "base_model.model.pre_classifier.bias" in saved
    described = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert described["task_type"] == "SEQ_CLS"
    assert described["modules_to_save"] == ["classifier", "pre_classifier"]
    assert sorted(described["target_modules"]) == sorted(LINES)


@pytest.mark.ranks
def test_sharded_classification_gives_the_same_numbers(config, tmp_path):
    assert main(["train", "--config", str(config), "train.steps=5", "dora.dropout=0"]) == 0
    alone = evaluations(tmp_path / "run")
    more = [
        "train.steps=5",
        "train.micro_batch_size=8",
        "parallel.strategy=fsdp",
        f"output_dir={tmp_path / 'two'}",
    ]
    done = run_ranks(2, ROOT / "launch" / "train.py", "--config", str(config), *more)
    assert done.returncode == 0, done.stderr[-3000:]
    for got, want in zip(evaluations(tmp_path / "two"), alone, strict=True):
        assert got == pytest.approx(want, rel=TRAINED)


def test_a_decoder_classifies_too(config, tmp_path, tiny_llama):
    more = [
        f"model.path={tiny_llama}",
        "dora.targets=all-linear",
        "dora.rank=2",
        "train.steps=3",
        "model.num_labels=3",
    ]
    assert main(["train", "--config", str(config), *more]) == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].shape == (3, 12)


def test_a_label_outside_the_models_is_named(config, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 7}\n')
    assert main(["train", "--config", str(config), f"data.train={rows}"]) == 2
    assert f"{rows}:2" in capsys.readouterr().err
