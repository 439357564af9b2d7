"""Mixtures of experts: their layers against the models' own loops in fp64, with V in the weights' place."""

import copy
import pickle
from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist import DoraConfig, UserError, inject_dora, merge_adapter
from dora_dist.dora.experts import DoraExperts, ExpertsForward
from dora_dist.dora.experts_layout import experts_layout
from dora_dist.dora.grouped import adapted_experts
from dora_dist.dora.layers import AdapterSpec
from dora_dist.dora.norm_cache import cache_norms, dora_layers
from dora_dist.quant.modules import FrozenExperts, Groups
from dora_dist.quant.nf4 import Nf4
from tests.support.small import small_model

TYPES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
E = 5


@cache
def made(model_type: str, top_k: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_experts_per_tok": top_k, "num_key_value_heads": 4}
    sizes |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), E)
    model = small_model(model_type, sizes=sizes, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def mixture(model: nn.Module) -> nn.Module:
    """The block of a router and its experts."""
    return next(m for m in model.modules() if hasattr(m, "experts"))


def adapted(model: nn.Module, **settings) -> nn.Module:
    """A copy in fp32 whose experts are adapted, with A, B and m that are not the first."""
    config = DoraConfig(**{"rank": 2, "alpha": 3, "targets": ["experts"], **settings})
    model = inject_dora(copy.deepcopy(model).float(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in dora_layers(model).values():
            if layer.lora_B is not None:
                layer.lora_B.normal_(0, 0.3)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * torch.randn_like(layer.magnitude))
    return model


def reference(experts: nn.Module, name: str, layer: DoraExperts, leaves: dict) -> torch.Tensor:
    """V of each expert, in the model's own form, of fp64 leaves."""
    own = experts.get_parameter(name).detach()
    transposed = tuple(own.shape[1:]) != (layer.out_features, layer.in_features)
    W = own.transpose(1, 2) if transposed else own
    A, B, m = (
        None if t is None else leaves.setdefault(f"{name}.{key}", t.detach().double().requires_grad_())
        for key, t in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B), ("magnitude", layer.magnitude))
    )
    V = (
        W
        if A is None
        else W + layer.spec.scaling * (B.view(E, layer.out_features, -1) @ A.view(E, -1, layer.in_features))
    )
    if m is not None:
        n = V.norm(dim=2 if layer.spec.axis == "out" else 1)
        n = n if layer.spec.norm_gradient == "exact" else n.detach()
        g = m.view(E, -1) / n
        V = V * (g[:, :, None] if layer.spec.axis == "out" else g[:, None, :])
    return V.transpose(1, 2) if transposed else V


def first(output):
    return output[0] if isinstance(output, tuple) else output


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, bound: float = 1e-6) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= bound, f"{what}: {error:.2g}"


