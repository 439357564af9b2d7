"""The library without our trainer, under FSDP2 and under DeepSpeed: cached norms, saving, loading, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.rounding import TRAINED

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_fully_sharded_model(ranks, tiny_llama, tmp_path):
    done = run_ranks(ranks, ROOT / "tests/ranks/library_fsdp.py", str(tiny_llama), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    check_adapters(tmp_path)


@pytest.mark.parametrize(
    ("stage", "ranks"), [(1, 2), (2, 2), (3, 2), (3, 3), pytest.param(3, 4, marks=pytest.mark.slow)]
)
def test_any_deepspeed_engine(stage, ranks, tiny_llama, tmp_path):
    done = run_ranks(ranks, ROOT / "tests/ranks/library_zero.py", str(stage), str(tiny_llama), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    check_adapters(tmp_path)


def check_adapters(directory: Path) -> None:
    """The adapter saved from shards is the one of unsharded training."""
    got, want = (load_file(directory / name / "adapter_model.safetensors") for name in ("sharded", "plain"))
    assert got.keys() == want.keys()
    error = torch.cat([(got[key] - tensor).flatten() for key, tensor in want.items()]).norm()
    assert error <= TRAINED * torch.cat([tensor.flatten() for tensor in want.values()]).norm()
    assert (directory / "sharded" / "adapter_config.json").read_text() == (
        directory / "plain" / "adapter_config.json"
    ).read_text()
