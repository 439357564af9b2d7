"""The norm refresh is two collectives whatever the number of layers and ranks; forward and backward have none."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, child_environment


@pytest.mark.parametrize(("world", "replicas"), [(4, 1), (4, 2), (1024, 1)])
def test_refresh_adds_exactly_two_collectives(world, replicas):
    command = [sys.executable, str(ROOT / "tests" / "count_collectives.py"), str(world), str(replicas)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    for layers in (1, 3):
        dora, lora = counts[f"dora/{layers}"], counts[f"lora/{layers}"]
        assert sum(dora["refresh"].values()) == 2
        assert set(dora["refresh"]) <= {"allreduce", "allgather_base"}
        # No more than A and the norms, and padding that does not grow with the number of ranks.
        assert dora["bytes"]["received"] <= 2 * dora["bytes"]["floor"]
        assert lora["refresh"] == {}
        assert dora["step"] == lora["step"]  # nothing in forward and backward is due to the norm
        assert sum(dora["step"].values()) > 0