SETTINGS = {
    "out": {},
    "in": {"magnitude_axis": "in"},
    "exact": {"norm_gradient": "exact"},
    "exact-in": {"norm_gradient": "exact", "magnitude_axis": "in"},
    "lora": {"method": "lora"},
    "magnitude": {"targets": [], "magnitude_only": ["experts"]},
    "down": {"targets": ["experts.down_proj"]},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model_type", TYPES)
def test_forward_and_gradients_are_those_of_the_models_own_loop(model_type, settings):
    top_k = 1 + list(SETTINGS).index(settings) % 4
    own = made(model_type, top_k)
    block, ours = copy.deepcopy(mixture(own)), mixture(adapted(own, **SETTINGS[settings]))
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if top_k == 1 and model_type != "llama4_text":  # which sends every token to all
        assert 0 < len(set(routed(block, x))) < E, "an expert gets no token"

    leaves = {"x": x.clone().requires_grad_()}
    layers = {n: getattr(ours.experts, n) for n in experts_layout(block.experts).shapes}
    values = {f"experts.{n}": reference(block.experts, n, layer, leaves) for n, layer in layers.items()
              if isinstance(layer, DoraExperts)}  # fmt: skip
    rest = {n: p for n, p in block.named_parameters() if not n.startswith("experts.")}
    leaves |= {n: p.requires_grad_() for n, p in rest.items()}
    y = first(functional_call(block, values, (leaves["x"],))).view(3, 32)
    expected = torch.autograd.grad((y * direction).sum(), list(leaves.values()), allow_unused=True)

    found_x = x.float().requires_grad_()
    wanted = {"x": found_x, **{n: p.requires_grad_() for n, p in ours.named_parameters() if n in rest}}
    wanted |= {n: ours.experts.get_parameter(n) for n in leaves if n not in wanted}
    found_y = first(ours(found_x)).view(3, 32)
    found = torch.autograd.grad(
        (found_y * direction.float()).sum(), [wanted[n] for n in leaves], allow_unused=True
    )
    assert_close(found_y, y.detach(), "y")
    for name, a, b in zip(leaves, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if b is not None and b.norm() > 1e-5:
            assert_close(a, b, name)
        elif b is not None:  # of one expert's weight that is brought to 1 the router has no gradient
            assert top_k == 1 and a.norm() < 1e-5, name


def routed(block: nn.Module, x: torch.Tensor) -> list[int]:
    """The experts that the block's router asks for."""
    seen = []
    handle = block.experts.register_forward_pre_hook(lambda _, args: seen.extend(args[1].flatten().tolist()))
    with torch.no_grad():
        block(x)
    handle.remove()
    return seen


IDS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize("model_type", TYPES)
def test_at_first_the_model_is_the_base_and_merged_it_is_the_adapted_one(model_type):
    own = made(model_type, 2)
    config = DoraConfig(rank=2, targets="all-linear")
    fresh = inject_dora(copy.deepcopy(own), config)
    assert any(isinstance(layer, DoraExperts) for layer in dora_layers(fresh).values())
    model = adapted(own, targets="all-linear").double()
    with torch.no_grad():
        base, first_logits, logits = own(IDS).logits, fresh(IDS).logits, model(IDS).logits
        merged = merge_adapter(model)
        assert_close(first_logits, base, "at first")
        assert (logits - base).norm() > 0.01 * base.norm()
        assert_close(merged(IDS).logits, logits, "merged")
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert [type(m) for m in merged.modules()] == [type(m) for m in own.modules()]


def test_checkpointed_copied_and_pickled_models_compute_the_same():
    model = adapted(made("qwen3_moe", 2), dropout=0.3).train()
    cache_norms(model)
    results = []
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - made here
        for checkpointed in (False, True):
            if checkpointed:
                each.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(5)
            trained = [p for p in each.parameters() if p.requires_grad]
            results.append(torch.autograd.grad(each(IDS).logits.square().sum(), trained))
    for grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0], strict=True))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("kind", ["dora", "lora", "exact"])
def test_dropout_of_the_low_rank_path_alone(kind, axis):
    """Three experts, the second without tokens, against a loop in fp64."""
    torch.manual_seed(0)
    T, out, columns, R, s, p = (4, 0, 3), 6, 5, 2, 1.5, 0.4
    W, A, B = torch.randn(3 * out, columns), torch.randn(3 * R, columns), torch.randn(3 * out, R)
    features = 3 * (out if axis == "out" else columns)
    m, n = (None, None) if kind == "lora" else (torch.randn(features), torch.rand(features) + 0.5)
    x = torch.randn(sum(T), columns)
    leaves = [t.requires_grad_() for t in (x, A, B, m) if t is not None]
    if kind == "exact":
        leaves.append(n.requires_grad_())
    torch.manual_seed(1)
    y = adapted_experts(x, Groups.of(T), [W], A, B, m, n, scaling=s, axis=axis, dropout=p)
    torch.manual_seed(1)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p) / (1 - p)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    x64, A64, B64, *rest = wide
    m64 = rest[0] if rest else None
    n64 = rest[1] if len(rest) > 1 else None if n is None else n.double()
    outputs, start = [], 0
    for e, count in enumerate(T):
        tokens, rows, rank = slice(start, start + count), slice(e * out, (e + 1) * out), slice(e * R, (e + 1) * R)
        own = rows if axis == "out" else slice(e * columns, (e + 1) * columns)
        g = 1.0 if m64 is None else m64[own] / n64[own]
        x_e = x64[tokens] * (g if axis == "in" else 1.0)
        h = x_e @ W[rows].double().T + s * (x_e * kept[tokens]) @ A64[rank].T @ B64[rows].T
        outputs.append(h * (g if axis == "out" else 1.0))
        start += count
    expected = torch.cat(outputs)
    assert_close(y, expected, "y")
    direction = torch.randn_like(y)
    grads = zip(
        torch.autograd.grad((y * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), wide),
        strict=True,
    )
    for number, (a, b) in enumerate(grads):
        assert_close(a, b, str(number))
        stacked = a.view(3, -1)[1] if number else a[:0]
        assert (stacked == 0).all(), "what belongs to the expert without tokens"


