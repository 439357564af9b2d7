"""Every strategy and world size against one process: losses of some steps, first gradients of A, B and m, norms.

The model is awkward on purpose (support.models.make_tiny_llama): 17 and 2 rows over 4 ranks, biases, zero rows.
"""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_dist import load_adapter
from dora_dist.quant.nf4 import Nf4, dequantize, quantize
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, TRAINED, assert_near, rounding

pytestmark = pytest.mark.ranks

STEPS = 8
VARIANTS = {
    "out-detached": {},
    "out-exact": {"dora.norm_gradient": "exact"},
    "in-detached": {"dora.magnitude_axis": "in"},
    # The smaller rate: a zero column's norm grows from 0, and Adam magnifies the rounding of its first gradients.
    "in-exact": {"dora.magnitude_axis": "in", "dora.norm_gradient": "exact", "train.lr": 0.003},
}
# ZeRO-3 as it is with large layers: nothing stays gathered, nothing is gathered early.
RELEASE = {
    f"parallel.deepspeed.zero_optimization.stage3_{key}": 0
    for key in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
}
ZERO1, ZERO2 = {"parallel.strategy": "zero1"}, {"parallel.strategy": "zero2"}
ZERO3 = {"parallel.strategy": "zero3", **RELEASE}
MORE_VARIANTS = {"in-exact": ("fsdp", "hybrid", "zero3")}  # than the first; fsdp has them all
SPLITS = {1: (8, 1), 2: (2, 2), 4: (1, 2)}  # world size: micro_batch_size, accumulation; always 8 rows


def nf4(**strategies: dict) -> dict:
    """The same over a 4-bit base."""
    return {f"nf4-{name}": {**overrides, "quant.scheme": "nf4"} for name, overrides in strategies.items()}


STRATEGIES = {
    1: {
        "fsdp": {"parallel.strategy": "fsdp"},
        "zero1": ZERO1,
        "zero2": ZERO2,
        "zero3": ZERO3,
        **nf4(fsdp={"parallel.strategy": "fsdp"}, zero3=ZERO3),
    },
    2: {
        "ddp": {"parallel.strategy": "ddp"},
        "fsdp": {"parallel.strategy": "fsdp"},
        "offload": {"parallel.strategy": "fsdp", "parallel.cpu_offload": True},
        "packed": {"parallel.strategy": "fsdp", "data.packing": True},
        "packed-checkpointed": {
            "parallel.strategy": "fsdp",
            "data.packing": True,
            "train.activation_checkpointing": True,
        },
        "packed-zero3": {**ZERO3, "data.packing": True, "train.activation_checkpointing": True},
        "zero1": ZERO1,
        "zero2": ZERO2,
        "zero2-offload": {**ZERO2, "parallel.cpu_offload": True},
        "zero3": ZERO3,
        "zero3-persistent": {"parallel.strategy": "zero3"},
        "zero3-offload": {**ZERO3, "parallel.cpu_offload": True},
        "saved": {**ZERO3, "dora.modules_to_save": ["lm_head", "model.norm"]},
        "saved-ddp": {"parallel.strategy": "ddp", "dora.modules_to_save": ["lm_head", "model.norm"]},
        "saved-fsdp": {"parallel.strategy": "fsdp", "dora.modules_to_save": ["lm_head", "model.norm"]},
        "head": {"parallel.strategy": "fsdp", "dora.targets": ["all-linear", "lm_head"]},
        "head-zero3": {**ZERO3, "dora.targets": ["all-linear", "lm_head"]},
        **nf4(fsdp={"parallel.strategy": "fsdp"}, zero2=ZERO2, zero3=ZERO3),
        **nf4(
            compiled={"parallel.strategy": "fsdp", "train.compile": True, "train.activation_checkpointing": True}
        ),
    },
    4: {
        "ddp": {"parallel.strategy": "ddp"},
        "fsdp": {"parallel.strategy": "fsdp"},
        "hybrid": {"parallel.strategy": "fsdp", "parallel.replicas": 2},
        "zero1": ZERO1,
        "zero2": ZERO2,
        "zero3": ZERO3,
        "zero3-hpz": {**ZERO3, "parallel.deepspeed.zero_optimization.zero_hpz_partition_size": 2},
        **nf4(
            fsdp={"parallel.strategy": "fsdp"},
            hybrid={"parallel.strategy": "fsdp", "parallel.replicas": 2},
            zero3=ZERO3,
        ),
    },
}
BF16 = {"fsdp": {"parallel.strategy": "fsdp"}, "zero1": ZERO1, "zero2": ZERO2, "zero3": ZERO3}  # at world size 2
ALONE = {  # what a strategy's reference run shares with it
    "packed": {"data.packing": True},
    "saved": {"dora.modules_to_save": ["lm_head", "model.norm"]},
    "head": {"dora.targets": ["all-linear", "lm_head"]},
    "nf4": {"quant.scheme": "nf4"},
}


