"""The scripts in examples/, run as users run them, on the quickstart's model."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks
SMALL = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu".split()
EXAMPLES = {
    "trainer": SMALL,
    "sft": SMALL,
    "dpo": SMALL,
    "grpo": [*SMALL, *"--num_generations 2 --max_completion_length 4".split()],
}
MATRICES = 4 * 7  # adapted ones of the quickstart's model


def run_examples(examples: dict[str, list[str]], out: str) -> None:
    """In one process, as importing TRL takes longer than all of them."""
    os.chdir(ROOT)
    for name, arguments in examples.items():
        sys.argv = [name, "--output_dir", str(Path(out) / name), *arguments]
        runpy.run_path(f"examples/{name}.py", run_name="__main__")


def test_every_example_leaves_an_adapter(tmp_path):
    pytest.importorskip("trl")
    assert set(EXAMPLES) == {path.stem for path in (ROOT / "examples").glob("*.py")}
    done = run_ranks(1, run_examples, EXAMPLES, str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    for name in EXAMPLES:
        adapter = load_file(tmp_path / name / "adapter_model.safetensors")
        A, B, m = ([t for key, t in adapter.items() if kind in key] for kind in ("lora_A", "lora_B", "magnitude"))
        assert len(A) == len(B) == len(m) == MATRICES, name
        assert all(tensor.any() for tensor in B), name  # it was trained


@pytest.mark.slow
def test_grpo_raises_its_reward(tmp_path):
    """By far more than the mean of a step's 32 rewards is unsure."""
    pytest.importorskip("trl")
    done = run_ranks(1, run_examples, {"grpo": ["--use_cpu"]}, str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    (state,) = tmp_path.glob("grpo/checkpoint-20/trainer_state.json")
    logs = [log for log in json.loads(state.read_text())["log_history"] if "reward" in log]
    assert len(logs) == 20
    unsure = max(log["reward_std"] for log in logs) / 32**0.5
    assert logs[-1]["reward"] > logs[0]["reward"] + 6 * unsure