@pytest.mark.parametrize("layout", [None, Nf4(12, 32, torch.float32)], ids=["dense", "4-bit"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_what_is_kept_for_the_backward(axis, layout):
    """x, z and, for `out`, the output itself, as for DoraLinear; besides, m/n and the parameters."""
    layer = DoraExperts(nn.Parameter(torch.randn(12, 32)), AdapterSpec(2, 1.5, axis=axis), 3)
    layer.reset_parameters()
    layer.norm_is_cached = True
    if layout is not None:
        layer.pack(layout)
    layer.renew_norm(layer.current_norm())
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), layer.norm)}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(70, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x, Groups.of((40, 0, 30)))
    ratio = layer.magnitude.nbytes
    tokens = x.nbytes + 70 * 2 * 4 + (y.nbytes if axis == "out" else 0)
    assert sum(size for place, size in kept.items() if place not in own) == tokens + ratio
    assert (y.data_ptr() in kept) == (axis == "out")


@pytest.mark.parametrize("axis", ["out", "in"])
def test_products_are_computed_in_their_places(axis):
    """No expert's output or dx is copied into the tensor of all tokens."""
    copied = set()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._overloadpacket is torch.ops.aten.copy_:
                copied.add(tuple(args[0].shape))
            return function(*args, **kwargs or {})

    layer = DoraExperts(nn.Parameter(torch.randn(12, 5)), AdapterSpec(2, 1.5, axis=axis), 3)
    layer.reset_parameters()
    x = torch.randn(15, 5, requires_grad=True)
    with Copies():
        layer(x, Groups.of((8, 0, 7))).sum().backward()
    assert (8, 2) in copied, "z is copied"
    assert copied.isdisjoint({(8, 4), (7, 4), (8, 5), (7, 5)})


