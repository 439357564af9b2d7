"""DoraLinear and DoraEmbedding as modules: when the norm is computed, what stays fp32, what is saved."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dora_dist import DoraConfig, attach_norm_refresh, inject_dora, load_adapter, refresh_norms, save_adapter
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_cache import cache_norms, dora_layers
from dora_dist.dora.norm_math import norm_ratio
from dora_dist.errors import UserError
from tests.support.models import gpt2, llama
from tests.support.peft import CASES, IDS, Case, logits, ours, randomized
from tests.support.rounding import MODEL, assert_near, rounding, roundings

KINDS = {
    "dora": {},
    "axis in": {"magnitude_axis": "in"},
    "exact": {"norm_gradient": "exact"},
    "magnitude only": {"targets": [], "magnitude_only": ["0", "2"]},
    "lora": {"method": "lora"},
}
SMALL = 16  # terms in a layer of the small model
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def small(kind: str = "dora", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    return inject_dora(model, DoraConfig(**{"rank": 2, "alpha": 3, "targets": ["0", "2"], **KINDS[kind]}))


@pytest.fixture
def count_norms(monkeypatch):
    """The number of norms that layers computed in a forward, so far."""
    calls = []
    compute = DoraLayer.current_norm
    monkeypatch.setattr(DoraLayer, "current_norm", lambda layer: calls.append(layer) or compute(layer))
    return lambda: len(calls)


def fresh_output(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """The output of a copy, which computes its norms anew."""
    return copy.deepcopy(model)(x)


def test_a_layer_left_alone_is_never_stale(count_norms):
    model = small()
    model(X)
    assert count_norms() == 4  # two at initialisation, two in the forward
    model[0].lora_B.data.normal_()  # no version counter is bumped, no hook is called
    want = nn.functional.linear(X, model[0].merged_weight(), model[0].bias)
    assert_near(model[0](X), want, SMALL)


@pytest.mark.parametrize("kind", ["dora", "axis in", "exact", "magnitude only"])
def test_cached_norms_are_renewed_once_per_optimizer_step(kind, count_norms, monkeypatch):
    import dora_dist.dora.norm_cache

    refreshes = []
    monkeypatch.setattr(
        dora_dist.dora.norm_cache, "refresh_norms", lambda *args: refreshes.append(args) or refresh_norms(*args)
    )
    model = small(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = count_norms()
    attach_norm_refresh(model, optimizer)
    for step in range(3):
        for _ in range(2):  # micro-batches
            model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(refreshes) == step + 2
    assert count_norms() == before, "a forward computed its norm although it was cached"
    assert torch.equal(model(X), fresh_output(model))


@pytest.mark.parametrize("given", [nn.Linear(1, 1), "adamw", [torch.optim.Optimizer], lambda: None])
def test_what_is_refused_caches_no_norm(given):
    model = small()
    with pytest.raises(UserError, match="pass the torch optimizer, what accelerate"):
        attach_norm_refresh(model, given)
    assert not any(layer.norm_is_cached for layer in dora_layers(model).values())


class LightningsOptimizer:
    """As Lightning wraps one: no torch optimizer itself, but the inner one answers whatever else is asked."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("wrapper", ["accelerate", "a loss scale that skips", "Lightning", "two"])
def test_norms_are_renewed_through_what_wraps_an_optimizer(wrapper):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    model, scaler = small(), torch.amp.GradScaler("cpu") if wrapper.startswith("a loss") else None
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if wrapper != "Lightning":
        accelerate.Accelerator(cpu=True)  # its optimizers ask for the state of one
    prepared = LightningsOptimizer(inner) if wrapper == "Lightning" else AcceleratedOptimizer(inner, scaler=scaler)
    attach_norm_refresh(model, LightningsOptimizer(prepared) if wrapper == "two" else prepared)
    for factor in (1, 1) if scaler is None else (1, float("inf"), 1):
        norm = model[0].norm.clone()
        loss = model(X).square().sum() * factor
        (loss if scaler is None else scaler.scale(loss)).backward()
        prepared.step()
        prepared.zero_grad()
        assert torch.equal(model(X), fresh_output(model))
        assert torch.equal(model[0].norm, norm) == (factor != 1)


def test_dropout_ends_with_training():
    config = DoraConfig(rank=2, alpha=3, targets=["0"], dropout=0.5)
    model = inject_dora(nn.Sequential(nn.Linear(6, 8)), config)
    nn.init.normal_(model[0].lora_B)
    want = nn.functional.linear(X, model[0].merged_weight(), model[0].bias)
    assert not torch.allclose(model(X), want, atol=1e-2)
    assert_near(model.eval()(X), want, SMALL)


def test_a_cached_norm_is_renewed_on_demand_and_after_a_load(tmp_path):
    model, other = small(), randomized(small())
    cache_norms(model)
    model[0].lora_B.data.normal_()
    assert not torch.equal(model(X), fresh_output(model)), "this test needs a stale cache to begin with"
    refresh_norms(model)
    assert torch.equal(model(X), fresh_output(model))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), fresh_output(other))
    refresh_norms(model)
    save_adapter(randomized(small()), tmp_path)
    model[0].lora_B.data.zero_()
    load_adapter(model, tmp_path)
    assert torch.equal(model(X), fresh_output(other))
    assert not any(layer._norm_is_stale for layer in dora_layers(model).values())


