"""Each example in configs/ runs, shrunken: a test overrides sizes and paths, and nothing else."""

import json

import pytest
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.models import make_pairs, save_model
from tests.support.ranks import run_ranks
from tests.support.small import small_model

pytestmark = pytest.mark.ranks

CONFIGS = ROOT / "configs"
SIZES = [
    "dora.rank=2", "data.seq_len=64", "train.epochs=1", "train.accumulation=2", "log.every=1",
]  # fmt: skip
RANKS = {
    "one-4090": 1, "one-4090-qdora": 1, "one-4090-dpo": 1, "gpt2-classification": 1,
    "distilbert-classification": 2, "two-gpus": 2, "two-4090-70b": 2, "eight-gpus": 2, "eight-gpus-70b": 2,
    "slurm": 2, "multi-node-405b": 2,
    "multi-node-405b-zero3": 2, "multi-node-hybrid": 4, "multi-node-zero3": 4, "one-4090-30b-moe": 1,
    "one-h100-120b-moe": 1, "eight-gpus-235b-moe": 2, "multi-node-671b-moe": 2,
}  # fmt: skip
SLOW = {"one-h100-120b-moe", "eight-gpus-235b-moe", "multi-node-671b-moe"}
MORE_SIZES = {
    "multi-node-zero3": ["parallel.deepspeed.zero_optimization.zero_hpz_partition_size=2"],
    "multi-node-hybrid": ["train.micro_batch_size=1"],
    "gpt2-classification": ["train.micro_batch_size=4"],
    "distilbert-classification": ["train.micro_batch_size=4", "data.seq_len=32"],
}


def test_every_example_is_run_somewhere():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*RANKS, "quickstart"}


@pytest.fixture
def model_and_rows(name, tiny_llama, tiny_rows, tiny_gpt2, tiny_distilbert, tmp_path):
    """Tiny ones of the example's kind."""
    if name.endswith("moe"):
        kind = {"one-h100-120b-moe": "gpt_oss", "multi-node-671b-moe": "deepseek_v3"}.get(name, "qwen3_moe")
        return save_model(small_model(kind, {"num_key_value_heads": 4}), tmp_path / "model"), tiny_rows
    if name.endswith("dpo"):
        return tiny_llama, make_pairs(tmp_path / "pairs.jsonl", 8)
    if not name.endswith("classification"):
        return tiny_llama, tiny_rows
    rows = [json.dumps({"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2}) for i in range(24)]
    (tmp_path / "labels.jsonl").write_text("\n".join(rows))
    return (tiny_gpt2 if name.startswith("gpt2") else tiny_distilbert), tmp_path / "labels.jsonl"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in RANKS])
def test_an_example_runs(name, model_and_rows, tmp_path):
    path = CONFIGS / f"{name}.yaml"
    model, rows = model_and_rows
    assert len(path.read_text().splitlines()) <= 60
    arguments = [
        "--config", str(path), f"model.path={model}", f"data.train={rows}", f"output_dir={tmp_path}",
        *SIZES, *MORE_SIZES.get(name, []),
    ]  # fmt: skip
    done = run_ranks(RANKS[name], ROOT / "launch" / "train.py", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = [tensor for key, tensor in tensors.items() if "lora_B" in key]
    assert trained and all(tensor.any() for tensor in trained)  # zeros until then