def test_an_output_that_the_model_writes_into():
    torch.manual_seed(0)
    layer = DoraExperts(nn.Parameter(torch.randn(12, 5)), AdapterSpec(2, 1.5), 3)
    layer.reset_parameters()
    nn.init.normal_(layer.lora_B)
    x, groups, grads = torch.randn(7, 5), Groups.of((4, 0, 3)), []
    for inplace in (False, True):
        y = layer(x, groups)
        y = y.mul_(2) if inplace else y * 2
        grads.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())[1:]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_token_without_an_expert_gets_zeros():
    """A router may send a token nowhere, by a number beyond the last."""
    ours = mixture(adapted(made("qwen3_moe", 2))).experts
    x, weights = torch.randn(3, 32, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    index = torch.tensor([[0, 4], [E, 1], [E, E]])
    y = ours(x, index, weights)
    with_both = ours(x, torch.tensor([[0, 4], [3, 1], [2, 0]]), weights)
    assert (y[2] == 0).all() and (y[1] - with_both[1]).norm() > 0.01 * y[1].norm()
    assert_close(y[0], with_both[0].double(), "y of a token with both")
    dx, dw = torch.autograd.grad(y.sum(), [x, weights])
    assert (dx[2] == 0).all() and (dx[:2] != 0).any(1).all()
    assert (dw == 0).tolist() == [[False, False], [True, False], [True, True]]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ["gate_up_proj", "down_proj"]),
        ("experts", ["gate_up_proj", "down_proj"]),
        ("mlp.experts", ["gate_up_proj", "down_proj"]),
        ("gate_up_proj", ["gate_up_proj"]),
        ("experts.down_proj", ["down_proj"]),
        ("*.experts.*", ["gate_up_proj", "down_proj"]),
        ("*mlp*", ["gate_up_proj", "down_proj"]),
        ("^model.layers.0.mlp.experts.down_proj", ["down_proj"]),
    ],
)
def test_names_of_experts(targets, expected):
    model = adapted(made("qwen3_moe", 2), targets=targets)
    experts = model.model.layers[0].mlp.experts
    assert [k for k in ("gate_up_proj", "down_proj") if isinstance(getattr(experts, k), DoraExperts)] == expected
    others = {"gate_up_proj", "down_proj"}.difference(expected)
    assert all(isinstance(getattr(experts, k), FrozenExperts) for k in others)
    second = model.model.layers[1].mlp.experts
    assert isinstance(second, ExpertsForward) == (not targets.startswith("^"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{key}" for name in model.dora.layers for key in ("lora_A", "lora_B", "magnitude")
    }


def test_shared_experts_are_no_mixture():
    """Their name means the module, never two of its three layers."""
    own = made("deepseek_v3", 2)
    with pytest.raises(UserError, match=r"rank_pattern: 'shared_experts' matches no module"):
        adapted(own, targets="all-linear", rank_pattern={"shared_experts": 1})
    model = adapted(own, targets="all-linear", rank_pattern={"experts": 1})
    ranks = {name: layer.spec.rank for name, layer in dora_layers(model).items() if "expert" in name}
    assert ranks and all((rank == 1) == (".experts." in name) for name, rank in ranks.items())


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("qwen3_moe", {"targets": ["experts.gate_proj"]},
         r"'experts.gate_proj' is half of 'model.layers.0.mlp.experts.gate_up_proj'; name both"),
        ("qwen3_moe", {"targets": ["experts"], "rank": 33},
         r"dora.rank: 33 is larger than the smaller side of 'model.layers.0.mlp.experts.gate_up_proj' \(96, 32\)"),
        ("qwen3_moe", {"targets": ["experts"], "modules_to_save": ["experts"]}, "is trained in full"),
        ("longcat_flash", {"targets": ["experts"]},
         r"'model.layers.0.mlp.experts' is a Longcat.*Experts, whose experts \(gate_up_proj .*down_proj .*attn"),
    ],
)  # fmt: skip
def test_mistakes(model_type, settings, message):
    with pytest.raises(UserError, match=message):
        inject_dora(small_model(model_type), DoraConfig(**{"rank": 2, **settings}))


def test_a_layout_that_its_class_does_not_prove_is_unknown():
    """A forward that computes something else over the same parameters."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.act_fn = 3, nn.SiLU()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
            self.down_proj = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x, index, weights):
            y = torch.zeros_like(x)
            for e in range(self.num_experts):
                token, place = torch.where(index == e)
                gate, up = (x[token] @ self.gate_up_proj[e].T).chunk(2, dim=-1)
                h = (self.act_fn(gate) * self.twist(up)) @ self.down_proj[e].T
                y.index_add_(0, token, h * weights[token, place, None])
            return y

        def twist(self, up):
            return up.clamp(max=0) if getattr(self, "bounded", False) else up

    class Twisted(Experts):
        def twist(self, up):
            return up + 1

    assert experts_layout(Experts()).shapes == {"gate_up_proj": (8, 6), "down_proj": (6, 4)}
    assert experts_layout(Twisted()) is None
    flagged = Experts()
    flagged.bounded = True  # of the class that was proved, but this one asks for more
    assert experts_layout(flagged) is None


@pytest.mark.parametrize("axis", ["out", "in"])
def test_half_precision_is_near(axis):
    """bf16 rounds each value to 8 bits; m/n meets the product before that."""
    model = adapted(made("gpt_oss", 2), magnitude_axis=axis)
    wide, narrow = mixture(model), mixture(copy.deepcopy(model).bfloat16())
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    assert narrow.experts.down_proj.lora_A.dtype == torch.float32
    x = torch.randn(1, 40, 32).bfloat16()
    index, weights = torch.randint(E, (40, 2)), torch.rand(40, 2).bfloat16()
    found = narrow.experts(x[0], index, weights)
    expected = wide.experts(x[0].float(), index, weights.float())
    assert found.dtype == torch.bfloat16
    assert_close(found, expected.double(), "y", 0.02)
