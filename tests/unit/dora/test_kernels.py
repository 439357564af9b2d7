"""The Triton kernels against fp64: under Triton's interpreter in a process of its own, since Triton is told of it
once and for all when it is first imported, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import Function

from dora_dist.dora import kernels, products
from dora_dist.quant import kernels as nf4_kernels
from dora_dist.quant import nf4
from dora_dist.quant.nf4 import Nf4, PackedMatrix, dequantize, quantize
from tests.support import ROOT
from tests.support.launch import child_environment
from tests.support.rounding import assert_sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
on_devices = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [GPU])
DTYPES = FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RANKS = [5, 32, 50]  # below, at and above the columns of a factor that a program reads at once
RANKS_AND_DTYPES = [(5, FP32), (32, BF16), (50, BF16), (50, FP16)]


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_all_of_this_under_the_interpreter():
    pytest.importorskip("triton")
    files = [str(Path(__file__).with_name(name)) for name in ("test_kernels.py", "test_grouped_kernels.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**child_environment(), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout and "skipped" in result.stdout  # the child ran them; it skips this one alone


def test_where_there_is_no_triton_or_no_gpu_they_are_not_available(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    nf4_kernels._run_on.cache_clear()
    assert not nf4_kernels.available(torch.device("cpu"))
    assert not nf4_kernels.available(torch.device("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises
    nf4_kernels._run_on.cache_clear()
    assert not nf4_kernels.available(torch.device("cpu"))
    nf4_kernels._run_on.cache_clear()


@on_devices
def test_available(device):
    assert nf4_kernels.available(torch.device(device))
    assert not nf4_kernels.available(torch.device(device), torch.float64)


def normal(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def spread(matrix):
    """The same numbers with gaps between rows and columns, columns first."""
    wide = matrix.new_zeros(2 * matrix.shape[1], matrix.shape[0] + 3)
    view = wide[::2, 1:-2].t()
    view.copy_(matrix)
    assert not view.is_contiguous() and not view.t().is_contiguous()
    return view


def check_norms(M, values, L, U, dim):
    """`values` are M's in fp64."""
    want, of, terms = values, values.abs(), values.shape[1 - dim]
    if L is not None:
        want, of = want + 0.7 * L.double() @ U.double(), of + 0.7 * L.double().abs() @ U.double().abs()
        terms += L.shape[1]
    got = kernels.squared_norms(M, L, U, 0.7, dim)
    assert got.dtype == torch.float32
    assert_sums(got, want.square().sum(1 - dim), of.square().sum(1 - dim), terms)


# ---------------------------------------------------------------------------------------------------------- norms


@on_devices
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rank", RANKS)
def test_norms_of_any_rank(rank, dim, device):
    N, K = (70, 131) if rank < 50 else (20, 70)
    M = normal(N, K, device=device)
    L, U = normal(N, rank, device=device) / rank**0.5, normal(rank, K, device=device)
    M[3] = 0
    L[3] = 0
    check_norms(M, M.double(), L, U, dim)
    first, second = (kernels.squared_norms(M, L, U, 0.7, dim) for _ in range(2))
    assert torch.equal(first, second)


@on_devices
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (3, 600), (65, 513), (0, 5), (5, 0)])
def test_norms_of_any_shape(shape, dim, device):
    """Of blocks of 64 x 64, 512 elements of a row or column to a program."""
    shape = shape if dim == 0 else shape[::-1]
    M = normal(*shape, device=device)
    if M.numel() == 1800:
        check_norms(M, M.double(), None, None, dim)
    L, U = normal(shape[0], 2, device=device), normal(2, shape[1], device=device)
    check_norms(M, M.double(), L, U, dim)


@on_devices
@pytest.mark.parametrize(("dtype", "dim"), [(FP32, 0), (BF16, 1), (FP16, 0)])
def test_norms_of_strided_matrices(dtype, dim, device):
    M = spread(normal(40, 70, dtype=dtype, device=device))
    L, U = spread(normal(40, 5, device=device)), spread(normal(5, 70, device=device))
    check_norms(M, M.double(), L, U, dim)
    check_norms(M.t(), M.t().double(), U.t(), L.t(), dim)


@on_devices
@pytest.mark.parametrize("dim", [0, 1])
def test_norms_where_the_product_nearly_cancels_the_matrix(dim, device):
    L, U = normal(40, 4, device=device), normal(4, 70, device=device)
    M = -0.7 * L @ U + 0.05 * normal(40, 70, device=device)
    want = (M.double() + 0.7 * L.double() @ U.double()).square().sum(1 - dim)
    # A factored form errs by the squares of M and of L U, which are some hundred times those of V.
    assert_sums(kernels.squared_norms(M, L, U, 0.7, dim), want, want, 40 * M.shape[1 - dim])


