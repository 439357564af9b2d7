"""The layer's mathematics against plain fp64 expressions, forward and every gradient."""

import itertools

import pytest
import torch

from benchmarks.common.memory import memory_profile
from dora_dist.dora import norm_math, products
from dora_dist.dora.functional import adapted_embedding, adapted_linear
from dora_dist.dora.norm_math import merge_, norm_ratio, norm_with_gradient, squared_norms
from dora_dist.quant.nf4 import Nf4, quantize
from tests.support.rounding import assert_near, assert_sums, roundings

TERMS = 100  # of the products after each other in the small layers below, forward and backward
CASES = list(itertools.product(["out", "in"], [False, True], ["detached", "exact"], [False, True]))


def reference(x, W_OI, A, B, m, bias, scaling, axis, exact):
    """The definition, materialised."""
    V = W_OI + scaling * (B @ A)
    n = V.norm(dim=1 if axis == "out" else 0)
    n = n if exact else n.detach()
    g = torch.where(n == 0, torch.ones_like(n), m / torch.where(n == 0, torch.ones_like(n), n))
    y = (x @ V.t()) * g if axis == "out" else (x * g) @ V.t()
    return y if bias is None else y + bias


def make(axis, transposed, with_bias, dtype=torch.float64, O=17, I=11, R=3):  # noqa: E741
    torch.manual_seed(0)
    weight = torch.randn((I, O) if transposed else (O, I), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    A, B = torch.randn(R, I, dtype=wide), torch.randn(O, R, dtype=wide)
    m = torch.rand(O if axis == "out" else I, dtype=wide) + 0.5
    bias = torch.randn(O, dtype=dtype) if with_bias else None
    x = torch.randn(2, 5, I, dtype=dtype)
    for leaf in (x, A, B, m):
        leaf.requires_grad_()
    return x, weight, A, B, m, bias


def ours(x, weight, A, B, m, bias, scaling, axis, transposed, exact, dropout=0.0):
    L, U = (A.t(), B.t()) if transposed else (B, A)
    dim = int(transposed == (axis == "out"))
    n = squared_norms(weight, L, U, scaling, dim).sqrt()
    if exact:
        n = norm_with_gradient(n, weight, L, U, scaling, dim)
    return adapted_linear(
        x, weight, A, B, m, n, bias, scaling=scaling, axis=axis, transposed=transposed, dropout=dropout
    )


@pytest.mark.parametrize(("axis", "transposed", "gradient", "with_bias"), CASES)
def test_linear_agrees_with_the_definition(axis, transposed, gradient, with_bias):
    x, weight, A, B, m, bias = make(axis, transposed, with_bias)
    W_OI = weight.t() if transposed else weight
    y = ours(x, weight, A, B, m, bias, 0.7, axis, transposed, gradient == "exact")
    expected = reference(x, W_OI, A, B, m, bias, 0.7, axis, gradient == "exact")
    assert_near(y, expected, TERMS)
    dy = torch.randn_like(y)
    for name, got, want in zip(
        ("dx", "dA", "dB", "dm"),
        torch.autograd.grad(y, (x, A, B, m), dy),
        torch.autograd.grad(expected, (x, A, B, m), dy),
        strict=True,
    ):
        assert_near(got, want, TERMS, about=name)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activations_by_tiles_agree_with_the_definition(axis, with_bias, monkeypatch):
    monkeypatch.setattr(products, "_TILE_BYTES", 200)  # one or two of the ten tokens
    test_linear_agrees_with_the_definition(axis, False, "detached", with_bias)


def test_activations_by_tiles_in_16_bits(monkeypatch):
    monkeypatch.setattr(products, "_TILE_BYTES", 200)
    test_16_bit_gradients_are_near_fp64s()


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("transposed", [False, True])
def test_exact_gradient_passes_gradcheck(axis, transposed, monkeypatch):
    monkeypatch.setattr(norm_math, "_SCRATCH_BYTES", 256)  # several tiles
    monkeypatch.setattr(norm_math, "_LEAST_ROWS", 2)
    x, weight, A, B, m, bias = make(axis, transposed, True, O=7, I=5, R=2)
    assert torch.autograd.gradcheck(
        lambda x, A, B, m: ours(x, weight, A, B, m, bias, 0.7, axis, transposed, exact=True), (x, A, B, m)
    )


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (37, 53), (300, 2000)])
def test_norm_by_tiles_agrees_with_fp64(dim, dtype, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    L, U = torch.randn(shape[0], 3), torch.randn(3, shape[1])
    wide = [t.double() for t in (weight, L, U)]
    V, of = (W + 0.7 * L @ U for W, L, U in (wide, [t.abs() for t in wide]))
    got = squared_norms(weight, L, U, 0.7, dim)
    assert got.dtype == torch.float32
    assert_sums(got, V.square().sum(1 - dim), of.square().sum(1 - dim), shape[1 - dim] + 3)


def test_norm_survives_near_total_cancellation():
    """s B A close to -W: a factored norm loses all digits here, that of the elements about four."""
    torch.manual_seed(0)
    L, U = torch.randn(32, 4), torch.randn(4, 64)
    weight = -(L @ U) + 1e-3 * torch.randn(32, 64)
    expected = (weight.double() + L.double() @ U.double()).norm(dim=1)
    got = squared_norms(weight, L, U, 1.0, 0).sqrt()
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("axis", ["out", "in"])
def test_magnitude_gradient_is_right_where_m_is_zero_or_tiny(axis):
    x, weight, A, B, m, bias = make(axis, False, True)
    with torch.no_grad():
        m[0], m[1], m[2] = 0.0, 1e-30, -1e-12
        bias *= 1e6  # a form that derives h from y - bias drowns here
    (dm,) = torch.autograd.grad(ours(x, weight, A, B, m, bias, 0.7, axis, False, False).square().sum(), m)
    (want,) = torch.autograd.grad(reference(x, weight, A, B, m, bias, 0.7, axis, False).square().sum(), m)
    torch.testing.assert_close(dm, want, rtol=1e-9, atol=0)  # of fp64


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("exact", [False, True])
def test_zero_rows_have_ratio_one_and_finite_gradients(axis, exact):
    x, weight, A, B, m, bias = make(axis, False, True)
    with torch.no_grad():
        (weight[4] if axis == "out" else weight[:, 4]).zero_()
        (B[4] if axis == "out" else A[:, 4]).zero_()
        m[4] = 0.0
    y = ours(x, weight, A, B, m, bias, 0.7, axis, False, exact)
    grads = torch.autograd.grad(y.square().sum(), (x, A, B, m))
    assert all(torch.isfinite(g).all() for g in (y, *grads))
    assert norm_ratio(torch.zeros(1), torch.zeros(1)).item() == 1.0
    # With the ratio 1, B of a zero row can leave zero: its gradient must be there.
    assert (grads[2][4] if axis == "out" else grads[1][:, 4]).abs().sum() > 0


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_ratio_of_1_001_is_visible_in_16_bits(axis, dtype):
    """Applied to values already rounded to 16 bits, 1.001 would vanish: bf16 rounds 1.001 v back to v."""
    x, weight, A, B, _, _ = make(axis, False, False, dtype=dtype, O=256, I=64)
    with torch.no_grad():
        B.zero_()
        n = squared_norms(weight, B, A, 1.0, int(axis == "in")).sqrt()
        at_one = adapted_linear(x, weight, A, B, n, n, None, scaling=1.0, axis=axis).double()
        above = adapted_linear(x, weight, A, B, n * 1.001, n, None, scaling=1.0, axis=axis).double()
        gain = (above * at_one).sum() / (at_one * at_one).sum() - 1
        exact = x.double() @ weight.double().t()
    assert gain.item() == pytest.approx(1e-3, rel=0.25)
    assert (at_one - exact).norm() / exact.norm() < roundings(1, torch.bfloat16)


def test_16_bit_gradients_are_near_fp64s():
    x, weight, A, B, m, bias = make("out", False, True, dtype=torch.bfloat16, O=64, I=48)
    y = ours(x, weight, A, B, m, bias, 0.7, "out", False, True)
    wide = [t.detach().double().requires_grad_() for t in (x, A, B, m)]
    want = reference(wide[0], weight.double(), *wide[1:], bias.double(), 0.7, "out", True)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, A, B, m), dy)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for g, w in zip(got, torch.autograd.grad(want, wide, dy.double()), strict=True):
        assert (g.double() - w).norm() / w.norm() < roundings(3, torch.bfloat16)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_keeps_no_dense_copy(axis, dtype):
    """Between forward and backward: x, z = x A^T, n, for axis out g h and g, and what was there before."""
    x, weight, A, B, m, bias = make(axis, False, True, dtype=dtype, O=40, I=32, R=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x, weight, A, B, m, bias, 0.7, axis, False, False)
    given = {t.data_ptr() for t in (x, weight, A, B, m, bias)}
    new = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in given)
    assert new == sorted([(10, 4), *([(10, 40), (40,), (40,)] if axis == "out" else [(32,)])])


