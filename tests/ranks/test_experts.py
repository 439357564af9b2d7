"""Mixtures of experts under every strategy against one process: 3 and 5 experts on 2 and 4 ranks, so that shards
begin and end inside experts; and the norms' collectives, counted.

python -m tests.ranks.test_experts runs every strategy with either number of experts on 1, 2 and 4 ranks, in fp32
and over nf4, 20 steps each, and prints how far each is from one process (a quarter of an hour on two cores).
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common.collectives import Counter
from dora_dist import refresh_norms
from dora_dist.config import load_config
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import write_whole
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import build_to_train
from tests.ranks.test_strategies import ZERO1, ZERO2, ZERO3, close, nf4, split
from tests.support import ROOT
from tests.support.models import make_rows, save_model
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, TRAINED, rounding

pytestmark = pytest.mark.ranks

DDP, FSDP = {"parallel.strategy": "ddp"}, {"parallel.strategy": "fsdp"}
HYBRID = {**FSDP, "parallel.replicas": 2}
AXIS_IN = {"dora.magnitude_axis": "in", "dora.norm_gradient": "exact"}
FEW = {(3, 2): {"fsdp": FSDP, **nf4(zero3=ZERO3)}}  # of (experts, ranks)
ALL = {
    (5, 2): {
        "zero1": ZERO1,
        "zero2": ZERO2,
        "zero3": ZERO3,
        "offloaded": {**FSDP, "parallel.cpu_offload": True},
        "in-fsdp": {**FSDP, **AXIS_IN},
        **nf4(ddp=DDP, fsdp=FSDP, zero2=ZERO2),
    },
    (4, 2): {"in-fsdp": {**FSDP, **AXIS_IN}, **nf4(fsdp=FSDP, zero3=ZERO3)},  # each rank has whole experts
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
    return saved_models(tmp_path_factory.mktemp("mixtures"))


def saved_models(folder: Path) -> dict[int, Path]:
    torch.manual_seed(0)
    made = {n: Qwen3MoeForCausalLM(config(n)) for n in (3, 4, 5)}
    return {n: save_model(model, folder / str(n)) for n, model in made.items()}


def base_config(model: Path, rows: Path, scratch: Path, steps: int) -> dict:
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "dora": {"rank": 3, "alpha": 6, "targets": "all-linear"},
        "data": {"train": str(rows), "seq_len": 48},
        "train": {"steps": steps, "lr": 0.01, "warmup_steps": 2, "max_grad_norm": 0.5},
        "output_dir": str(scratch),
    }


def run(world: int, cases: dict, model: Path, rows: Path, scratch: Path, steps: int) -> dict:
    base = base_config(model, rows, scratch, steps)
    cases = {name: {**overrides, **split(world)} for name, overrides in cases.items()}
    (scratch / "cases.json").write_text(json.dumps({"base": base, **cases}))
    arguments = [str(scratch / "cases.json"), str(scratch / "out.pt")]
    done = run_ranks(world, ROOT / "tests/ranks/run_cases.py", *arguments, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(scratch / "out.pt")


def deviations(
    experts: int, world: int, cases: dict, models: dict, rows: Path, scratch: Path, steps: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each case from one process: of the losses, the first gradients and the norms at the end, the largest."""
    folders = [scratch / name for name in ("alone", "sharded")]
    for directory in folders:
        directory.mkdir(parents=True)
    kinds = {next((kind for kind in ALONE if name.startswith(kind)), "plain") for name in cases}
    wanted = run(1, {kind: ALONE[kind] for kind in kinds}, models[experts], rows, folders[0], steps)
    for name, got in run(world, cases, models[experts], rows, folders[1], steps).items():
        want = wanted[next((kind for kind in ALONE if name.startswith(kind)), "plain")]
        assert any(".experts." in key for key in got["gradients"])
        assert got["gradients"].keys() == want["gradients"].keys()
        losses = max(abs(g - w) / w for g, w in zip(got["losses"], want["losses"], strict=True))
        yield name, {"losses": losses} | {kind: furthest(got[kind], want[kind]) for kind in ("gradients", "norms")}


