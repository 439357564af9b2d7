"""Adapted experts on a GPU against fp64: `make gpu`. The bodies are functions of the device."""

import copy
from argparse import Namespace

import pytest
import torch

from benchmarks.common.contenders import adapted
from benchmarks.step import moe
from dora_dist import DoraConfig, inject_dora, refresh_norms
from dora_dist.dora import grouped_kernels
from dora_dist.dora.norm_cache import cache_norms
from dora_dist.quant.nf4 import Nf4
from tests.gpu.test_gpu import CUDA, pytestmark  # noqa: F401 - they mark this file, too

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
E, H, I = 9, 160, 96  # noqa: E741 - experts, hidden and intermediate features


def made(device, dtype, four_bit=False, **settings):
    """A block of experts, and the same adapted with A, B and m that are not the first."""
    torch.manual_seed(0)
    block = moe.make_block(Namespace(hidden=H, intermediate=I, experts=E, top_k=2), dtype, torch.device(device))
    model = inject_dora(copy.deepcopy(block), DoraConfig(targets=["experts"], rank=16, alpha=32, **settings))
    with torch.no_grad():
        for _, layer in adapted(model):
            if four_bit:
                layer.pack(Nf4(*layer.weight.shape, dtype))
            layer.lora_B.normal_(0, 0.01)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.1 * torch.rand_like(layer.magnitude))
    refresh_norms(model)
    return block, model


WAYS = pytest.mark.parametrize("grouped", [True, False], ids=["all at once", "in turn"])


def check_experts(device, dtype, tokens, **settings):
    """Raises where output or a gradient is further from fp64 than benchmarks allow."""
    block, model = made(device, dtype, **settings)
    x = torch.randn(tokens, H, device=device).to(dtype)
    errors = moe.check("the layer", model, block, x)
    print({name: f"{error:.1e}" for name, error in errors.items()})


@WAYS
@pytest.mark.parametrize("tokens", [3, 200])  # of 3 tokens some experts get none
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_experts_against_fp64(dtype, axis, tokens, grouped, monkeypatch):
    monkeypatch.setattr(grouped_kernels, "force", grouped)
    check_experts(CUDA, dtype, tokens, magnitude_axis=axis)


@WAYS
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_4_bit_experts_against_fp64(dtype, axis, grouped, monkeypatch):
    monkeypatch.setattr(grouped_kernels, "force", grouped)
    check_experts(CUDA, dtype, 200, four_bit=True, magnitude_axis=axis)


@WAYS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_lora_on_experts_against_fp64(dtype, grouped, monkeypatch):
    monkeypatch.setattr(grouped_kernels, "force", grouped)
    check_experts(CUDA, dtype, 200, method="lora")


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
def test_the_host_waits_for_nothing_and_repeats_to_the_bit(four_bit):
    """Of 64 tokens a tile, 3 to an expert to several tiles."""
    _, model = made(CUDA, BF16, four_bit)
    cache_norms(model)
    x = torch.randn(1, 1024, H, device=CUDA).to(BF16).requires_grad_()
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    results = []
    for mode in ("default", "error", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = model(x)
            results.append([y, *torch.autograd.grad(y.sum(), trained)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))


def check_norms(device, axis, four_bit):
    """Each expert's, after a refresh: in fp32 whatever the weight's dtype."""
    block, model = made(device, BF16, four_bit, magnitude_axis=axis)
    trained = {key: p.detach().double() for key, p in moe.trained_of(model).items()}
    bare = {key: p for key, p in trained.items() if not key.endswith("magnitude")}
    for key, W in moe.bases_of(model, block).items():
        V = moe.weight_of(bare, key, W)
        want = V.norm(dim=2 if axis == "out" else 1).flatten()
        norm = dict(adapted(model))[f"experts.{key}"].norm
        torch.testing.assert_close(norm.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_norms_of_experts_against_fp64(axis, four_bit):
    check_norms(CUDA, axis, four_bit)
