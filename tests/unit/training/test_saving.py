"""The adapter is written in trial before the first step, and what was trained outlives a last save that fails."""

import errno
import os

import pytest
from safetensors.torch import load_file

from dora_dist.cli import main
from dora_dist.io import durable
from dora_dist.training import run
from tests.support.models import train_command


@pytest.fixture
def command(tiny_llama, tiny_rows, tmp_path):
    return train_command(
        tmp_path,
        model={"path": str(tiny_llama), "dtype": "float32"},
        dora={"rank": 2, "targets": ["q_proj"]},
        data={"train": str(tiny_rows), "seq_len": 48},
        train={"steps": 2},
    )


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_too_small_for_the_adapter_ends_the_run_before_its_first_step(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(durable.os, "fsync", full)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "output_dir: the adapter could not be written at the end: No space left on device" in error
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_name_that_is_taken_ends_the_run_before_its_first_step(command, tmp_path, capsys):
    (tmp_path / "run" / "adapter" / "adapter_config.json" / "x").mkdir(parents=True)
    assert main(command) == 2
    assert "adapter_config.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "adapter").iterdir()] == ["adapter_config.json"]


def test_the_trial_leaves_an_older_adapter_and_clears_up_after_a_killed_one(command, tmp_path, monkeypatch):
    adapter = tmp_path / "run" / "adapter"
    (adapter / ".partial-trial-1").mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_text("older")
    monkeypatch.setattr(run.Loop, "run", full)
    with pytest.raises(OSError, match="No space"):
        main(command)
    assert {path.name: path.read_text() for path in adapter.iterdir()} == {"adapter_model.safetensors": "older"}


@pytest.mark.parametrize("error", [full, lambda *_: 1 / 0], ids=["disk", "bug"])
def test_where_the_last_save_fails_a_checkpoint_stands_and_is_named(command, tmp_path, monkeypatch, capsys, error):
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_adapter", error)
        assert main(command) == 1
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    found = capsys.readouterr().err
    assert found.startswith("error: output_dir: the adapter cannot be written: ") and str(checkpoint) in found
    assert main(command) == 0  # goes on from it, with no step left
    assert "resumed from" in capsys.readouterr().out
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert trained.keys() == load_file(checkpoint / "adapter_model.safetensors").keys()