def test_a_copy_does_not_trust_its_cache():
    model = small()
    cache_norms(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        twin[0].lora_B.data.normal_()
        want = nn.functional.linear(X, twin[0].merged_weight(), twin[0].bias)
        assert_near(twin[0](X), want, SMALL)
    assert model[0].norm_is_cached


@pytest.mark.parametrize("kind", ["dora", "axis in", "exact"])
def test_training_with_cached_norms_is_bit_identical(kind):
    """cached == recomputed, over steps that move A, B and m."""
    runs = []
    for cached in (False, True):
        case = Case(lambda: llama(attention_bias=True), ["embed_tokens", "q_proj", "down_proj"], KINDS[kind])
        torch.manual_seed(0)
        model = ours(case).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        if cached:
            attach_norm_refresh(model, optimizer)
        losses = []
        for _ in range(5):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((losses, model.state_dict()))
    (losses, state), (cached_losses, cached_state) = runs
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(t).all() for t in state.values())
    assert losses == cached_losses
    assert all(torch.equal(state[key], cached_state[key]) for key in state)


@pytest.mark.parametrize("narrow", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_narrowing_a_model_leaves_the_adapter_wide(narrow):
    model = randomized(small())
    cache_norms(model)
    model(X).sum().backward()
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    narrow(model)
    for layer in dora_layers(model).values():
        assert layer.weight.dtype == layer.bias.dtype != torch.float32
        for tensor in (layer.lora_A, layer.lora_B, layer.magnitude, layer.norm, layer.lora_A.grad):
            assert tensor.dtype == torch.float32
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    x = X.to(model[0].weight.dtype)
    assert torch.equal(model(x), fresh_output(model, x)), "the norm of the weight before it was rounded"


def test_widening_and_narrowing_again():
    model = small().double()
    layer = model[0]
    assert {t.dtype for t in (layer.weight, layer.lora_A, layer.magnitude, layer.norm)} == {torch.float64}
    model(X.double()).sum().backward()
    model.float()
    assert {t.dtype for t in (layer.weight, layer.lora_A, layer.magnitude, layer.norm)} == {torch.float32}
    model(X).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model = small(kind)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
        assert y.dtype == torch.bfloat16
        y.square().sum().backward()
    want = model(X)
    assert (y.float() - want).norm() < roundings(5, torch.bfloat16) * want.norm()  # x, W, z, h twice, tanh
    for p in model.parameters():
        assert not p.requires_grad or (p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0)


def test_a_magnitude_step_in_bf16_moves_the_loss_like_fp32s():
    """|m/n - 1| of about 1e-3: peers that hold the ratio in bf16 (1.001 is 1.0 there) see nothing."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(hidden_size=48, intermediate_size=96, head_dim=16).bfloat16().to(dtype)
        model = inject_dora(model, DoraConfig(targets=[], magnitude_only=["*_proj"]))
        magnitudes = {n: p for n, p in model.named_parameters() if p.requires_grad}
        cache_norms(model)
        ids = torch.randint(0, 96, (8, 64), generator=torch.Generator().manual_seed(0))
        first = loss_of(model, ids)
        first.backward()
        if dtype == torch.float32:
            signs = {n: p.grad.sign() for n, p in magnitudes.items()}
        with torch.no_grad():
            for n, p in magnitudes.items():
                p.mul_(1 - 1e-3 * signs[n])
            losses[dtype] = (loss_of(model, ids) - first).item()
    assert losses[torch.float32] < 0
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.2)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU with AMX the other fails under ATEN_CPU_CAPABILITY=avx2
        logits = model(input_ids=ids).logits.float().transpose(1, 2)
    return nn.functional.cross_entropy(logits[:, :, :-1], ids[:, 1:])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["dora", "axis in", "exact"])
def test_activation_checkpointing(kind, reentrant):
    model = randomized(small(kind))
    cache_norms(model)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        run(X.clone().requires_grad_()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_the_user_unfroze_gets_its_gradient(kind):
    model = small(kind)
    model[2].bias.requires_grad_(True)
    dy = torch.randn(5, 4)
    model(X).backward(dy)
    assert_near(model[2].bias.grad, dy.sum(0), len(dy))
    assert model[0].bias.grad is None and model[2].weight.grad is None


def test_state_dict_is_the_bases_and_the_adapter():
    keys = set(small().state_dict())
    own = {"weight", "bias", "lora_A", "lora_B", "magnitude"}
    assert keys == {f"{n}.{k}" for n in ("0", "2") for k in own}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("make", [lambda: llama(attention_bias=True, mlp_bias=True), gpt2])
def test_step_zero_is_the_base_model(dtype, axis, make):
    base = make().to(dtype)
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight[1].zero_()
                module.weight[:, 2].zero_()
    want = logits(base)
    embedding = "embed_tokens" if hasattr(base, "model") else "wte"
    model = inject_dora(base, DoraConfig(rank=2, targets=["all-linear", embedding], magnitude_axis=axis))
    cache_norms(model)
    layers = dora_layers(model).values()
    assert any((layer.norm == 0).any() for layer in layers)
    for layer in layers:
        assert torch.equal(norm_ratio(layer.magnitude, layer.norm), torch.ones_like(layer.norm))
    error = (logits(model) - want).norm() / want.norm()
    assert error < (rounding(MODEL, dtype) if dtype == torch.float32 else roundings(3, dtype))


def test_embeddings_move_only_the_rows_they_see():
    model = ours(CASES["gpt2 tied embedding"])
    assert model.transformer.wte.weight is model.lm_head.weight
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    grad = model.transformer.wte.lora_A.grad
    unseen = [i for i in range(96) if i not in IDS]
    assert grad[:, unseen].abs().sum() == 0
    assert all(grad[:, i].abs().sum() > 0 for i in IDS[0, :-1])
