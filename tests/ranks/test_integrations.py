"""TRL's trainers with the mixin, sharded by accelerate: losses, gradients, norms, checkpoints."""

import pytest

from tests.support import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks


FEW = (
    "others", "single", "fsdp, loaded by one rank", "zero3", "dpo: zero3", "dpo nf4: fsdp", "kto: single",
    "vllm: fsdp",
)  # fmt: skip
MORE = "ddp", "fsdp", "fsdp, checkpointed", "zero2", "dpo: single", "dpo: fsdp", "vllm: single", "vllm: zero3"


@pytest.mark.parametrize("settings", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_sft_trainer_is_our_loop(settings, tiny_llama, tiny_rows, tmp_path):
    script = ROOT / "tests/ranks/trl_runs.py"
    done = run_ranks(2, script, str(tiny_llama), str(tiny_rows), str(tmp_path), *settings)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
