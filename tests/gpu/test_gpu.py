"""What only a CUDA device can show: `make gpu`. The bodies are functions of the device."""

import os
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from benchmarks.common.timing import growth
from dora_dist import DoraConfig, attach_norm_refresh, inject_dora, refresh_norms
from dora_dist.dora import kernels
from dora_dist.dora.functional import adapted_linear
from dora_dist.dora.norm_math import _SCRATCH_BYTES_GPU, squared_norms
from dora_dist.dora.products import wide_mm
from dora_dist.quant import nf4
from dora_dist.quant.kernels import dequantize
from dora_dist.quant.nf4 import Nf4, quantize
from tests.support.models import llama_config
from tests.unit.dora.test_functional import reference

CUDA = os.environ.get("GPU_TESTS_DEVICE", "cuda")  # cpu: to run every line where there is no GPU
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NARROW = [torch.bfloat16, torch.float16]


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def random_layer(device, dtype, axis, transposed, O=192, I=160, R=16):  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    weight = normal(*((I, O) if transposed else (O, I)), dtype=dtype)
    x, bias = normal(2, 96, I, dtype=dtype), normal(O, dtype=dtype)
    A, B = normal(R, I) / I**0.5, normal(O, R)
    m = normal(O if axis == "out" else I).abs() + 0.5
    return [t.requires_grad_() for t in (x, A, B, m)], weight, bias


def norm_of(weight, A, B, scaling, axis, transposed):
    L, U = (A.t(), B.t()) if transposed else (B, A)
    return squared_norms(weight, L, U, scaling, int(transposed == (axis == "out"))).sqrt()


# ------------------------------------------------------------------------------------------------------ numerics


def check_layer_against_fp64(device, dtype, axis, transposed, rank=16):
    leaves, weight, bias = random_layer(device, dtype, axis, transposed, R=rank)
    x, A, B, m = leaves
    n = norm_of(weight, A, B, 0.7, axis, transposed)
    y = adapted_linear(x, weight, A, B, m, n, bias, scaling=0.7, axis=axis, transposed=transposed)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    W_OI = (weight.t() if transposed else weight).double()
    want = reference(wide[0], W_OI, *wide[1:], bias.double(), 0.7, axis, False)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dy)
    assert y.dtype == dtype
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32, torch.float32]
    errors = {"y": relative(y, want)}
    for name, g, w in zip(
        ("dx", "dA", "dB", "dm"), got, torch.autograd.grad(want, wide, dy.double()), strict=True
    ):
        errors[name] = relative(g, w)
    assert max(errors.values()) < (1e-2 if dtype == torch.bfloat16 else 2e-3), errors


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", NARROW)
def test_layer_against_fp64(dtype, axis, transposed):
    check_layer_against_fp64(CUDA, dtype, axis, transposed)


@pytest.mark.parametrize("dtype", NARROW)
def test_layer_of_a_rank_beyond_the_kernels_against_fp64(dtype):
    check_layer_against_fp64(CUDA, dtype, "out", False, rank=kernels.MAX_RANK + 16)


def check_small_ratio_is_visible(device, dtype, axis):
    (x, A, B, _), weight, _ = random_layer(device, dtype, axis, False)
    with torch.no_grad():
        B.zero_()
        n = norm_of(weight, A, B, 1.0, axis, False)
        at_one = adapted_linear(x, weight, A, B, n, n, None, scaling=1.0, axis=axis).double()
        above = adapted_linear(x, weight, A, B, n * 1.001, n, None, scaling=1.0, axis=axis).double()
    gain = (above * at_one).sum() / (at_one * at_one).sum() - 1
    assert gain.item() == pytest.approx(1e-3, rel=0.25)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_ratio_of_1_001_is_visible(dtype, axis):
    check_small_ratio_is_visible(CUDA, dtype, axis)


