"""Fixtures of the tests of models."""

from pathlib import Path

import pytest
import torch
import yaml

from dora_dist.adapters.adapter import save_adapter
from dora_dist.config import load_config
from dora_dist.models.build import build, make_blueprint
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Single


@pytest.fixture
def run(tiny_llama, tiny_rows, tmp_path):
    """Makes a configuration and an adapter of random A, B and m. Gives the former's path and the adapted model."""

    def make(model: Path = tiny_llama, dtype="float32", quant: dict | None = None, attention="sdpa", **dora):
        config = {
            "model": {"path": str(model), "dtype": dtype, "attention": attention},
            "dora": dora or {"rank": 2, "targets": ["q_proj", "v_proj", "down_proj", "up_proj"]},
            "quant": quant or {},
            "data": {"train": str(tiny_rows), "seq_len": 48},
            "output_dir": str(tmp_path / "run"),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        loaded = load_config(path, ["parallel.strategy=single"])
        built = build(make_blueprint(loaded, model), Single(Processes())).model.eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise * (0.3 if parameter.dim() > 1 else 0.1))
        for layer in built.modules():
            if hasattr(layer, "mark_norm_stale"):
                layer.mark_norm_stale()
        save_adapter(built, tmp_path / "run" / "adapter")
        return path, built

    return make
