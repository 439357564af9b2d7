"""The command line as users meet it: runs that work. Mistakes are in test_cli_mistakes.py."""

import json
import os
from pathlib import Path

import pytest
import yaml

from dora_dist import cli
from dora_dist.cli import main
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.rounding import TRAINED

TRAIN = ROOT / "launch" / "train.py"


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