@pytest.mark.parametrize(
    ("axis", "dtype", "four_bit"),
    [("out", torch.float32, False), ("out", torch.bfloat16, False), ("out", torch.bfloat16, True),
     ("in", torch.float32, False)],
)  # fmt: skip
def test_backward_holds_no_wide_copy_of_the_activations(axis, dtype, four_bit, tmp_path):
    """The larger of x and y has T N elements: beside its gradient the backward holds tiles."""
    T, N = 2048, 1536
    O, I = (N, 16) if axis == "out" else (16, N)  # noqa: E741
    x, weight, A, B, m, _ = make(axis, False, False, dtype=dtype, O=O, I=I)
    x = torch.randn(T, I, dtype=dtype, requires_grad=True)
    layout = Nf4(O, I, dtype) if four_bit else None
    parts = quantize(weight, layout) if layout else weight
    y = adapted_linear(x, parts, A, B, m, torch.ones_like(m), None, scaling=0.7, axis=axis, layout=layout)
    dy = torch.randn_like(y)
    peak, _ = memory_profile(lambda _: torch.autograd.grad(y, (x, A, B, m), dy), tmp_path / "trace.json")
    # Over 4 bits y's gradient goes into the products as it is; the input's is made of a product in fp32.
    gradients = 0 if four_bit else T * N * dtype.itemsize * (1 if axis == "out" else 2)
    assert peak < gradients + 0.3 * T * N * 4


