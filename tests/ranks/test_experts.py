"""Mixtures of experts under every strategy against one process: 3 and 5 experts on 2 and 4 ranks, so that shards
begin and end inside experts; and the norms' collectives, counted."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common.collectives import Counter
from dora_dist import DoraConfig, inject_dora, refresh_norms
from dora_dist.dora.norm_cache import cache_norms, dora_layers
from dora_dist.parallel.process import Processes
from tests.ranks.test_strategies import ZERO2, ZERO3, close, nf4, split
from tests.support import ROOT
from tests.support.models import save_model
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, TRAINED, rounding

pytestmark = pytest.mark.ranks

DDP, FSDP = {"parallel.strategy": "ddp"}, {"parallel.strategy": "fsdp"}
HYBRID = {**FSDP, "parallel.replicas": 2}
AXIS_IN = {"dora.magnitude_axis": "in", "dora.norm_gradient": "exact"}
FEW = {(3, 2): {"fsdp": FSDP, **nf4(zero3=ZERO3)}}  # of (experts, ranks)
ALL = {
    (5, 2): {
        "ddp": DDP,
        "zero2": ZERO2,
        "zero3": ZERO3,
        "offloaded": {**FSDP, "parallel.cpu_offload": True},
        "in-fsdp": {**FSDP, **AXIS_IN},
        **nf4(ddp=DDP, fsdp=FSDP, zero2=ZERO2),
    },
    (3, 4): {
        "ddp": DDP,
        "fsdp": FSDP,
        "zero2": ZERO2,
        "zero3": ZERO3,
        **nf4(fsdp=FSDP, hybrid=HYBRID, zero3=ZERO3),
    },
    (5, 4): {"hybrid": HYBRID, "fsdp": FSDP, "in-zero3": {**ZERO3, **AXIS_IN}, "zero3": ZERO3, **nf4(zero3=ZERO3)},
}
ALONE = {"plain": {}, "nf4": {"quant.scheme": "nf4"}, "in": AXIS_IN}


def config(experts: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=96, hidden_size=12, intermediate_size=17, moe_intermediate_size=7, num_hidden_layers=2,
        head_dim=4, num_attention_heads=3, num_key_value_heads=1, num_experts=experts, num_experts_per_tok=2,
        initializer_range=0.3, norm_topk_prob=True, use_cache=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    torch.manual_seed(0)
    return {n: save_model(Qwen3MoeForCausalLM(config(n)), tmp_path_factory.mktemp(f"experts{n}")) for n in (3, 5)}


def run(world: int, cases: dict, model: Path, rows: Path, scratch: Path, steps: int) -> dict:
    base = {
        "model": {"path": str(model), "dtype": "float32"},
        "dora": {"rank": 3, "alpha": 6, "targets": "all-linear"},
        "data": {"train": str(rows), "seq_len": 48},
        "train": {"steps": steps, "lr": 0.01, "warmup_steps": 2, "max_grad_norm": 0.5},
        "output_dir": str(scratch),
    }
    cases = {name: {**overrides, **split(world)} for name, overrides in cases.items()}
    (scratch / "cases.json").write_text(json.dumps({"base": base, **cases}))
    arguments = [str(scratch / "cases.json"), str(scratch / "out.pt")]
    done = run_ranks(world, ROOT / "tests/ranks/run_cases.py", *arguments, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(scratch / "out.pt")


def alike(experts: int, world: int, cases: dict, models: dict, rows: Path, tmp_path: Path, steps: int) -> None:
    scratch = [tmp_path / name for name in ("alone", "sharded")]
    for directory in scratch:
        directory.mkdir()
    kinds = {next((kind for kind in ALONE if name.startswith(kind)), "plain") for name in cases}
    wanted = run(1, {kind: ALONE[kind] for kind in kinds}, models[experts], rows, scratch[0], steps)
    for name, got in run(world, cases, models[experts], rows, scratch[1], steps).items():
        want = wanted[next((kind for kind in ALONE if name.startswith(kind)), "plain")]
        assert any(".experts." in key for key in got["gradients"])
        assert got["losses"] == pytest.approx(want["losses"], rel=TRAINED), name
        assert got["gradients"].keys() == want["gradients"].keys()
        for key, gradient in got["gradients"].items():
            assert close(gradient, want["gradients"][key], TRAINED), f"{name} {key}"
        for key, norm in got["norms"].items():
            assert close(norm, want["norms"][key], rounding(MODEL, torch.float32)), f"{name} {key}"


@pytest.mark.parametrize(("experts", "world"), FEW)
def test_a_few_steps_are_those_of_one_process(experts, world, models, tiny_rows, tmp_path):
    alike(experts, world, FEW[experts, world], models, tiny_rows, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "world"), ALL)
def test_all_strategies_are_alike(experts, world, models, tiny_rows, tmp_path):
    alike(experts, world, ALL[experts, world], models, tiny_rows, tmp_path, 20)


def count_refresh(experts: int) -> None:
    """In a rank: what a refresh sends, and whether the norms are those of the whole weights."""
    processes = Processes()
    processes.start(60, needed=True)
    torch.manual_seed(0)
    model = inject_dora(Qwen3MoeForCausalLM(config(experts)), DoraConfig(rank=2, targets="all-linear"))
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_()
    wanted = {name: layer.current_norm() for name, layer in dora_layers(model).items()}
    for block in model.model.layers:
        fully_shard(block)
    cache_norms(fully_shard(model))
    with Counter() as sent:
        refresh_norms(model)
    for name, layer in dora_layers(model).items():
        torch.testing.assert_close(layer.norm, wanted[name])
    processes.stop()
    print(json.dumps(sum(row["count"] for row in sent.by_collective().values())))


@pytest.mark.parametrize("world", [2, 4])
def test_the_norms_of_all_experts_take_two_collectives(world):
    done = run_ranks(world, count_refresh, 3)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [int(line) for line in done.stdout.split()] == [2] * world
