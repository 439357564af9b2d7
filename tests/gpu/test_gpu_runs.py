"""The quickstart on a GPU against the quickstart on a CPU: `make gpu`. What differs between them runs once here.

Each case takes a few steps on the GPU, alone in its process, and its losses are compared with those of a CPU under
the strategy `single`, computed in the same session and once for all cases that share their mathematics. What needs
a package that is not there is skipped by name. GPU_TESTS_DEVICE=cpu runs every line on a CPU.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partialmethod

import pytest
import torch
from torch import nn

from dora_dist.config import load_config
from dora_dist.quant import nf4
from dora_dist.training.run import run_training
from tests.support import ROOT

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, TOKENS = 6, 8 * 128
BASE = (
    f"train.steps={STEPS}", "train.warmup_steps=2", "parallel.strategy=single", "data.eval=null", "log.every=1",
    "log.sample_prompts=[]",
)  # fmt: skip
FP32, BF16 = "float32", "bfloat16"


@dataclass(frozen=True)
class Case:
    same: Sequence[str] = ()
    """Settings that leave the mathematics as they are: the CPU does without."""
    mathematics: Sequence[str] = ()
    """Those that the CPU shares."""
    needs: str | None = None
    dtypes: Sequence[str] = (FP32,)
    rounds: float = 0
    """How far the losses may lie from the CPU's, where what is computed rounds more than the dtype does."""


ZERO = "deepspeed"
NF4 = ("quant.scheme=nf4",)
CASES = {
    "single": Case(dtypes=(FP32, BF16, "float16")),
    "fsdp": Case(["parallel.strategy=fsdp"], dtypes=(FP32, BF16)),
    "fsdp, offloaded": Case(["parallel.strategy=fsdp", "parallel.cpu_offload=true"], dtypes=(FP32, BF16)),
    "nf4 by bitsandbytes": Case(mathematics=NF4, needs="bitsandbytes", dtypes=(FP32, BF16)),
    "nf4 by our kernels": Case(mathematics=NF4, dtypes=(FP32, BF16)),
    "nf4, fsdp": Case(["parallel.strategy=fsdp"], NF4, dtypes=(BF16,)),
    "packing": Case(mathematics=["data.packing=true"], dtypes=(FP32, BF16)),
    "norm_gradient exact": Case(mathematics=["dora.norm_gradient=exact"], dtypes=(FP32, BF16)),
    "magnitude_axis in": Case(mathematics=["dora.magnitude_axis=in"], dtypes=(FP32, BF16)),
    "activation checkpointing": Case(["train.activation_checkpointing=true"]),
    "adamw8bit": Case(["train.optimizer=adamw8bit"], needs="bitsandbytes", rounds=2e-2),
    "paged_adamw8bit": Case(["train.optimizer=paged_adamw8bit"], needs="bitsandbytes", rounds=2e-2),
    "resume": Case(["checkpoint.every=3"]),
    "resume, fsdp": Case(["checkpoint.every=3", "parallel.strategy=fsdp"], dtypes=(BF16,)),
    "zero2": Case(["parallel.strategy=zero2"], needs=ZERO),
    "zero2, offloaded": Case(["parallel.strategy=zero2", "parallel.cpu_offload=true"], needs=ZERO),
    "zero3": Case(["parallel.strategy=zero3"], needs=ZERO, dtypes=(FP32, BF16)),
    "zero3, offloaded": Case(["parallel.strategy=zero3", "parallel.cpu_offload=true"], needs=ZERO),
    "compile": Case(["train.compile=true"], dtypes=(BF16,)),  # last, because it takes longest
}
BOUNDS = {FP32: TOKENS * 2**-24, BF16: 4 * 2**-8, "float16": 4 * 2**-11}
"""Of a loss, relative. In fp32 (TF32 is off) what summing in another order can amount to in the longest sums, over
a batch's tokens; in 16 bits one rounding of the residual stream in each of the four blocks."""


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    """on_the_cpu(dtype, settings) -> the losses of a CPU."""
    known = {}

    def losses(dtype, settings):
        key = (dtype, *settings)
        if key not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda: False)
                known[key] = train(tmp_path_factory.mktemp("cpu"), patch, f"model.dtype={dtype}", *settings)
        return known[key]

    return losses


def train(output_dir, patch, *settings, in_a_child=False):
    """The losses of a run, or of the rest of one, in one process: this one, or a child where it needs its own
    (DeepSpeed keeps the process group of its first run)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        patch.delenv(name, raising=False)
    patch.chdir(ROOT)
    overrides = [*BASE, *settings, f"output_dir={output_dir}"]
    if in_a_child:
        command = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        run_training(load_config("configs/quickstart.yaml", overrides))
    assert (output_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert not torch.distributed.is_initialized()
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
)
def test_losses_are_those_of_a_cpu(name, dtype, on_the_cpu, tmp_path, monkeypatch, capsys):
    case = CASES[name]
    if case.needs:
        pytest.importorskip(case.needs, reason=f"{name}: not run: no {case.needs}", exc_type=ImportError)
    if name == "nf4 by our kernels":
        monkeypatch.setattr(nf4, "_load_kernels", lambda: False)
    if DEVICE == "cpu":
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    want = on_the_cpu(dtype, case.mathematics)
    settings = (f"model.dtype={dtype}", *case.mathematics, *case.same)
    got = train(tmp_path, monkeypatch, *settings, in_a_child=case.needs == ZERO)
    if name.startswith("resume"):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEPS:08}")
        whole, got = got, train(tmp_path, monkeypatch, *settings)
        assert got[:3] == whole[:3]
    bound = case.rounds or BOUNDS[dtype]
    apart = [abs(a / b - 1) for a, b in zip(got, want, strict=True)]
    with capsys.disabled():
        print(f"\n{name}, {dtype}: losses within {max(apart):.1e} of a CPU's (bound {bound:.1e})", end=" ")
    assert want[-1] < want[0] and max(apart) <= bound, (got, want)
