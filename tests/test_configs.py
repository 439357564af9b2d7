"""Each example in configs/ runs, shrunken: a test overrides sizes and paths, and nothing else."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, child_environment, torchrun
from safetensors.torch import load_file

CONFIGS = ROOT / "configs"
SIZES = [
    "dora.rank=2", "data.seq_len=64", "train.epochs=1", "train.accumulation=2", "log.every=1",
]  # fmt: skip
RANKS = {"one-4090": 1, "two-gpus": 2, "two-4090-70b": 2, "eight-gpus": 2, "multi-node-zero3": 4}
MORE_SIZES = {"multi-node-zero3": ["parallel.deepspeed.zero_optimization.zero_hpz_partition_size=2"]}


def test_every_example_is_run_somewhere():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*RANKS, "quickstart"}


@pytest.mark.parametrize("name", RANKS)
def test_an_example_runs(name, tiny_llama, tiny_rows, tmp_path):
    path = CONFIGS / f"{name}.yaml"
    assert len(path.read_text().splitlines()) <= 60
    arguments = [
        "--config", str(path), f"model.path={tiny_llama}", f"data.train={tiny_rows}", f"output_dir={tmp_path}",
        *SIZES, *MORE_SIZES.get(name, []),
    ]  # fmt: skip
    script = ROOT / "launch" / "train.py"
    if RANKS[name] == 1:
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=300)
    else:
        done = torchrun(RANKS[name], script, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)  # zeros until it is trained
