"""Preference objectives on several ranks against one process: losses, first gradients, metrics, an evaluation."""

import json

import pytest
import torch

from tests.ranks.test_strategies import ZERO1, ZERO2, ZERO3, close
from tests.support import ROOT
from tests.support.models import make_labelled, make_pairs
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, TRAINED, rounding

pytestmark = pytest.mark.ranks

FSDP, DDP = {"parallel.strategy": "fsdp"}, {"parallel.strategy": "ddp"}
NF4, CHECKPOINTED = {"quant.scheme": "nf4"}, {"train.activation_checkpointing": True}
KTO, REWARD = {"train.objective": "kto"}, {"model.task": "reward_model"}
ALONE = {"dpo": {}, "nf4": NF4, "kto": KTO, "reward": REWARD}
TWO = {
    "dpo-ddp": DDP, "dpo-fsdp": {**FSDP, **CHECKPOINTED}, "dpo-zero3": {**ZERO3, **CHECKPOINTED},
    "nf4-fsdp": {**FSDP, **NF4}, "nf4-zero3": {**ZERO3, **NF4}, "kto-fsdp": {**FSDP, **KTO},
    "reward-fsdp": {**FSDP, **REWARD},
}  # fmt: skip
FOUR = {
    "dpo-hybrid": {**FSDP, "parallel.replicas": 2}, "dpo-zero2": ZERO2, "nf4-zero1": {**ZERO1, **NF4},
    "kto-zero3": {**ZERO3, **KTO},
}  # fmt: skip
SPLITS = {1: (8, 1), 2: (2, 2), 4: (1, 2)}  # world size: micro_batch_size, accumulation


@pytest.fixture(scope="module")
def train(tiny_llama, tmp_path_factory):
    """By world size and case: what run_cases.py found."""
    directory = tmp_path_factory.mktemp("preference")
    pairs, labelled = make_pairs(directory / "pairs.jsonl", 18), make_labelled(directory / "labelled.jsonl", 18)

    def run(world: int, cases: dict) -> dict:
        size, accumulation = SPLITS[world]
        base = {
            "model": {"path": str(tiny_llama), "dtype": "float32", "task": "preference"},
            "dora": {"rank": 3, "alpha": 6, "targets": "all-linear", "rank_pattern": {"k_proj": 2, "v_proj": 2}},
            "data": {"train": str(pairs), "eval": str(pairs), "seq_len": 48, "format": "auto"},
            "train": {"steps": 4, "lr": 0.01, "micro_batch_size": size, "accumulation": accumulation},
        }
        for case in cases.values():
            if case.get("train.objective") == "kto":
                case |= {"data.train": str(labelled), "data.eval": str(labelled)}
        place = directory / str(world)
        place.mkdir()
        (place / "cases.json").write_text(json.dumps({"base": base, **cases}))
        script = ROOT / "tests/ranks/run_cases.py"
        done = run_ranks(world, script, str(place / "cases.json"), str(place / "out.pt"), timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(place / "out.pt")

    return run


@pytest.fixture(scope="module")
def alone(train):
    return train(1, ALONE)


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_ranks_give_the_numbers_of_one_process(world, cases, train, alone):
    for name, got in train(world, cases).items():
        want = alone[name.split("-")[0]]
        assert got["losses"] == pytest.approx(want["losses"], rel=TRAINED), name
        assert got["metrics"] == pytest.approx(want["metrics"], rel=TRAINED, abs=1e-5), name
        assert got["evaluation"] == pytest.approx(want["evaluation"], rel=TRAINED, abs=1e-5), name
        for key, gradient in got["gradients"].items():
            assert close(gradient, want["gradients"][key], rounding(MODEL, torch.float32)), f"{name} {key}"
    assert alone["dpo"]["metrics"]["rewards/margins"] > 0.1
