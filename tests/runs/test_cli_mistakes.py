"""Mistakes as users of the command line meet them: one line, and status 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dora_dist.cli import main
from dora_dist.models.files import SafetensorsFiles
from tests.runs.test_cli import TRAIN, write
from tests.support.launch import child_environment

MISTAKES = {
    "unknown section": ({"dorra": {}}, "dorra: unknown key; did you mean 'dora'?"),
    "unknown key": ({"dora.rnk": 4}, "dora.rnk: unknown key; did you mean 'rank'?"),
    "wrong type": ({"train.lr": "fast"}, "train.lr: expected a number, found 'fast'"),
    "bool for int": ({"train.steps": True}, "train.steps: expected a whole number or null, found true"),
    "choice": ({"model.dtype": "bf16"}, "model.dtype: expected one of bfloat16, float32, float16"),
    "range": ({"dora.rank": 0}, "dora.rank: 0 is too small"),
    "not built yet": ({"model.revision": "main"}, "model.revision: unknown key"),
    "no checkpoint": ({"checkpoint.resume": "./nowhere"}, "checkpoint.resume: 'nowhere' is neither a checkpoint"),
    "no model": ({"model.path": "./nowhere"}, "model.path: there is no directory './nowhere'"),
    "no data": ({"data.train": "./nowhere.jsonl"}, "data.train"),
    "no eval": ({"data.eval": "./nowhere.jsonl"}, "data.eval"),
    "no target": (
        {"dora.targets": ["q_prj"]},
        "dora.targets: 'q_prj' matches no module; did you mean 'q_proj'",
    ),
    "rank too large": ({"dora.rank": 16}, "dora.rank: 16 is larger than the smaller side"),
    "too few rows": ({"train.micro_batch_size": 25}, "data.train: there are 24 rows, but one step takes 25"),
    "too long": (
        {"data.seq_len": 4096},
        "data.seq_len: 4096 exceeds the model's 64 positions",
    ),
    "strategy": ({"parallel.replicas": 2, "parallel.strategy": "ddp"}, "parallel.replicas needs"),
    "replicas": (
        {"parallel.replicas": 2},
        "parallel.replicas: 2 replica groups do not divide the 1 processes",
    ),
    "stream length": (
        {"data.streaming": True, "train.steps": None},
        "train.steps: needed with data.streaming",
    ),
    "no adapter": ({"dora.init_from": "./nowhere"}, "dora.init_from: nowhere: not a PEFT adapter"),
    "empty section": ({"train": []}, "train: expected a section of keys, found the list []"),
    "one label": ({"model.num_labels": 1, "model.task": "sequence_classification"}, "model.num_labels: 1"),
    "labels without a classifier": ({"model.num_labels": 2}, "model.num_labels needs model.task"),
    "nothing to evaluate": ({"data.eval": None, "train.eval_every": 2}, "train.eval_every needs data.eval"),
    "lora has no magnitude": ({"dora.method": "lora", "train.magnitude_lr": 0.1}, "train.magnitude_lr needs"),
    "long sample": ({"log.sample_tokens": 90}, "log.sample_prompts: 'alpha 0:' and its completion need 98 of 64"),
    "null section": ({"model": None}, "model.path: missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(config, tmp_path, capsys, monkeypatch, mistake):
    changes, expected = MISTAKES[mistake]
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    monkeypatch.setattr(SafetensorsFiles, "read", lambda *_: pytest.fail("a weight was read"))
    assert main(["train", "--config", str(write(config, tmp_path))]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert expected in error


def test_a_missing_optimizer_is_told_before_weights_are_read(config, tmp_path, capsys, monkeypatch):
    config["train"]["optimizer"] = "adamw8bit"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(SafetensorsFiles, "read", lambda *_: pytest.fail("a weight was read"))
    assert main(["train", "--config", str(write(config, tmp_path))]) == 2
    assert "train.optimizer: adamw8bit needs bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "expected sections"),
        ("", "expected sections"),
        ("model: {path: a, path: b}", "the key 'path' stands twice"),
        ("1: 2", "must be a string"),
    ],
)
def test_a_broken_yaml_is_one_line(tmp_path, capsys, text, expected):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert expected in capsys.readouterr().err


def test_missing_config_and_bad_overrides(config, tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["train", "--config", str(write(config, tmp_path)), "train.lr"]) == 2
    assert "key.sub=value" in capsys.readouterr().err


def test_damaged_models_are_named(config, tmp_path, capsys, tiny_llama):
    def run_on(change) -> str:
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(tiny_llama, model)
        change(model)
        config["model"]["path"] = str(model)
        assert main(["train", "--config", str(write(config, tmp_path))]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return error

    assert "config.json" in run_on(lambda m: (m / "config.json").unlink())
    assert "config.json" in run_on(lambda m: (m / "config.json").write_text("{"))

    def spoil(model):
        text = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**text, "hidden_size": "abc"}))

    assert "cannot be used" in run_on(spoil)
    assert "safetensors" in run_on(lambda m: (m / "model.safetensors").unlink())
    assert "not a readable safetensors file" in run_on(lambda m: (m / "model.safetensors").write_bytes(b"x" * 99))
    assert "tokenizer" in run_on(lambda m: (m / "tokenizer.json").unlink())

    def shrink(model):
        text = json.loads((model / "config.json").read_text())
        text["vocab_size"] = 50
        (model / "config.json").write_text(json.dumps(text))

    assert "does not fit its config.json" in run_on(shrink)
    index = {"weight_map": {"a": "../outside.safetensors"}}
    assert "../outside" in run_on(lambda m: (m / "model.safetensors.index.json").write_text(json.dumps(index)))


def test_a_tokenizer_larger_than_the_vocabulary(config, tmp_path, capsys, tiny_llama):
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(model)
    config["model"]["path"] = str(model)
    assert main(["train", "--config", str(write(config, tmp_path))]) == 2
    error = capsys.readouterr().err
    assert "tokenizer" in error and "105" in error and "96" in error


def test_bad_rows_are_named_or_skipped(config, tmp_path, capsys):
    rows = Path(config["data"]["train"]).read_text().splitlines()
    rows.insert(3, '{"prompt": "x"}')
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(rows))
    config["data"]["train"] = str(path)
    assert main(["train", "--config", str(write(config, tmp_path))]) == 2
    assert f"{path}:4" in capsys.readouterr().err
    assert main(["train", "--config", str(write(config, tmp_path)), "data.on_bad_row=skip"]) == 0
    assert "1 skipped" in capsys.readouterr().out


def test_the_real_command_ends_with_status_2_and_no_traceback(config, tmp_path):
    command = [sys.executable, str(TRAIN), "--config", str(write(config, tmp_path)), "dora.targets=nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    ]
