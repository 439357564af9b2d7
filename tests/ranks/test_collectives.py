"""The norm refresh is two collectives whatever the number of layers and ranks, one where ranks hold copies.
Forward and backward have none for the norms, and gather a frozen output head once."""

import json

import pytest

from tests.support import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks


def count(world: int, strategy: str) -> dict:
    done = run_ranks(1, ROOT / "tests/ranks/count_collectives.py", str(world), strategy)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("world", "strategy"),
    [(4, "fsdp"), (4, "hybrid"), (64, "fsdp"), pytest.param(1024, "fsdp", marks=pytest.mark.slow)],
)
def test_refresh_adds_exactly_two_collectives(world, strategy):
    counts = count(world, strategy)
    for layers in (1, 3):
        dora, lora = counts[f"dora/{layers}"], counts[f"lora/{layers}"]
        assert sum(dora["refresh"].values()) == 2
        assert set(dora["refresh"]) <= {"allreduce", "allgather_base"}
        # No more than A and the norms, and padding that does not grow with the number of ranks.
        assert dora["bytes"]["received"] <= 2 * dora["bytes"]["floor"]
        assert lora["refresh"] == {}
        assert dora["step"] == lora["step"]  # nothing in forward and backward is due to the norm
        # Each block for its forward and its backward; the head, whose gradient is made in its forward, once.
        assert dora["step"]["allgather_base"] == 2 * layers + 1


@pytest.mark.parametrize(("strategy", "collectives"), [("ddp", {"allreduce": 1}), ("single", {})])
def test_refresh_of_copies_is_one_sum_of_the_norms(strategy, collectives):
    counts = count(4, strategy)
    for layers in (1, 3):
        dora = counts[f"dora/{layers}"]
        assert dora["refresh"] == collectives
        assert dora["bytes"]["received"] == (dora["bytes"]["norms"] if collectives else 0)
        assert counts[f"lora/{layers}"]["refresh"] == {}
