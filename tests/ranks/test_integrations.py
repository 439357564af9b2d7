"""TRL's trainers with the mixin, sharded by accelerate: losses, gradients, norms, checkpoints."""

import pytest

from tests.support import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    "settings",
    [
        ("others", "single", "fsdp, loaded by one rank", "zero3", "dpo single", "dpo fsdp", "dpo zero3"),
        pytest.param(("ddp", "fsdp", "fsdp, checkpointed", "zero2"), marks=pytest.mark.slow),
    ],
    ids=["a few", "the others"],
)
def test_sft_trainer_is_our_loop(settings, tiny_llama, tiny_rows, tmp_path):
    script = ROOT / "tests/ranks/trl_runs.py"
    done = run_ranks(2, script, str(tiny_llama), str(tiny_rows), str(tmp_path), *settings)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
