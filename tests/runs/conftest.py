"""Fixtures of the runs."""

import pytest


@pytest.fixture
def config(tiny_llama, tiny_rows, tmp_path):
    """A small valid run; tests change one thing."""
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
        "data": {"train": str(tiny_rows), "eval": str(tiny_rows), "seq_len": 48},
        "train": {"steps": 4, "micro_batch_size": 4, "lr": 0.02},
        "log": {"sample_prompts": ["alpha 0:"], "sample_tokens": 4},
        "output_dir": str(tmp_path / "run"),
    }
