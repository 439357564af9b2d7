"""4-bit weights: the layout against a plain table look-up and bitsandbytes, the layers against dense ones."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common.memory import memory_profile
from dora_dist.dora.functional import adapted_linear
from dora_dist.dora.layers import AdapterSpec, DoraLinear
from dora_dist.dora.norm_math import squared_norms
from dora_dist.quant import nf4
from dora_dist.quant.modules import PackedLinear
from dora_dist.quant.nf4 import CODES, Nf4, PackedMatrix, dequantize, quantize
from tests.support.launch import child_environment
from tests.support.rounding import assert_near, assert_sums, roundings

SHAPES = [(6, 128), (5, 53), (1, 1), (3, 64), (4, 130)]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    W[rows // 2, : columns // 2] = 0
    return W.to(dtype)


def looked_up(W: torch.Tensor, block: int, scales: torch.Tensor) -> torch.Tensor:
    """Each weight as its block's scale times the nearest code, one by one."""
    codes = torch.tensor(CODES)
    out = torch.empty_like(W, dtype=torch.float32)
    for row in range(W.shape[0]):
        for column in range(W.shape[1]):
            scale = scales[row, column // block]
            value = W[row, column].float() / scale if scale else torch.tensor(0.0)
            out[row, column] = codes[(codes - value).abs().argmin()] * scale
    return out.to(W.dtype)


def stored_scales(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 2:
        return parts[1]
    return parts[1].float() * parts[2][:, 1:] + parts[2][:, :1]


@pytest.fixture(params=["kernels", "torch"])
def path(request, monkeypatch):
    """With bitsandbytes' kernels and without."""
    if request.param == "kernels":
        pytest.importorskip("bitsandbytes")
    else:
        monkeypatch.setattr(nf4, "_has_kernels", lambda *_: False)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_a_table(path, shape, dtype, double_quant):
    W = matrix(*shape, dtype)
    layout = Nf4(*shape, dtype, double_quant=double_quant)
    parts = quantize(W, layout)
    assert [p.shape for p in parts] == [p.shape for p in layout.empty(torch.device("cpu"))]
    assert [p.dtype for p in parts] == [p.dtype for p in layout.empty(torch.device("cpu"))]
    assert torch.equal(dequantize(parts, layout), looked_up(W, 64, stored_scales(parts)))


def test_scales_are_the_same_on_every_processor():
    """Each operation rounds by itself, as in NumPy. 16-bit weights have so few digits that many a scale lies right
    between two codes."""
    W = matrix(64, 1024, torch.bfloat16)
    _, codes, ranges = quantize(W, Nf4(64, 1024, W.dtype))
    scales = W.float().abs().numpy().reshape(64, 16, 64).max(2)
    low = scales.min(1, keepdims=True)
    step = (scales.max(1, keepdims=True) - low) / np.float32(255)
    want = np.round((scales - low) / step)
    assert np.array_equal(codes.numpy(), want)
    assert np.array_equal(ranges.numpy(), np.concatenate([low, step], 1))
    assert np.array_equal(nf4._scales([codes, ranges]).numpy(), want.astype(np.float32) * step + low)


def test_bytes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = matrix(8, 256)
    theirs, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    ours = quantize(W, Nf4(8, 256, torch.float32, double_quant=False))
    assert torch.equal(ours[0].flatten(), theirs.flatten())
    assert torch.equal(ours[1].flatten(), state.absmax)


def test_the_nearest_code_is_found_up_to_the_last_bit():
    codes = torch.tensor(CODES)
    midpoints = (codes[1:] + codes[:-1]) / 2
    edges = torch.linspace(-1, 1, 257)
    exact = torch.cat([midpoints, codes, edges, torch.tensor([1.0001, -1.0001])])
    up, down = torch.nextafter(exact, torch.tensor(2.0)), torch.nextafter(exact, torch.tensor(-2.0))
    values = torch.cat([exact, up, down, torch.rand(100_000) * 2 - 1])
    assert torch.equal(nf4._nearest_codes(values), torch.bucketize(values, midpoints).to(torch.uint8))


def test_double_quantization_costs_little():
    W = matrix(64, 1024)
    errors = [
        (dequantize(quantize(W, layout), layout) - W).norm() / W.norm()
        for layout in (Nf4(64, 1024, W.dtype, double_quant=True), Nf4(64, 1024, W.dtype, double_quant=False))
    ]
    assert errors[0] < 1.01 * errors[1] < 0.1


def test_any_rows_are_a_matrix_by_themselves(path):
    W = matrix(7, 130)
    layout = Nf4(7, 130, W.dtype)
    parts = quantize(W, layout)
    whole = dequantize(parts, layout)
    for rows in (slice(0, 3), slice(3, 7), slice(2, 2), slice(None)):
        assert torch.equal(dequantize([p[rows] for p in parts], layout), whole[rows])
        assert torch.equal(PackedMatrix(parts, layout)[rows], whole[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(quantize(W[rows], layout), parts, strict=True))


def test_parts_may_be_strided(path):
    layout = Nf4(4, 64, torch.float32, double_quant=False)
    parts = quantize(matrix(4, 64), layout)
    strided = [torch.stack([p, torch.zeros_like(p)], dim=2)[:, :, 0] for p in parts]
    assert not strided[1].is_contiguous()
    assert torch.equal(dequantize(strided, layout), dequantize(parts, layout))


def test_rows_that_fill_up_are_not_part_of_it(path):
    W = matrix(5, 64)
    layout = Nf4(5, 64, W.dtype, stored_rows=8)
    parts = layout.empty(torch.device("cpu"))
    assert [len(p) for p in parts] == [8, 8, 8]
    for part, values in zip(parts, quantize(W, layout), strict=True):
        part[:5] = values
    assert dequantize(parts, layout).shape == PackedMatrix(parts, layout).shape == (5, 64)


@pytest.mark.parametrize("dim", [0, 1])
def test_norms_of_the_packed_matrix(dim):
    W = matrix(37, 130)
    layout = Nf4(37, 130, W.dtype)
    parts = quantize(W, layout)
    L, U = torch.randn(37, 3) * 0.1, torch.randn(3, 130) * 0.1
    got = squared_norms(PackedMatrix(parts, layout), L, U, 2.0, dim)
    check_squared_norms(got, dequantize(parts, layout), L, U, dim)


def check_squared_norms(got, W, L, U, dim=0):
    wide = [t.double() for t in (W, L, U)]
    V, of = (W + 2 * L @ U for W, L, U in (wide, [t.abs() for t in wide]))
    terms = min(V.shape[1 - dim], 256) + 2 * L.shape[1]  # torch adds long rows by parts; one element less shows
    assert_sums(got, V.square().sum(1 - dim), of.square().sum(1 - dim), terms)


@pytest.mark.parametrize(
    ("shape", "rank", "limit"), [((512, 28672), 384, 16e6), ((4096, 4096), 16, 2e6)], ids=["wide", "square"]
)
def test_scratch_of_the_norm(shape, rank, limit, tmp_path):
    """Of a few rows at a time, however many there are: 512 for 8192 saves time."""
    generator = torch.Generator().manual_seed(0)
    layout = Nf4(*shape, torch.bfloat16)
    packed, codes, ranges = parts = layout.empty(torch.device("cpu"))
    packed.random_(0, 256, generator=generator)
    codes.random_(0, 256, generator=generator)
    ranges.uniform_(1e-5, 2e-5, generator=generator)
    L, U = (torch.randn(s, generator=generator) * 1e-3 for s in ((shape[0], rank), (rank, shape[1])))
    got = []
    peak, _ = memory_profile(
        lambda _: got.append(squared_norms(PackedMatrix(parts, layout), L, U, 2.0, 0)), tmp_path / "trace"
    )
    assert shape[1] * 4 <= peak <= limit
    for rows in (slice(0, 3), slice(shape[0] - 3, None)):
        check_squared_norms(got[0][rows], dequantize([part[rows] for part in parts], layout), L[rows], U)


SPECS = {
    "dora": AdapterSpec(3, 2.0),
    "exact": AdapterSpec(3, 2.0, norm_gradient="exact"),
    "in": AdapterSpec(3, 2.0, axis="in"),
    "lora": AdapterSpec(3, 2.0, magnitude=False),
    "magnitude": AdapterSpec(0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", SPECS)
def test_a_layer_is_the_dense_one_over_the_dequantized_weight(path, kind, transposed, dtype):
    torch.manual_seed(0)
    shape = (130, 37) if transposed else (37, 130)
    layout = Nf4(*shape, dtype)
    W = matrix(*shape, dtype)
    bias = nn.Parameter(torch.randn(37, dtype=dtype) * 0.1, requires_grad=False)
    x = torch.randn(5, 130, dtype=dtype)
    results = []
    for packed in (True, False):
        torch.manual_seed(1)
        layer = DoraLinear(nn.Parameter(W.clone()), bias, SPECS[kind], transposed)
        if packed:
            layer.pack(layout)
            W = dequantize(layer.weight_parts, layout)
        layer.reset_parameters()
        with torch.no_grad():
            for factor in (layer.lora_A, layer.lora_B):
                if factor is not None:
                    factor.normal_(0, 0.1)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1.5)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y.detach(), inputs.grad, *trained, layer.merged_weight()])
    for four_bit, dense in zip(*results, strict=True):
        assert_near(four_bit, dense, 130 + 37)


@pytest.mark.parametrize("bias", [None, 50.0])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_ratio_on_the_scales(path, rank, bias):
    """bf16, where the ratio rides on the scales: near fp64 of the dequantized weight, also where m is zero or
    tiny, where V is, and beside a large bias."""
    torch.manual_seed(0)
    layout = Nf4(37, 130, torch.bfloat16, stored_rows=40)
    W = matrix(37, 130, torch.bfloat16)
    W[7] = 0
    parts = [F.pad(part, (0, 0, 0, 3)) for part in quantize(W, layout)]
    A, B = torch.randn(rank, 130) * 0.1, torch.randn(37, rank) * 0.1
    B[7] = 0
    V = dequantize(parts, layout).double() + 2 * (B @ A).double()
    n = V.norm(dim=1)
    m = n * (1 + 0.05 * torch.randn(37))
    m[3], m[4], m[5] = 0, 1e-9, -1
    x, dy = torch.randn(64, 130).bfloat16(), torch.randn(64, 37).bfloat16()
    shift = None if bias is None else torch.full((37,), bias).bfloat16()
    wide = [t.double().requires_grad_() for t in (x, A, B, m)]
    V = dequantize(parts, layout).double() + 2 * wide[2] @ wide[1]
    g = torch.where(n == 0, torch.ones_like(n), wide[3] / n.masked_fill(n == 0, 1))
    want = wide[0] @ V.t() * g
    wanted = torch.autograd.grad(want, wide if rank else [wide[0], wide[3]], dy.double())
    own = [t.detach().clone().requires_grad_() for t in (x, A, B, m.float())]
    factors = own[1:3] if rank else [None, None]
    y = adapted_linear(own[0], parts, *factors, own[3], n.float(), shift, scaling=2.0, layout=layout)
    got = torch.autograd.grad(y, own if rank else [own[0], own[3]], dy)
    assert [grad.dtype for grad in got[1:]] == [torch.float32] * (len(got) - 1)
    for one, other in zip((y if bias is None else y - shift, *got), (want, *wanted), strict=True):
        if one is not y and bias is not None and one.shape == y.shape:
            continue  # the sum with the bias is rounded to its size
        assert (one.double() - other).norm() / other.norm() < roundings(3, torch.bfloat16)
    dm = got[-1].double()
    torch.testing.assert_close(dm, wanted[-1], rtol=2e-2, atol=2e-2 * wanted[-1].abs().median().item())
    assert dm[7] == 0


def test_a_ratio_of_1_001_on_the_scales_is_visible():
    torch.manual_seed(0)
    layout = Nf4(64, 4096, torch.bfloat16)
    parts = quantize(matrix(64, 4096, torch.bfloat16), layout)
    x, n = torch.randn(64, 4096).bfloat16(), dequantize(parts, layout).float().norm(dim=1)
    at_one, above = (
        adapted_linear(x, parts, None, None, n * g, n, None, scaling=1.0, layout=layout).double()
        for g in (1, 1.001)
    )
    assert ((above * at_one).sum() / (at_one * at_one).sum() - 1).item() == pytest.approx(1e-3, rel=0.25)
    assert torch.equal(at_one, (x @ dequantize(parts, layout).t()).double())


def test_no_dense_copy_is_kept_for_the_backward():
    layout = Nf4(96, 128, torch.bfloat16)
    spec = AdapterSpec(4, 1.0)
    layers = nn.Sequential(
        DoraLinear(nn.Parameter(matrix(96, 128, torch.bfloat16)), None, spec),
        PackedLinear(nn.Parameter(matrix(128, 96, torch.bfloat16)), None, Nf4(128, 96, torch.bfloat16)),
    )
    layers[0].pack(layout)
    layers[0].reset_parameters()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layers(torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)).sum()
    assert kept and not any(t.is_floating_point() and t.numel() >= 96 * 128 for t in kept)


@pytest.mark.parametrize("kind", ["dora", "in", "lora"])
def test_memory_between_forward_and_backward(kind, tmp_path):
    """A step over two layers holds one dense weight at a time, and between forward and backward none."""
    size, tokens = 1024, 4
    layout, dense = Nf4(size, size, torch.bfloat16), size * size * 2
    layers = nn.Sequential()
    for _ in range(2):
        layer = DoraLinear(nn.Parameter(matrix(size, size, torch.bfloat16)), None, SPECS[kind])
        layer.pack(layout)
        layer.reset_parameters()
        if layer.magnitude is not None:
            layer.renew_norm(layer.current_norm())
        layer.norm_is_cached = True
        layers.append(layer)
    x = torch.randn(tokens, size, dtype=torch.bfloat16)

    def step(mark):
        loss = layers(x).float().square().sum()
        mark("between")
        loss.backward()
        mark("after")

    step(lambda _: None)  # makes the gradients
    peak, held = memory_profile(step, tmp_path / "trace")
    assert dense <= peak < 1.6 * dense
    assert 0 < held["between"] < 32 * tokens * size
    assert held["after"] < held["between"]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("module", ["bitsandbytes = None", "class bitsandbytes: ..."])
def test_an_old_or_absent_bitsandbytes_leaves_the_table(module):
    script = (
        "import sys, torch\nfrom dora_dist.quant import nf4 as quant\n"
        f"{module}\nsys.modules['bitsandbytes'] = bitsandbytes\n"
        "W, layout = torch.randn(2, 64), quant.Nf4(2, 64, torch.float32)\n"
        "assert quant.dequantize(quant.quantize(W, layout), layout).shape == W.shape\n"
        "assert not quant._has_kernels(64, False)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=child_environment())