def furthest(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Of their norms; as `close` has it, what is all but zero may differ by as much."""
    return max(((t - want[key]).norm() / (want[key].norm() + 1e-8 / TRAINED)).item() for key, t in got.items())


def alike(experts: int, world: int, cases: dict, models: dict, rows: Path, tmp_path: Path, steps: int) -> None:
    for name, found in deviations(experts, world, cases, models, rows, tmp_path, steps):
        assert found["losses"] <= TRAINED and found["gradients"] <= TRAINED, f"{name}: {found}"
        assert found["norms"] <= rounding(MODEL, torch.float32), f"{name}: {found}"


@pytest.mark.parametrize(("experts", "world"), FEW)
def test_a_few_steps_are_those_of_one_process(experts, world, models, tiny_rows, tmp_path):
    alike(experts, world, FEW[experts, world], models, tiny_rows, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "world"), ALL)
def test_all_strategies_are_alike(experts, world, models, tiny_rows, tmp_path):
    alike(experts, world, ALL[experts, world], models, tiny_rows, tmp_path, 10)


def count_refresh(config_file: str, models: dict[int, str]) -> None:
    """In a rank: what a refresh sends, and whether the norms are those in fp64."""
    processes = Processes()
    sent = {}
    for strategy, experts in product((FSDP, ZERO3), models):
        overrides = {"model.path": models[experts], **strategy}
        config = load_config(Path(config_file), [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
        blueprint = make_blueprint(config, Path(config.model.path), processes.world_size)
        chosen = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
        processes.start(60, needed=True)
        built = build_to_train(blueprint, chosen)
        layers = list(dora_layers(built.model).values())
        for layer in layers:
            shape = built.shards.shape(layer.lora_B)
            write_whole(layer.lora_B, torch.randn(shape, generator=torch.Generator().manual_seed(0)), built.shards)
        with Counter() as counter:
            refresh_norms(built.model, built.shards)
        sent[f"{chosen.name} {experts}"] = counter.by_collective()
        for layer in layers:
            W, A, B = (t.double() for t in built.shards.gather([layer.weight, layer.lora_A, layer.lora_B]))
            each = zip(*(t.chunk(layer.num_experts) for t in (W, A, B)), strict=True)
            norms = torch.cat([(W + layer.spec.scaling * B @ A).norm(dim=1) for W, A, B in each])
            assert close(layer.norm, norms, rounding(MODEL, torch.float32))
    processes.stop()
    print(json.dumps(sent))


def test_norms_take_two_collectives_and_gather_no_whole_experts(models, tiny_rows, tmp_path):
    base = base_config(models[3], tiny_rows, tmp_path, 1)
    base["dora"]["rank"] = 4  # which the ranks divide: then nothing is filled up
    (tmp_path / "config.yaml").write_text(json.dumps(base))
    directories = {experts: str(models[experts]) for experts in (3, 4)}
    done = run_ranks(2, count_refresh, str(tmp_path / "config.yaml"), directories)
    assert done.returncode == 0, done.stderr[-4000:]
    for sent in map(json.loads, done.stdout.splitlines()):
        for case, collectives in sent.items():
            assert sum(row["count"] for row in collectives.values()) == 2, case
            gathered = sum(row["bytes"] for row in collectives.values()) - collectives["all_reduce"]["bytes"]
            factors = 4 * 12 + 3 * (12 + 7) * case.endswith("3")  # A's columns in attention; in experts
            assert gathered == 4 * 4 * 2 * factors, case  # fp32, the rank, two layers


def main() -> int:
    failed = 0
    every = {"fsdp": FSDP, "zero1": ZERO1, "zero2": ZERO2, "zero3": ZERO3}
    of_several = {**every, "ddp": DDP, "hybrid": HYBRID}
    with tempfile.TemporaryDirectory() as folder:
        models, rows = saved_models(Path(folder)), make_rows(Path(folder) / "rows.jsonl", 24)
        for experts, world in product((3, 5), (1, 2, 4)):
            plain = every if world == 1 else of_several
            cases, scratch = {**plain, **nf4(**plain)}, Path(folder, f"{experts}-{world}")
            for name, found in deviations(experts, world, cases, models, rows, scratch, 20):
                errors = (f"{kind} {error:.1e}" for kind, error in found.items())
                print(f"{experts} experts, {world} ranks, {name}:", *errors, flush=True)
                failed += max(found.values()) > TRAINED
    print(f"{failed} beyond {TRAINED}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