def test_dropout_touches_the_low_rank_path_alone():
    x, weight, A, B, m, bias = make("out", False, True)
    torch.manual_seed(1)
    y = ours(x, weight, A, B, m, bias, 0.7, "out", False, False, dropout=0.5)
    torch.manual_seed(1)
    keep = torch.empty(10, 11, dtype=torch.bool).bernoulli_(0.5).view_as(x)
    n = (weight + 0.7 * B @ A).norm(dim=1).detach()
    want = (m / n) * (x @ weight.t() + 0.7 * (x * keep * 2.0) @ A.t() @ B.t()) + bias
    assert_near(y, want, TERMS)
    dy = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, (x, A, B, m), dy), torch.autograd.grad(want, (x, A, B, m), dy), strict=True
    ):
        assert_near(got, expected, TERMS)


@pytest.mark.parametrize("transposed", [False, True])
def test_lora_is_the_same_without_the_magnitude(transposed):
    x, weight, A, B, _, bias = make("out", transposed, True)
    y = adapted_linear(x, weight, A, B, None, None, bias, scaling=0.7, transposed=transposed)
    W_OI = weight.t() if transposed else weight
    want = x @ (W_OI + 0.7 * B @ A).t() + bias
    assert_near(y, want, TERMS)
    dy = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(want, (x, A, B), dy), strict=True
    ):
        assert_near(got, expected, TERMS)


def test_magnitude_alone():
    x, weight, _, _, m, bias = make("out", False, True)
    n = squared_norms(weight, None, None, 1.0, 0).sqrt()
    y = adapted_linear(x, weight, None, None, m, n, bias, scaling=1.0)
    want = (x @ weight.t()) * (m / n) + bias
    assert_near(y, want, TERMS)
    for got, expected in zip(
        torch.autograd.grad(y.sum(), (x, m)), torch.autograd.grad(want.sum(), (x, m)), strict=True
    ):
        assert_near(got, expected, TERMS)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_embedding_is_the_linear_layer_on_one_hot_inputs(axis):
    torch.manual_seed(0)
    weight, A, B = (torch.randn(s, dtype=torch.float64) for s in ((13, 6), (3, 13), (6, 3)))
    m = torch.rand(6 if axis == "out" else 13, dtype=torch.float64) + 0.5
    leaves = [t.requires_grad_() for t in (A, B, m)]
    ids = torch.tensor([[0, 5, 5], [12, 1, 0]])
    n = squared_norms(weight, A.t(), B.t(), 0.7, int(axis == "out")).sqrt()
    y = adapted_embedding(ids, weight, A, B, m, n, scaling=0.7, axis=axis)
    one_hot = torch.nn.functional.one_hot(ids, 13).double()
    want = reference(one_hot, weight.t(), A, B, m, None, 0.7, axis, False)
    assert_near(y, want, TERMS)
    dy = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert_near(got, expected, TERMS)


@pytest.mark.parametrize(("axis", "transposed", "gradient", "with_bias"), CASES[::2])
def test_merged_weight_gives_the_layers_output(axis, transposed, gradient, with_bias):
    x, weight, A, B, m, bias = make(axis, transposed, with_bias)
    y = ours(x, weight, A, B, m, bias, 0.7, axis, transposed, False)
    L, U = (A.t(), B.t()) if transposed else (B, A)
    dim = int(transposed == (axis == "out"))
    n = squared_norms(weight, L, U, 0.7, dim).sqrt()
    merged = weight.clone()
    merge_(merged, L, U, 0.7, norm_ratio(m, n), dim)
    want = torch.nn.functional.linear(x, merged.t() if transposed else merged, bias)
    assert_near(y, want, TERMS)
