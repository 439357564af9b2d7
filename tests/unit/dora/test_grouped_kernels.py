"""The kernels that do all experts at once, against the loop in fp64: under Triton's interpreter in the process of
test_kernels.py, and on a GPU where there is one."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call

from dora_dist.dora import functional, grouped_kernels, kernels
from dora_dist.dora.grouped import adapted_experts
from dora_dist.dora.grouped_kernels import DeviceGroups
from dora_dist.dora.norm_cache import cache_norms
from dora_dist.quant.kernels import dequantize
from dora_dist.quant.modules import Groups
from dora_dist.quant.nf4 import Nf4, quantize
from tests.unit.dora.test_experts import E, adapted, assert_close, made, mixture
from tests.unit.dora.test_kernels import BF16, FP16, FP32, INTERPRETED, normal, on_devices

BOUNDS = {FP32: 2e-6, BF16: 1e-2, FP16: 2e-3}  # a few roundings: of A, z or dh, and the result
RAGGED = (66, 0, 3)


def sorted_experts(counts, nowhere=0):
    return torch.repeat_interleave(torch.arange(len(counts) + 1), torch.tensor([*counts, nowhere]))


def check(device, dtype, counts, sizes, rank, axis="out", kind="dora", four_bit=None, dropout=0.0, nowhere=0):
    """`four_bit`: whether the scales are quantized, too."""
    E, (O, I) = len(counts), sizes  # noqa: E741
    parts, layout = [normal(E * O, I, device=device).div_(I**0.5).to(dtype)], None
    wide_parts = [parts[0].double()]
    if four_bit is not None:
        layout = Nf4(E * O, I, dtype, double_quant=four_bit)
        parts = quantize(parts[0], layout)
        wide_parts = [dequantize(parts, layout).double()]
    x = normal(sum(counts) + nowhere, I, dtype=dtype, device=device).requires_grad_()
    features = E * (O if axis == "out" else I)
    trained = (
        {"A": normal(E * rank, I, device=device) / I**0.5, "B": normal(E * O, rank, device=device)} if rank else {}
    )
    norm = None
    if kind == "dora":
        norm = normal(features, device=device).abs() + 0.5
        norm[1] = 0
        trained["m"] = normal(features, device=device) + 2
    dy = normal(len(x), O, dtype=dtype, device=device)
    groups = DeviceGroups.of_sorted(sorted_experts(counts, nowhere).to(device), E)
    found = run(x, trained, norm, groups, parts, dy, layout, axis, dropout)
    wide = {key: tensor.double() for key, tensor in trained.items()}
    wide_norm, wide_x = None if norm is None else norm.double(), x.detach().double().requires_grad_()
    want = run(wide_x, wide, wide_norm, Groups.of(counts), wide_parts, dy.double(), None, axis, dropout)
    for key, tensor in found.items():
        error = (tensor.double() - want[key]).norm() / want[key].norm().clamp(min=1e-30)
        assert error <= BOUNDS[dtype], f"{key}: {error:.2g}"
        stacked = tensor.view(E, -1) if key in ("dA", "dB", "dm") else tensor[:0]
        assert all((row == 0).all() for row, count in zip(stacked, counts, strict=False) if not count), key
    assert "spans" not in vars(groups), "the host asked for the tokens of each expert"


def run(x, trained, norm, groups, parts, dy, layout, axis, dropout):
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in trained.items()}
    A, B, m = (leaves.get(key) for key in "ABm")
    torch.manual_seed(3)
    y = adapted_experts(x, groups, parts, A, B, m, norm, scaling=1.5, axis=axis, dropout=dropout, layout=layout)
    grads = torch.autograd.grad(y, [x, *leaves.values()], dy)
    return {"y": y.detach(), "dx": grads[0], **{f"d{key}": g for key, g in zip(leaves, grads[1:], strict=True)}}


@on_devices
@pytest.mark.parametrize(
    ("dtype", "rank", "sizes", "more"),
    [
        (FP32, 5, (70, 45), {"dropout": 0.3, "nowhere": 2}),
        (FP32, 5, (70, 45), {"dropout": 0.3, "nowhere": 2, "axis": "in"}),
        (FP32, 0, (40, 66), {"axis": "in", "four_bit": False}),
        (BF16, 40, (130, 70), {}),
        (BF16, 40, (130, 70), {"axis": "in"}),
        (BF16, 5, (40, 66), {"four_bit": True}),
        (FP16, 3, (64, 64), {"kind": "lora"}),
    ],
)
def test_experts_against_fp64(dtype, rank, sizes, more, device):
    check(device, dtype, RAGGED, sizes, rank, **more)


@on_devices
@pytest.mark.parametrize(("counts", "dtype"), [((64,), BF16), ((0, 3, 1), FP32)])
def test_few_experts_and_few_tokens(counts, dtype, device):
    check(device, dtype, counts, (20, 17), 3)


@on_devices
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_ratio_of_1_001_is_visible(axis, device):
    """Rounded to bf16 before or after the ratio, the product, or x, would come back to the same values."""
    W, x = normal(64, 32, dtype=BF16, device=device), normal(64, 32, dtype=BF16, device=device)
    n = torch.full((64 if axis == "out" else 32,), 4.0, device=device)
    groups = DeviceGroups.of_sorted(sorted_experts((64,)).to(device), 1)
    y = adapted_experts(x, groups, [W], None, None, 1.001 * n, n, scaling=1.0, axis=axis)
    rounded = (x.double() @ W.double().t()).bfloat16().double()
    gain = (y.double() * rounded).sum() / rounded.square().sum() - 1
    assert gain.item() == pytest.approx(1e-3, rel=0.25)


@on_devices
def test_a_whole_block(device):
    """With its sort and its router's weights; a token goes nowhere, another to one expert."""
    experts = mixture(adapted(made("gpt_oss", 2))).experts.to(device)  # it has biases
    x, weights = normal(4, 32, device=device), normal(4, 2, device=device)
    index = torch.tensor([[0, 4], [E, 1], [E, E], [4, 1]], device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        each = experts if dtype == torch.float32 else copy.deepcopy(experts).double()
        trained = [p for p in each.parameters() if p.requires_grad]
        given = [t.detach().to(dtype).requires_grad_() for t in (x, weights)]
        y = each(given[0], index, given[1])
        results.append([y, *torch.autograd.grad(y.square().sum(), [*given, *trained])])
    for found, want in zip(*results, strict=True):
        assert_close(found, want, str(tuple(want.shape)), 2e-6)
    assert (results[0][0][2] == 0).all() and (results[0][1][2] == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="nothing is computed")
@pytest.mark.parametrize("axis", ["out", "in"])
def test_on_a_gpu_the_host_waits_for_nothing(axis, monkeypatch):
    """Fake tensors have no values that a host could wait for."""
    pytest.importorskip("triton")
    launched = []
    for module in (grouped_kernels, kernels, functional):
        monkeypatch.setattr(module, "available", lambda *_: True, raising=False)
        monkeypatch.setattr(module, "launch", lambda k, *_, **__: launched.append(k.__name__), raising=False)
    experts = mixture(adapted(made("qwen3_moe", 2), magnitude_axis=axis)).experts
    cache_norms(experts)
    with FakeTensorMode():
        held = {n: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
                for n, t in (*experts.named_parameters(), *experts.named_buffers())}  # fmt: skip
        x, weights = torch.empty(9, 32, requires_grad=True), torch.empty(9, 2)
        given = x, torch.empty(9, 2, dtype=torch.long), weights
        functional_call(experts, held, given).sum().backward()
        assert x.grad.shape == x.shape and all(t.grad.shape == t.shape for t in held.values() if t.requires_grad)
        per_projection = ["outputs_kernel", "inputs_kernel", "factors_kernel", "factors_kernel"]
        per_projection += ["ratio_kernel"] if axis == "out" else ["tile_sums_kernel"]
        assert sorted(launched) == sorted(2 * per_projection)
        monkeypatch.setattr(grouped_kernels, "force", False)
        with pytest.raises(DynamicOutputShapeException):
            functional_call(experts, held, given)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(32768, 128, True), (1365 * 128, 128, True), (1366 * 128, 128, False)]
)
def test_experts_go_in_turn_where_their_products_take_longer_than_launches(tokens, experts, chosen, monkeypatch):
    monkeypatch.setattr(grouped_kernels, "available", lambda *_: True)
    x = torch.empty(tokens, 2048, device="meta")
    assert grouped_kernels.worthwhile(x, experts, {"up": (1536, 2048), "down": (2048, 768)}) is chosen
    monkeypatch.setattr(grouped_kernels, "force", not chosen)
    assert grouped_kernels.worthwhile(x, experts, {"up": (1536, 2048)}) is not chosen


@on_devices
def test_no_tokens_at_all(device):
    check(device, FP32, (0, 0), (20, 17), 3)


@on_devices
def test_tiles(device):
    """Each token is in one tile, which is its expert's."""
    for counts, nowhere in ((RAGGED, 0), ((64, 128, 1), 5), ((0, 0, 0), 2), ((63, 65), 64)):
        experts = sorted_experts(counts, nowhere)
        groups = DeviceGroups.of_sorted(experts.to(device), len(counts))
        seen = []
        for expert, start in zip(groups.tile_expert.tolist(), groups.tile_start.tolist(), strict=True):
            if expert <= len(counts):
                stop = min(start + grouped_kernels.TOKENS, groups.starts[expert + 1].item())
                assert start < stop and (experts[start:stop] == expert).all()
                seen += range(start, stop)
        assert sorted(seen) == list(range(len(experts)))
        assert groups.spans == Groups.of(counts).spans
