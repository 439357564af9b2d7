"""`dora-dist plan`: what it prints, what it advises, and that `train` refuses what does not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dora_dist.cli import main
from dora_dist.errors import UserError
from dora_dist.models.build import make_blueprint
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import device_memory
from dora_dist.planning import rehearse as rehearsals
from dora_dist.planning.hardware import GPUS, find_cluster
from dora_dist.planning.plan import as_json, as_text, certainly_fits, check_fits, make_plan
from dora_dist.planning.rehearse import Job
from tests.support import ROOT
from tests.support.launch import child_environment
from tests.support.models import letter_tokenizer
from tests.support.ranks import run_ranks
from tests.unit.planning.test_rehearse import SHAPE_8B, config_of, write

YAML = """
model: {{path: {model}}}
dora: {{targets: all-linear}}
data: {{train: none, seq_len: 1024}}
train: {{steps: 1}}
"""


LINEAR_8B = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
IN_CHILD = rehearsals._in_child


@pytest.fixture(scope="module")
def shape_8b(tmp_path_factory):
    return write(tmp_path_factory.mktemp("8b"), **SHAPE_8B)


@pytest.fixture(scope="module")
def too_large(shape_8b, rehearse):
    """An 8B model with 4096 tokens on a 4090: 16 GB of weights alone."""
    config = config_of(shape_8b, length=4096, dtype="bfloat16")
    return make_plan(config, shape_8b, find_cluster("rtx4090", 1), rehearse)


@pytest.mark.ranks
def test_the_verb_needs_neither_weights_nor_a_gpu(shape_8b, tmp_path):
    """In a process of its own: its children import what started them."""
    (tmp_path / "c.yaml").write_text(YAML.format(model=shape_8b))
    command = [sys.executable, "-c", "from dora_dist.cli import entry; entry()", "plan", "--config", "c.yaml",
               "--gpus", "2", "--gpu", "rtx4090", "parallel.strategy=fsdp", "--json"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=child_environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    weights = 2 * (2 * 128256 * 4096 + LINEAR_8B)
    assert found["memory_bytes"]["base weights"] == pytest.approx(weights / 2, rel=0.001)
    assert found["peak_bytes"] == pytest.approx(sum(found["memory_bytes"].values()))
    assert found["strategy"] == "fsdp" and found["fits"] and found["changes"] == []
    assert found["tokens_per_step"] == 2 * 1024
    assert found["sent_bytes"]["norms: all_reduce"] > 0


def test_what_does_not_fit_comes_with_what_would(too_large):
    assert not too_large.fits and too_large.peak > 16e9
    last = too_large.changes[-1]
    assert last.fits and last.peak_bytes <= too_large.cluster.device.usable()
    assert all(not change.fits for change in too_large.changes[:-1])
    assert last.settings["train.activation_checkpointing"] is True
    text = as_text(too_large)
    assert "it does not fit" in text and "train.activation_checkpointing=true" in text
    assert "16.06 GB  base weights" in text and "not measured" in text
    assert "loading takes 34 MB of host memory for a process, 34 MB for a machine" in text  # 2^24 numbers
    share = LINEAR_8B / (LINEAR_8B + 2 * 128256 * 4096 + 65 * 4096)  # embeddings, head, norms
    adapted = f"adapted: {100 * share:.1f} % of the base's weights"
    assert adapted in text.splitlines()
    told = json.loads(json.dumps(as_json(too_large)))
    assert told["changes"][-1]["fits"] and told["coverage"] == [adapted]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu", "rtx5090"], "--gpu: 'rtx5090'"),
        (["--gpu", "h100", "--gpus", "12", "--nodes", "5"], "--gpus: 12"),
        (["--gpu", "h100", "--gpus", "2", "parallel.strategy=single"], "parallel.strategy: single"),
        (["--gpu", "h100", "--net", "1e9"], "--net: '1e9'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(arguments, named, shape_8b, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(YAML.format(model=shape_8b))
    assert main(["plan", "--config", str(tmp_path / "c.yaml"), *arguments]) == 2
    assert named in capsys.readouterr().err


def check_as_training_does(config, memory):
    directory = Path(config.model.path)
    return check_fits(config, directory, make_blueprint(config, directory).model, Processes(), memory)


def raises(_):
    raise NotImplementedError("an operator\nwithout a fake")


def fails(job):
    """In the child."""
    rehearsals.rehearse_here = raises
    return IN_CHILD(job)


def test_train_refuses_what_does_not_fit_before_loading(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **sizes)
    config = config_of(model, length=64)
    with pytest.raises(UserError, match=r"parallel.strategy: single: it does not fit.*parallel.force=true"):
        check_as_training_does(config, 8e6)
    forced = config_of(model, length=64, force=True)
    assert check_as_training_does(forced, 8e6) == []
    assert check_as_training_does(config, 30e6) == []  # fits, but not so surely that nothing is rehearsed
    assert not certainly_fits(make_blueprint(config, model).model, config, 30e6)


@pytest.mark.ranks
def test_ranks_refuse_together_before_anything_is_written(tmp_path, tiny_rows):
    """More than the machine has in 4 bits, with all done that could be advised."""
    H, M = 8192, 32768
    block = (4 * H * H + 3 * H * M) / 2
    count = int(device_memory(Processes()) // block) + 4
    sizes = {"hidden_size": H, "intermediate_size": M, "num_attention_heads": 64}
    model = write(tmp_path / "model", num_hidden_layers=count, vocab_size=96, **sizes)
    letter_tokenizer().save_pretrained(model)
    config = config_of(model, "fsdp", four_bit=True, cpu_offload=True, activation_checkpointing=True)
    config = replace(config, data=replace(config.data, train=str(tiny_rows)), output_dir=str(tmp_path / "out"))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    done = run_ranks(2, ROOT / "launch" / "train.py", "--config", str(tmp_path / "c.yaml"))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(
        "error: parallel.strategy: fsdp, offloaded to the host: it does not fit"
    ), done.stderr[-3000:]
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_that_fails_does_not_stop_training(tmp_path, monkeypatch):
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, hidden_size=64, num_attention_heads=2)

    monkeypatch.setattr(rehearsals, "_in_child", fails)
    (warning,) = check_as_training_does(config_of(model), 1e6)
    assert warning.startswith("warning: this run cannot be rehearsed") and warning.endswith(": an operator")


def test_a_bound_that_holds(tmp_path, rehearse):
    """What is let pass without a rehearsal holds far less than it is given."""
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, hidden_size=64, num_attention_heads=2)
    config = config_of(model, length=128, rows=4)
    memory = 1e6
    while not certainly_fits(make_blueprint(config, model).model, config, memory):
        memory *= 1.2
    assert rehearse(Job(config, model, 1, 1, gpu=False)).peak() < memory / 2


def test_advice_that_another_setting_rules_out_is_left_out(tmp_path, rehearse):
    """An 8-bit optimizer does not go with fsdp, which would be the next thing to try."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **sizes)
    config = config_of(model, "zero2", optimizer="adamw8bit")
    cluster = replace(find_cluster("h100", 2), device=replace(GPUS["h100"], memory=1e6, reserved=0.0))
    plan = make_plan(config, model, cluster, rehearse)
    assert plan.changes and all("parallel.strategy" not in change.settings for change in plan.changes)


def test_over_machines_what_is_faster_is_told(tmp_path, rehearse):
    """Weights gathered inside machines, over NVLink, where they fit there."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **sizes)
    config = config_of(model, "fsdp", dtype="bfloat16")
    plan = make_plan(config, model, find_cluster("h100", 16, 4, "10g"), rehearse, compare=True)
    assert plan.faster.settings == {"parallel.replicas": 4}
    assert plan.faster.step_seconds < plan.time.total and plan.faster.peak_bytes > plan.peak
    assert "faster: parallel.replicas=4" in as_text(plan) and as_json(plan)["faster"]["fits"]
    assert make_plan(config, model, find_cluster("h100", 4), rehearse, compare=True).faster is None


def test_the_command_line_knows_the_verb():
    command = [sys.executable, "-c", "from dora_dist.cli import main; main(['--help'])"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment(), timeout=60)
    assert "plan" in done.stdout
