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


def calls(sent: dict) -> dict[str, int]:
    return {kind: row["count"] for kind, row in sent.items()}


@pytest.mark.parametrize(
    ("world", "strategy"),
    [(4, "fsdp"), (4, "hybrid"), (64, "fsdp"), pytest.param(1024, "fsdp", marks=pytest.mark.slow)],
)
def test_refresh_adds_exactly_two_collectives(world, strategy):
    counts = count(world, strategy)
    for layers in (1, 3):
        dora, lora = counts[f"dora/{layers}"], counts[f"lora/{layers}"]
        assert sum(calls(dora["refresh"]).values()) == 2
        assert set(dora["refresh"]) <= {"all_reduce", "all_gather"}
        # No more than A and the norms, and padding that does not grow with the number of ranks.
        assert sum(sent["bytes"] for sent in dora["refresh"].values()) <= 2 * sum(dora["bytes"].values())
        assert lora["refresh"] == {}
        assert calls(dora["step"]) == calls(lora["step"])  # nothing in forward and backward is due to the norm
        # Each block for its forward and its backward; the head, whose gradient is made in its forward, once.
        assert calls(dora["step"])["all_gather"] == 2 * layers + 1
        # The reference of a preference takes another forward.
        assert calls(dora["compared"])["all_gather"] == 3 * layers + 2


@pytest.mark.parametrize(("strategy", "sums"), [("ddp", 1), ("single", 0)])
def test_refresh_of_copies_is_one_sum_of_the_norms(strategy, sums):
    counts = count(4, strategy)
    for layers in (1, 3):
        dora = counts[f"dora/{layers}"]
        one = {"count": 1, "bytes": dora["bytes"]["norms"]}
        assert dora["refresh"] == ({"all_reduce": one} if sums else {})
        assert counts[f"lora/{layers}"]["refresh"] == {}