def base_config(model: Path, rows: Path, scratch: Path) -> dict:
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "dora": {"rank": 3, "alpha": 6, "targets": "all-linear", "rank_pattern": {"k_proj": 2, "v_proj": 2}},
        "data": {"train": str(rows), "eval": str(rows), "seq_len": 48},
        "train": {"steps": STEPS, "lr": 0.01, "warmup_steps": 2, "max_grad_norm": 0.5},
        "output_dir": str(scratch),
    }


def split(world: int) -> dict:
    size, accumulation = SPLITS[world]
    return {"train.micro_batch_size": size, "train.accumulation": accumulation}


@pytest.fixture(scope="session")
def reference(tiny_llama, tiny_gpt2, tiny_rows, tmp_path_factory):
    """One process, no sharding."""
    cases = {name: {**overrides, **split(1)} for name, overrides in VARIANTS.items()}
    cases |= {name: {**overrides, **split(1)} for name, overrides in ALONE.items()}
    return run(1, cases, tmp_path_factory.mktemp("reference"), tiny_llama, tiny_gpt2, tiny_rows)


@pytest.fixture(
    scope="session", params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def sharded(request, tiny_llama, tiny_gpt2, tiny_rows, tmp_path_factory):
    world = request.param
    cases = {}
    for strategy, overrides in STRATEGIES[world].items():
        for variant, more in VARIANTS.items():
            if variant == "out-detached" or strategy in MORE_VARIANTS.get(variant, ("fsdp",)):
                cases[f"{strategy}/{variant}"] = {**overrides, **more, **split(world)}
    for strategy, overrides in BF16.items() if world == 2 else ():
        cases[f"bf16/{strategy}"] = {**overrides, **split(world), "model.dtype": "bfloat16"}
    scratch = tmp_path_factory.mktemp(f"world{world}")
    return run(world, cases, scratch, tiny_llama, tiny_gpt2, tiny_rows)


GPT2 = {"dora.rank_pattern": {}, "dora.targets": ["all-linear", "wte"]}


def run(world: int, cases: dict, scratch: Path, llama: Path, gpt2: Path, rows: Path) -> dict:
    strategies = {"gpt2": {}} if world == 1 else {"gpt2": {"parallel.strategy": "fsdp"}, "gpt2-zero3": ZERO3}
    for (name, strategy), axis in product(strategies.items(), ("out", "in")):
        cases[f"{name}/{axis}"] = {
            **GPT2, **strategy, **split(world), "model.path": str(gpt2), "dora.magnitude_axis": axis,
        }  # fmt: skip
    (scratch / "cases.json").write_text(json.dumps({"base": base_config(llama, rows, scratch), **cases}))
    arguments = [str(scratch / "cases.json"), str(scratch / "out.pt")]
    done = run_ranks(world, ROOT / "tests/ranks/run_cases.py", *arguments, timeout=900)  # dozens of runs
    assert done.returncode == 0, done.stderr[-4000:]
    return {**torch.load(scratch / "out.pt"), "adapters": scratch / "adapters"}


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return bool((got - want).norm() <= tolerance * want.norm() + 1e-8)


def runs(results: dict) -> dict:
    """The fp32 runs."""
    return {name: result for name, result in results.items() if name != "adapters" and "bf16" not in name}


def test_losses_and_gradients_agree_with_one_process(sharded, reference):
    for name, got in runs(sharded).items():
        strategy, variant = name.split("/")
        kind = strategy.split("-")[0]
        want = reference[f"gpt2/{variant}" if kind == "gpt2" else kind if kind in ALONE else variant]
        assert got["losses"] == pytest.approx(want["losses"], rel=TRAINED), name
        assert got["grad_norms"] == pytest.approx(want["grad_norms"], rel=10 * TRAINED), name
        assert got["gradients"].keys() == want["gradients"].keys()
        for key, gradient in got["gradients"].items():
            assert close(gradient, want["gradients"][key], rounding(MODEL, torch.float32)), f"{name} {key}"


def test_cached_norms_are_those_of_the_weights(sharded, reference, tiny_llama, tiny_gpt2):
    """After all steps: each rank's cached norm against fp64 of the whole W + s B A."""
    for name, got in {**runs(sharded), **runs(reference)}.items():
        axis = "in" if "in" in name.split("/")[-1].split("-") else "out"
        files = load_file((tiny_gpt2 if "gpt2" in name else tiny_llama) / "model.safetensors")
        for layer, norm in got["norms"].items():
            stored = files[f"{layer}.weight"].double()
            A, B = (got["weights"][f"{layer}.lora_{letter}"].double() for letter in "AB")
            if "nf4" in name:
                layout = Nf4(*stored.shape, torch.float64)
                stored = dequantize(quantize(stored, layout), layout)
            W_OI = stored.t() if "gpt2" in name else stored
            V = W_OI + 6 / A.shape[0] * (B @ A)
            assert_near(norm, V.norm(dim=int(axis == "out")), MODEL, about=f"{name} {layer}")


def test_bf16_strays_from_fp32_as_it_does_under_fsdp(sharded, reference):
    want = reference["out-detached"]["losses"]
    strays = {
        name: max(abs(a - b) / b for a, b in zip(result["losses"], want, strict=True))
        for name, result in sharded.items()
        if name.startswith("bf16/")
    }
    for name, stray in strays.items():
        assert stray <= 1.5 * strays["bf16/fsdp"] < 3e-3, (name, strays)


def test_every_strategy_writes_the_same_adapter(sharded):
    """The files' headers to the byte; the values to rounding, as one adapter."""
    names = [
        name for name in runs(sharded) if name.endswith("/out-detached") and re.split("[-/]", name)[0] not in ALONE
    ]
    for name in names:
        config, header, tensors = read_adapter(sharded["adapters"] / name)
        want_config, want_header, want = read_adapter(sharded["adapters"] / "fsdp/out-detached")
        assert (config, header) == (want_config, want_header), name
        difference = torch.cat([(tensors[key] - want[key]).flatten() for key in want])
        assert difference.norm() <= TRAINED * torch.cat([t.flatten() for t in want.values()]).norm(), name


def read_adapter(directory: Path) -> tuple[str, bytes, dict]:
    path = directory / "adapter_model.safetensors"
    content = path.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    return (directory / "adapter_config.json").read_text(), header, load_file(path)


@pytest.mark.parametrize("strategy", ["zero3", "zero1"])
def test_peft_loads_the_adapter(sharded, strategy, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = sharded["adapters"] / strategy / "out-detached"
    ids = torch.tensor([[5, 9, 11, 20, 3, 44]])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), directory)
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), directory)
    with torch.no_grad():
        assert_near(theirs(ids).logits, ours(ids).logits, MODEL)


def test_runs_learn_and_move_every_kind_of_parameter(reference):
    for name, result in runs(reference).items():
        assert result["losses"][-1] < result["losses"][0] - 0.1, name
        for kind in ("lora_A", "lora_B", "magnitude"):
            moved = [g for n, g in result["gradients"].items() if n.endswith(kind)]
            assert moved
            if kind != "lora_A":  # B = 0 at first, so A has no gradient in the first step
                assert any(g.abs().sum() > 0 for g in moved), f"{name} {kind}"


def test_accumulation_forms_the_same_batches(reference, tiny_llama, tiny_gpt2, tiny_rows, tmp_path):
    again = {"accumulated": {"train.micro_batch_size": 2, "train.accumulation": 4}}
    got = run(1, again, tmp_path, tiny_llama, tiny_gpt2, tiny_rows)["accumulated"]
    assert got["losses"] == pytest.approx(reference["out-detached"]["losses"], rel=TRAINED)
