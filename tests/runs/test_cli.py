"""The command line as users meet it: runs that work, and mistakes told in one line with status 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dora_dist import cli
from dora_dist.cli import main
from dora_dist.models.weights import SafetensorsFiles
from tests.support import ROOT
from tests.support.launch import child_environment
from tests.support.ranks import run_ranks
from tests.support.rounding import TRAINED

TRAIN = ROOT / "launch" / "train.py"


@pytest.fixture
def config(tiny_llama, tiny_rows, tmp_path):
    """A small valid run; tests change one thing."""
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
        "data": {"train": str(tiny_rows), "eval": str(tiny_rows), "seq_len": 48},
        "train": {"steps": 4, "micro_batch_size": 4, "lr": 0.02},
        "log": {"sample_prompts": ["alpha 0:"], "sample_tokens": 4},
        "output_dir": str(tmp_path / "run"),
    }


def write(config, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_leaves_what_the_interface_says(config, tmp_path, capsys):
    assert main(["train", "--config", str(write(config, tmp_path)), "train.accumulation=2"]) == 0
    assert "ALLOC_CONF" in " ".join(os.environ)  # of a GPU's allocator, set before its first use
    out = capsys.readouterr().out
    assert "eval_loss" in out and "before" in out and "after" in out and str(tmp_path / "run" / "adapter") in out
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["train"]["accumulation"] == 2
    assert resolved["dora"]["alpha"] == 32
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    keys = "step loss grad_norm lr tokens tokens_per_second step_seconds norm_seconds peak_memory_bytes".split()
    assert list(steps[0]) == keys
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert {p.name for p in (tmp_path / "run" / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_the_first_loss_is_the_mean_over_supervised_tokens(config, tmp_path):
    """Against transformers' own loss on the same rows, token by token, whatever the accumulation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config["train"].update(steps=1, micro_batch_size=2, accumulation=12)  # one step takes all 24 rows
    assert main(["train", "--config", str(write(config, tmp_path))]) == 0
    (line,) = [
        json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in x
    ]
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    total = count = 0
    for row in map(json.loads, Path(config["data"]["train"]).read_text().splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            n = ids.shape[1] - len(prompt)
            total, count = total + model(ids, labels=labels).loss.item() * n, count + n
    assert line["loss"] == pytest.approx(total / count, rel=TRAINED)
    assert line["tokens"] > count


def test_continuing_from_an_adapter_starts_where_it_ended(config, tmp_path):
    path = write(config, tmp_path)
    assert main(["train", "--config", str(path)]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    again = [f"dora.init_from={adapter}", f"output_dir={tmp_path / 'again'}"]
    assert main(["train", "--config", str(path), *again]) == 0

    def evaluations(run):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [line["eval_loss"] for line in lines if "eval_loss" in line]

    assert evaluations("again")[0] == pytest.approx(evaluations("run")[1], rel=TRAINED)


def test_packing_streaming_schedules_and_rates(config, tmp_path):
    more = [
        "data.packing=true", "data.streaming=true", "train.schedule=linear", "train.magnitude_lr=1e-3",
        "train.lora_plus_ratio=4", "model.attention=eager", "log.tensorboard=true", "train.eval_every=2",
    ]  # fmt: skip
    assert main(["train", "--config", str(write(config, tmp_path)), *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])  # train.lr's, not that of B or of the magnitudes
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_runs_learn(config, tmp_path, dtype):
    assert main(["train", "--config", str(write(config, tmp_path)), f"model.dtype={dtype}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert last < first


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


def test_overrides_may_stand_on_both_sides_of_an_option(config, tmp_path):
    path = str(write(config, tmp_path))
    assert main(["train", "train.steps=2", "--config", path, f"output_dir={tmp_path / 'both'}"]) == 0
    assert (tmp_path / "both" / "adapter").is_dir()
    with pytest.raises(SystemExit):
        main(["train", "--config", path, "--steps", "2"])


def test_yaml_merge_keys(tmp_path):
    from dora_dist.schema import parse_yaml

    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_windowed_attention_refuses_packing(config, tmp_path, capsys):
    from transformers import MistralConfig, MistralForCausalLM

    from tests.support.models import save_model

    small = MistralConfig(
        vocab_size=96, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    model = tmp_path / "mistral"
    model.mkdir()
    config["model"]["path"] = str(save_model(MistralForCausalLM(small), model))
    assert main(["train", "--config", str(write(config, tmp_path)), "data.packing=true"]) == 2
    assert "windowed attention" in capsys.readouterr().err
    assert main(["train", "--config", str(write(config, tmp_path)), "train.steps=1"]) == 0


def test_numbers_as_people_write_them(config, tmp_path):
    from dora_dist.config import load_config

    loaded = load_config(write(config, tmp_path), ["train.lr=1e-4", "dora.rank=2", "data.train=a=b"])
    assert loaded.train.lr == 1e-4
    assert loaded.data.train == "a=b"


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


@pytest.mark.ranks
def test_ranks_train_and_tell_a_mistake_once(config, tmp_path):
    path = str(write(config, tmp_path))
    done = run_ranks(2, TRAIN, "--config", path, "parallel.strategy=fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "strategy fsdp, 2 processes" in done.stdout
    streaming = ("data.streaming=true", "train.steps=2", "output_dir=" + config["output_dir"] + "/streaming")
    done = run_ranks(2, TRAIN, "--config", path, "parallel.strategy=ddp", *streaming)  # once hung at its end
    assert done.returncode == 0, done.stderr[-3000:]
    assert "data, read once: " in done.stdout
    assert "strategy ddp, 2 processes" in done.stdout
    done = run_ranks(2, TRAIN, "--config", path, "dora.targets=nothing")
    assert done.returncode != 0
    assert done.stderr.count("error: dora.targets: 'nothing' matches no module") == 1
    done = run_ranks(2, TRAIN, "--config", path, "parallel.strategy=single")
    assert "error: parallel.strategy: single runs in one process, but 2 were launched" in done.stderr


def test_the_allocator_of_gpus_is_set_up_unless_it_is_already():
    for environment in ({}, {"PATH": "/bin"}):
        cli._let_segments_grow(environment)
        assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        mine = {name: "max_split_size_mb:64"}
        cli._let_segments_grow(mine)
        assert mine == {name: "max_split_size_mb:64"}