def check_wide_products(device, dtype):
    """fp32 results, not results rounded to 16 bits and widened (2e-4 off in fp16, 2e-3 in bf16)."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(s, generator=generator, device=device).to(dtype) for s in ((96, 512), (512, 80)))
    want = a.double() @ b.double()
    layouts = [(a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())]
    for left, right in layouts:
        got = wide_mm(left, right)
        assert got.dtype == torch.float32
        assert relative(got, want) < 3e-5
    thin = a[:, :16].t().contiguous()  # z^T dh of the gradient of B: few rows, strided both ways
    assert relative(wide_mm(thin, a), thin.double() @ a.double()) < 3e-5


@pytest.mark.parametrize("dtype", NARROW)
def test_wide_products_are_not_rounded(dtype):
    check_wide_products(CUDA, dtype)


def check_codes(device, dtype):
    W = torch.randn(256, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    layout = Nf4(256, 1000, dtype)
    here, there = quantize(W, layout), quantize(W.to(device), layout)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    assert torch.equal(nf4.dequantize(here, layout), dequantize(there, layout).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_codes_of_a_cpu(dtype):
    check_codes(CUDA, dtype)


# --------------------------------------------------------------------------------------------------------- norms


def check_norms_by_tiles(device, dim, shape):
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device).bfloat16()
    L, U = (torch.randn(s, generator=generator, device=device) for s in ((shape[0], 16), (16, shape[1])))

    def compute():
        found.append(squared_norms(weight, L, U, 0.7, dim).sqrt_())

    found = []
    want = (weight.double() + 0.7 * L.double() @ U.double()).norm(dim=1 - dim)
    compute()  # the BLAS workspace is made once and stays
    scratch = growth(compute, torch.device(device))
    torch.testing.assert_close(found[-1].double(), want, rtol=1e-5, atol=0)
    assert scratch <= _SCRATCH_BYTES_GPU + (4 << 20)  # the tile, the result, the sums of one tile


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(1000, 300), (3000, 8192)])
def test_norms_by_tiles_against_fp64_in_bounded_memory(dim, shape):
    check_norms_by_tiles(CUDA, dim, shape)


@contextmanager
def no_waiting_for(device):
    """Whatever makes the host wait for the device raises."""
    if torch.device(device).type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_nothing_waits(device, config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32)).to(device, torch.bfloat16)
    inject_dora(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    attach_norm_refresh(model, optimizer)
    x = torch.randn(16, 48, device=device, dtype=torch.bfloat16)
    model(x).float().square().mean().backward()  # warm: handles and workspaces are made
    optimizer.step()
    with no_waiting_for(device):
        loss = model(x).float().square().mean()
        loss.backward()
        refresh_norms(model)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_neither_the_layers_nor_the_norms_make_the_host_wait(axis, gradient):
    check_nothing_waits(CUDA, DoraConfig(rank=4, targets=["0", "1"], magnitude_axis=axis, norm_gradient=gradient))


# -------------------------------------------------------------------------------------------------------- memory


def step_memory(device, method, checkpointing, hidden=1024, tokens=2048):
    """Bytes that a training step holds beyond the model and the optimizer's state."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = llama_config(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=hidden // 8, max_position_embeddings=tokens,
        use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inject_dora(model, DoraConfig(method=method, targets="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    attach_norm_refresh(model, optimizer)
    ids = torch.randint(512, (1, tokens), device=device)

    def step():
        model(input_ids=ids).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    held = sum(p.nbytes for p in model.parameters())
    return held + growth(step, torch.device(device))


@pytest.mark.parametrize(("checkpointing", "limit"), [(True, 1.5), (False, 1.6)])
def test_peak_memory_over_lora(checkpointing, limit, record_property):
    """Loose bounds; the benchmarks have the figures. Without checkpointing each layer's product h stays."""
    size = {} if CUDA == "cuda" else {"hidden": 128, "tokens": 16}  # a CPU tells no memory
    dora, lora = (step_memory(CUDA, method, checkpointing, **size) for method in ("dora", "lora"))
    record_property("dora_over_lora", dora / lora)
    print(f"peak memory, DoRA over LoRA, checkpointing {checkpointing}: {dora / lora:.3f}")
    assert dora / lora <= limit
