"""The library under FSDP2 without our trainer: with and without cached norms, saving, loading, refusals."""

import pytest
import torch
from conftest import ROOT, torchrun
from safetensors.torch import load_file


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_fully_sharded_model(ranks, tiny_llama, tmp_path):
    done = torchrun(ranks, ROOT / "tests" / "library_fsdp.py", str(tiny_llama), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    got, want = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sharded", "plain"))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "sharded" / "adapter_config.json").read_text() == (
        tmp_path / "plain" / "adapter_config.json"
    ).read_text()
