"""model.task: preference and reward_model, as users start them."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from dora_dist.cli import main
from tests.support.models import make_labelled, make_pairs, train_command

STEPS = 12


@pytest.fixture(scope="module")
def command(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("preference")
    pairs = str(make_pairs(directory / "pairs.jsonl", 12))
    return train_command(
        directory,
        model={"path": str(tiny_llama), "task": "preference", "dtype": "float32"},
        dora={"rank": 3, "targets": "all-linear"},
        data={"train": pairs, "eval": pairs, "seq_len": 48},
        train={"steps": STEPS, "micro_batch_size": 3, "accumulation": 2, "lr": 0.01, "eval_every": 6},
        checkpoint={"every": 4, "keep": 9},
        log={"sample_prompts": ["alpha 0:"], "sample_tokens": 4},
    )


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics):
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in metrics]


def test_margins_rise_and_a_resumed_run_is_the_same_to_the_bit(command, tmp_path, capsys):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*command, f"output_dir={whole}"]) == 0
    told = capsys.readouterr().out
    assert "  margin " in told and "  accuracy " in told and "eval_rewards/margins: " in told
    steps = [line for line in lines(whole) if "loss" in line]
    evaluations = [line for line in lines(whole) if "eval_loss" in line]
    assert [steps[0]["loss"], evaluations[0]["eval_loss"]] == pytest.approx([math.log(2)] * 2, rel=1e-5)
    assert abs(steps[0]["rewards/margins"]) < 1e-4 < 0.5 < steps[-1]["rewards/margins"]
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.9
    assert len(evaluations) == 3

    shutil.copytree(whole / "checkpoints" / "step-00000004", again / "checkpoints" / "step-00000004")
    assert main([*command, f"output_dir={again}"]) == 0
    assert without_times(lines(again))[-9:] == without_times(lines(whole))[-9:]
    for name, tensor in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        assert load_file(again / "adapter" / "adapter_model.safetensors")[name].equal(tensor), name
    assert main(["merge", "--config", str(whole / "config.yaml"), str(tmp_path / "merged")]) == 0


def test_what_a_reference_cannot_be_right_with(command, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    more = ["train.eval_every=null", "data.eval=null", f"output_dir={tmp_path / 'first'}"]
    assert main([*command, *more, "train.objective=orpo", "train.steps=1"]) == 0
    shutil.copytree(tmp_path / "first" / "adapter", adapter)
    again = [*command, *more[:2], f"output_dir={tmp_path / 'second'}", f"dora.init_from={adapter}"]
    assert main(again) == 2
    assert "dora.init_from: the reference of train.objective: dpo is the base" in capsys.readouterr().err
    assert main([*again, "train.objective=simpo", "train.steps=1"]) == 0


def test_kto_needs_another_row(command, tmp_path, capsys):
    rows = make_labelled(tmp_path / "labelled.jsonl", 12)
    kto = [
        *command, "train.objective=kto", f"data.train={rows}", f"data.eval={rows}", "train.steps=2",
        "train.eval_every=null", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main([*kto, "train.micro_batch_size=1", "train.accumulation=1"]) == 2
    assert "train.objective: kto compares each row of a step with another one" in capsys.readouterr().err
    assert main(kto) == 0
    assert 0 <= lines(tmp_path / "run")[1]["kl"] < 1e-4  # the policy is the reference still
    assert main(["merge", "--config", str(tmp_path / "run" / "config.yaml"), str(tmp_path / "merged")]) == 0


def test_a_reward_model(command, tmp_path):
    one = make_pairs(tmp_path / "one.jsonl", 1)
    run = [*command, "model.task=reward_model", f"output_dir={tmp_path / 'run'}", f"data.eval={one}"]
    assert main(run) == 0
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert steps[0]["rewards/margins"] < 0.2 < 0.5 < steps[-1]["rewards/margins"]
    for line in lines(tmp_path / "run"):
        if "eval_loss" in line:  # of one pair
            assert line["eval_loss"] == pytest.approx(
                math.log1p(math.exp(-line["eval_rewards/margins"])), rel=1e-4
            )
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].shape == (1, 12)
    assert main(["merge", "--config", str(tmp_path / "run" / "config.yaml"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 1