@on_devices
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("shape", "rank", "double_quant", "dtype"),
    [((1, 1), 3, True, FP32), ((37, 130), 3, False, FP32), ((37, 130), 40, True, BF16), ((3, 600), 3, True, FP16)],
)
def test_norms_of_4_bit_matrices(shape, rank, double_quant, dtype, dim, device):
    W = 0.02 * normal(*shape)
    W[shape[0] // 2, : shape[1] // 2] = 0
    layout = Nf4(*shape, dtype, double_quant=double_quant, stored_rows=shape[0] + 3)
    parts = layout.empty(torch.device(device))
    for part, values in zip(parts, quantize(W.to(device), layout), strict=True):
        part[: shape[0]] = values
        part[shape[0] :] = 77  # the rows that fill up hold anything
    dense = dequantize(parts, layout).double()
    L, U = 0.01 * normal(shape[0], rank, device=device), normal(rank, shape[1], device=device)
    check_norms(PackedMatrix(parts, layout), dense, L, U, dim)
    strided = [torch.stack([part, part], dim=2)[:, :, 0] for part in parts]
    check_norms(PackedMatrix(strided, layout), dense, None, None, dim)


@on_devices
@pytest.mark.parametrize(
    ("shape", "double_quant", "dtype"), [((1, 1), True, FP32), ((17, 130), False, BF16), ((16, 256), True, FP16)]
)
@pytest.mark.parametrize("with_factors", [False, True])
def test_dequantized_where_there_is_no_bitsandbytes(shape, double_quant, dtype, with_factors, device, monkeypatch):
    """The same bits as torch's own operators make."""
    monkeypatch.setattr(nf4, "_load_kernels", lambda: False)
    layout = Nf4(*shape, dtype, double_quant=double_quant)
    parts = quantize(normal(*shape, device=device), layout)
    factors = normal(shape[0], device=device) if with_factors else None
    launched, launch = [], nf4_kernels.launch
    monkeypatch.setattr(nf4_kernels, "launch", lambda *a, **k: launched.append(a) or launch(*a, **k))
    got = nf4_kernels.dequantize(parts, layout, factors)
    assert len(launched) == 1
    assert got.dtype == dtype and torch.equal(got, dequantize(parts, layout, factors))
    torch.library.opcheck(
        nf4_kernels._dequantize.op, (*nf4.codes_and_scales(parts, layout), shape[1], 64, dtype),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- forward and backward


# Beside bf16 numbers B goes in as two of them, whose error is 2^-16 of it: what fp32 makes of sums of 2^12 terms.
TWO_PARTS = 2**12


def layer(T, O, R, dtype, device):  # noqa: E741
    """base, z, B, g, bias; a zero among the ratios."""
    g = normal(O, device=device).abs()
    g[O // 2] = 0
    base, z = normal(T, O, device=device), normal(T, R, dtype=dtype, device=device)
    return base, z, normal(O, R, device=device) / R**0.5, g, normal(O, dtype=dtype, device=device)


def check_compose(base, z, B, g, bias, dtype):
    h, of = base.double(), base.double().abs()
    if z is not None:
        h, of = h + 0.7 * z.double() @ B.double().t(), of + 0.7 * z.double().abs() @ B.double().abs().t()
    want, of = g.double() * h, g.double().abs() * of
    y, kept = kernels.compose(base, z, B, g, bias, 0.7, dtype)
    shift = 0 if bias is None else bias.double()
    terms = TWO_PARTS if dtype == torch.bfloat16 else 3 + (0 if z is None else z.shape[1])
    for got, wide, sums_of in ((y, want + shift, of + abs(shift)), (kept, want, of)):
        assert got.dtype == dtype and got.shape == base.shape
        assert_sums(got, wide, sums_of, terms, torch.float32)
    assert (kept is y) == (bias is None)


def check_backward(dy, h, B, g, dtype):
    n = g + 0.5
    n[:1] = 0
    g = torch.where(g == 0, 1e-4, g)
    dh, dz, dm = kernels.backward(dy, h, B, g, n, 0.7)
    assert dh.dtype == dtype and torch.equal(dh, (dy.float() * g).to(dtype))
    without, *others = kernels.backward(dy, h, B, g, n, 0.7, keep_dh=False)
    assert without is None
    for other, found in zip(others, (dz, dm), strict=True):
        assert found is None if other is None else torch.equal(other, found)
    if B is None:
        assert dz is None
    else:
        assert dz.dtype == dtype
        terms = TWO_PARTS if dtype == torch.bfloat16 else 1 + len(B)
        assert_sums(dz, 0.7 * dh.double() @ B.double(), 0.7 * dh.double().abs() @ B.double().abs(), terms, FP32)
    assert dm.dtype == torch.float32 and (dm[n == 0] == 0).all()
    products = dy.double() * h.double() / (g.double() * n.double())
    products[:, n == 0] = 0
    assert_sums(dm, products.sum(0), products.abs().sum(0), len(products) + 2)


@on_devices
@pytest.mark.parametrize(("rank", "dtype"), RANKS_AND_DTYPES)
def test_forward_and_backward_of_any_rank(rank, dtype, device):
    T, O = (67, 131) if rank < 50 else (37, 40)  # noqa: E741
    base, z, B, g, bias = layer(T, O, rank, dtype, device)
    check_compose(base, z, B, g, bias, dtype)
    check_backward(normal(T, O, dtype=dtype, device=device), base.to(dtype), B, g, dtype)


@on_devices
@pytest.mark.parametrize("shape", [(1, 1), (64, 32), (65, 130), (1, 1025), (0, 4), (4, 0)])
def test_forward_and_backward_of_any_shape(shape, device):
    T, O = shape  # noqa: E741
    base, z, B, g, bias = (normal(*shape, device=device) for shape in ((T, O), (T, 2), (O, 2), (O,), (O,)))
    dy, h = normal(T, O, device=device), base + 1
    check_compose(base, z, B, g, bias, FP32)
    check_compose(base, None, None, g, None, FP32)
    check_backward(dy, h, B, g, FP32)
    check_backward(dy, h, None, g, FP32)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_compose_of_strided_or_narrow_matrices(dtype, device):
    base, z, B, g, bias = layer(37, 70, 5, dtype, device)
    g, bias = g.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]
    check_compose(spread(base), spread(z), spread(B), g, bias, dtype)
    check_compose(spread(base.to(dtype)), z, B, g, None, dtype)
    check_compose(base.to(dtype), None, None, g, bias, dtype)


@on_devices
def test_a_ratio_of_1_001_is_visible(device):
    h = normal(64, 64, device=device)
    g = torch.full((64,), 1.001, device=device)
    y, _ = kernels.compose(h, None, None, g, None, 1.0, torch.bfloat16)
    gain = (y.double() * h.bfloat16()).sum() / h.bfloat16().double().square().sum() - 1
    assert gain.item() == pytest.approx(1e-3, rel=0.25)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_strided_matrices(dtype, device):
    base, _, B, g, _ = layer(37, 70, 5, dtype, device)
    dy = normal(37, 70, dtype=dtype, device=device)
    check_backward(spread(dy), spread(base.to(dtype)), spread(B), g.repeat_interleave(2)[::2], dtype)
    check_backward(dy[:1].expand(37, 70), base, B, g, dtype)  # what the backward of a sum hands on
    check_backward(dy, base, None, g, dtype)


@on_devices
@pytest.mark.parametrize("keep_dh", [True, False])
def test_beyond_their_largest_rank_libraries_multiply(keep_dh, device, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_RANK", 4)
    base, z, B, g, bias = layer(37, 70, 5, FP32, device)
    n, g, dy = g + 0.5, g + 0.1, normal(37, 70, device=device)
    h = base.double() + 0.7 * z.double() @ B.double().t()
    y, gh = products.composed(base, z, B, g, bias, 0.7, FP32)
    dh, dz, dm = products.decomposed(dy, gh, B, g, n, 0.7, keep_dh)
    assert (dh is None) != keep_dh and (dh is None or torch.equal(dh, dy * g))
    for got, want in ((gh, g * h), (y, g * h + bias), (dz, 0.7 * (g * dy).double() @ B.double())):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dm.double(), (dy * h).sum(0) / n, rtol=1e-5, atol=1e-5)


@on_devices
def test_ratios(device):
    m, n = torch.tensor([2.0, -3, 0, 5], device=device), torch.tensor([4.0, 2, 3, 0], device=device)
    assert kernels.nonzero_ratio(m, n, 1e-20).tolist() == [0.5, -1.5, pytest.approx(1e-20), 1]


# --------------------------------------------------------------------------------------------------- torch.compile


class Layer(Function):
    @staticmethod
    def forward(ctx, base, z, B, g):
        assert nf4_kernels.available(base.device, base.dtype)
        norms = kernels.squared_norms(base, z, B.t(), 0.7, 1)
        y, h = kernels.compose(base, z, B, g, norms, 0.7, base.dtype)
        ctx.save_for_backward(h, z, B, g)
        return y

    @staticmethod
    def backward(ctx, dy):
        h, z, B, g = ctx.saved_tensors
        dh, dz, dm = kernels.backward(dy, h, B, g, g, 0.7)
        return dh, dz, 0.7 * dh.t() @ z, dm


@on_devices
def test_compiled_without_a_break(device):
    torch.compiler.reset()
    base, z, B, g, _ = layer(19, 33, 3, torch.float32, device)
    leaves = [t.requires_grad_() for t in (base, z, B, g)]
    results = []
    for function in (Layer.apply, torch.compile(Layer.apply, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@on_devices
def test_the_operators_agree_with_their_shapes(device):
    base, z, B, g, bias = layer(5, 7, 3, torch.float32, device)
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor")
    for keep_gh in (True, False):
        check(kernels._compose.op, (base, z, B, g, bias, 0.7, torch.bfloat16, keep_gh), test_utils=tests)
    check(kernels._backward.op, (base, base, B, g, g, 0.7, True), test_utils=tests)
    check(kernels._backward.op, (base, base, None, g, g, 0.7, False), test_utils=tests)
    check(kernels.nonzero_ratio.op, (g, g, 1e-4), test_utils=tests)
    check(kernels._squared_norms.op, ([base], z, B.t(), 0.7, 1, [5, 7], 0, torch.float32), test_utils=tests)
