"""TRL's trainers with the mixin, sharded by accelerate: losses, gradients, norms, checkpoints."""

import pytest

from tests.support import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks


FEW = (
    "others", "refusals: fsdp", "single", "nf4: fsdp, loaded by one rank", "zero3, checkpointed", "dpo: zero3",
    "kto: single",
)  # fmt: skip
MORE = (
    "ddp", "fsdp, loaded by one rank", "fsdp, checkpointed", "zero2, its optimizer", "nf4: single", "nf4: zero2",
    "nf4: zero3", "dpo: single", "dpo: fsdp", "dpo nf4: fsdp", "vllm: single", "vllm: fsdp", "vllm: zero3",
)  # fmt: skip


@pytest.mark.parametrize("settings", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_trainers_are_our_loop(settings, tiny_llama, tiny_rows, tmp_path):
    script = ROOT / "tests/ranks/trl_runs.py"
    done = run_ranks(2, script, str(tiny_llama), str(tiny_rows), str(tmp_path), *settings)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
