"""Choosing modules by name, what injection changes in a model and what it leaves as it was."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

from dora_dist import DoraConfig, DoraEmbedding, DoraLinear, UserError, inject_dora
from dora_dist.dora.norm_cache import attach_norm_refresh, dora_layers, initialize_adapters
from tests.support.models import bert, deepseek_v3, distilbert, gpt2, llama, mixture, qwen2_moe
from tests.support.peft import FIRST_Q, IDS, LLAMA_TARGETS

LINEARS = [f"model.layers.{i}.{part}" for i in (0, 1) for part in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)]  # fmt: skip


def inject(model: nn.Module, targets, **settings) -> nn.Module:
    return inject_dora(model, DoraConfig(**{"rank": 2, "alpha": 4, "targets": targets, **settings}))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (LLAMA_TARGETS, LINEARS),
        ("all-linear", LINEARS),
        (["all-linear", "lm_head"], [*LINEARS, "lm_head"]),
        ("q_proj", [n for n in LINEARS if n.endswith("q_proj")]),
        (["0.self_attn.q_proj"], [FIRST_Q]),
        ([FIRST_Q], [FIRST_Q]),
        (["^" + FIRST_Q], [FIRST_Q]),
        (["model.layers.1.*"], LINEARS[7:]),
        (["*.[qk]_proj", "mlp.up_proj"], [n for n in LINEARS if n[-6:] in ("q_proj", "k_proj") or "up" in n]),
        (["embed_tokens"], ["model.embed_tokens"]),
    ],
)
def test_targets(targets, expected):
    model = inject(llama(), targets)
    assert list(model.dora.layers) == sorted(expected, key=list(dict(model.named_modules())).index)
    adapted = {n for n, m in model.named_modules() if isinstance(m, DoraLinear | DoraEmbedding)}
    assert adapted == set(expected)


@pytest.mark.parametrize(
    ("make", "heads"),
    [(bert, {"classifier"}), (distilbert, {"classifier", "pre_classifier"}), (gpt2, {"lm_head"})],
)
def test_all_linear_leaves_the_head_alone(make, heads):
    model = inject(make(), "all-linear")
    plain = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert plain == heads


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_porj"]}, r"dora.targets: 'q_porj' matches no module; did you mean 'q_proj'"),
        ({"targets": ["q_proj", "nonsense"]}, r"dora.targets: 'nonsense' matches no module; valid: .*k_proj"),
        ({"targets": ["layers.0.self_atn.q_proj"]}, r"did you mean 'model.layers.0.self_attn.q_proj'"),
        ({"targets": ["layers.9.*"]}, r"dora.targets: 'layers.9.\*' matches no module"),
        ({"targets": ["*norm*"]}, r"dora.targets: '\*norm\*' matches no module"),
        ({"targets": ["mlp"]}, r"is a LlamaMLP; .*such as 'model.layers.0.mlp.gate_proj'; '\*.mlp.\*' means"),
        ({"targets": ["norm"]}, r"is a LlamaRMSNorm; targets are Linear"),
        ({"targets": []}, r"dora.targets: nothing to adapt"),
        ({"rank": 13}, r"dora.rank: 13 is larger than the smaller side of 'model.*' \(.*\); at most"),
        ({"rank_pattern": {"k_proj": 5}}, r"dora.rank: 5 .*k_proj' \(4, 12\); at most 4"),
        ({"rank_pattern": {"q_porj": 2}}, r"dora.rank_pattern: 'q_porj' matches no module.*q_proj"),
        ({"alpha_pattern": {"lm_head": 2}}, r"dora.alpha_pattern: 'lm_head' matches no module"),
        ({"magnitude_only": ["vproj"]}, r"dora.magnitude_only: 'vproj' .*'v_proj'"),
        ({"modules_to_save": ["lm_heat"]}, r"dora.modules_to_save: 'lm_heat' .*'lm_head'"),
        (
            {"modules_to_save": ["mlp"], "targets": ["up_proj"]},
            r"'model.layers.0.mlp.up_proj' is trained in full",
        ),
        ({"targets": ["all-linear"], "modules_to_save": ["classifier"]}, "matches no module"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_untouched(settings, message):
    model = llama()
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        inject_dora(model, DoraConfig(**{"rank": 2, "targets": LLAMA_TARGETS, **settings}))
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert not hasattr(model, "dora")


def test_a_glob_means_what_can_be_adapted_and_is_not_trained_in_full():
    model = inject(llama(), ["model.*"], modules_to_save=["layers.1"], magnitude_only=["*.up_proj"])
    assert set(model.dora.layers) == {"model.embed_tokens", *LINEARS[:7]}
    assert model.model.layers[0].mlp.up_proj.lora_A is None


class Renamed(nn.Linear):
    pass


class Written(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (0.1 * torch.randn_like(x[..., :1]) if self.training else 0)


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [Renamed, Written, FalconLinear])
def test_subclasses_that_compute_the_same_are_adapted(cls, bias):
    with torch.device("meta"):
        assert inject(nn.Sequential(cls(6, 4, bias)), "all-linear").dora.layers == ("0",)
    plain = cls(6, 4, bias).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    wanted = plain(x)
    (layer,) = inject(nn.Sequential(plain), "all-linear")
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert layer.weight is plain.weight and layer.bias is plain.bias


def other_linears() -> list[nn.Module]:
    grouped = DeepseekV4GroupedLinear(4, 8, n_groups=2)
    noted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    return [Doubled(4, 4), Noisy(4, 4), Scaled(4, 4), Router(4, 4), grouped, noted]


@pytest.mark.parametrize("other", other_linears(), ids=lambda m: type(m).__name__)
def test_subclasses_that_compute_something_else_are_refused(other):
    model = nn.Sequential(nn.Linear(4, 4), other)
    told = f"'1' is a {type(other).__name__}, which does not compute as nn.Linear does; targets are"
    with pytest.raises(UserError, match=told):
        inject(model, ["1"])
    assert inject(model, "all-linear").dora.layers == ("0",)


def test_what_is_read_past_its_forward_or_rewritten_is_refused():
    with pytest.raises(UserError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        inject(nn.MultiheadAttention(4, 2), ["out_proj"])
    with pytest.raises(UserError, match="is a Embedding"):  # it rewrites its weight in each forward
        inject(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), ["0"])


GATES = tuple(f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1))  # [1, 12]


@pytest.mark.parametrize("settings", [{"targets": "all-linear"}, {"targets": ["*.mlp.shared_expert*", "q_proj"]}])
def test_a_layer_smaller_than_the_rank_is_left_out_and_listed(settings):
    model = inject(qwen2_moe(), **settings)
    assert model.dora.too_small == GATES and not set(GATES).intersection(model.dora.layers)
    assert any(name.endswith("shared_expert.up_proj") for name in model.dora.layers)
    assert type(model.get_submodule(GATES[0])) is nn.Linear
    one = inject(qwen2_moe(), **settings, rank_pattern={"shared_expert_gate": 1})
    assert one.dora.too_small == () and set(GATES) < set(one.dora.layers)
    alone = inject(qwen2_moe(), **settings, magnitude_only=[GATES[1]])
    assert alone.dora.too_small == GATES[:1] and GATES[1] in alone.dora.layers


@pytest.mark.parametrize("pattern", ["shared_expert_gate", "*.shared_expert_gate", "^" + GATES[0]])
def test_a_layer_smaller_than_the_rank_is_refused_where_it_was_named(pattern):
    with pytest.raises(
        UserError, match=r"dora.rank: 2 is larger than the smaller side of '.*gate' \(1, 12\); at most 1"
    ):
        inject(qwen2_moe(), ["all-linear", pattern])


@pytest.mark.parametrize("made", [deepseek_v3, partial(mixture, "qwen3_moe")], ids=["deepseek", "qwen"])
def test_gate_and_up_mean_what_holds_both_in_experts(made):
    """A Llama's targets, the default, are whole in a mixture."""
    found = inject(made(), ["*_a_proj", "o_proj", "gate_proj", "up_proj", "down_proj"][made != deepseek_v3 :])
    wanted = inject(made(), ["*_a_proj", "o_proj", "*.mlp.*"][made != deepseek_v3 :])
    assert found.dora.layers == wanted.dora.layers
    assert any(name.endswith("experts.gate_up_proj") for name in found.dora.layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ["gate_proj", "q_proj"]},
            r"targets: 'gate_proj' is half of '.*gate_up_proj'; name both",
        ),
        ({"rank_pattern": {"gate_proj": 1, "up_proj": 2}}, "rank_pattern: gate_proj and up_proj are one matrix"),
    ],
)
def test_half_of_what_is_one_in_experts_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        inject(mixture("qwen3_moe"), **{"targets": "all-linear", **settings})
    model = inject(mixture("qwen3_moe"), "all-linear", rank_pattern={"gate_proj": 1, "experts.up_proj": 1})
    assert {layer.spec.rank for name, layer in dora_layers(model).items() if "gate_up" in name} == {1}


def test_injecting_twice_is_refused():
    model = inject(llama(), ["q_proj"])
    with pytest.raises(UserError, match="once per model"):
        inject(model, ["k_proj"])


def test_a_sharded_model_is_refused():
    model = llama()
    model.lm_head.weight.placements = (SimpleNamespace(),)  # what a DTensor has
    with pytest.raises(UserError, match="sharded already"):
        inject(model, ["q_proj"])
    assert not hasattr(model, "dora")


def test_weights_are_shared_and_frozen():
    model = llama(attention_bias=True)
    before = dict(model.named_parameters())
    inject(model, ["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    trained = {n for n, p in after.items() if p.requires_grad}
    own = {"lora_A", "lora_B", "magnitude"}
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + ["model.embed_tokens"]
    assert trained == {f"{layer}.{part}" for layer in layers for part in own} | {"lm_head.weight"}


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_weights_stay_tied(targets):
    model = inject(llama(tie_word_embeddings=True), targets)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_module_used_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    model = inject(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), ["a", "b.0"])
    assert model["a"] is model["b"][0] and isinstance(model["a"], DoraLinear)


def test_the_training_flag_is_kept():
    assert not inject(llama().eval(), ["q_proj"]).get_submodule(FIRST_Q).training


def test_on_the_meta_device_values_come_later():
    with torch.device("meta"):
        model = llama()
    inject(model, ["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    layer = model.get_submodule(FIRST_Q)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(dict(llama().named_parameters()), strict=False)
    initialize_adapters(model, seed=0)
    assert layer.lora_A.abs().sum() > 0 and torch.equal(layer.magnitude, layer.current_norm())


def test_what_it_adapts_depends_on_patterns_in_order():
    model = inject(
        llama(), ["q_proj", "v_proj"], rank=3, alpha=6,
        rank_pattern={"layers.1.self_attn.q_proj": 4, "q_proj": 1}, alpha_pattern={"*.0.*": 12}, rslora=True,
    )  # fmt: skip
    specs = {n.removeprefix("model.layers."): model.get_submodule(n).spec for n in model.dora.layers}
    assert {n: s.rank for n, s in specs.items()} == {
        "0.self_attn.q_proj": 1, "0.self_attn.v_proj": 3, "1.self_attn.q_proj": 4, "1.self_attn.v_proj": 3,
    }  # fmt: skip
    assert specs["0.self_attn.v_proj"].scaling == pytest.approx(12 / 3**0.5)
    assert specs["1.self_attn.q_proj"].scaling == pytest.approx(6 / 4**0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save_train_in_fp32_inside_a_bf16_model(tied):
    model = llama(tie_word_embeddings=tied).bfloat16()
    saved = ["embed_tokens", "lm_head"]
    inject(model, ["q_proj"], modules_to_save=saved)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert (embedding is head) == tied
    assert embedding.dtype == head.dtype == torch.float32
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits.dtype == torch.bfloat16 and seen == [torch.bfloat16]
    output.loss.backward()
    assert head.grad.dtype == torch.float32 and head.grad.abs().sum() > 0 and embedding.grad.abs().sum() > 0


def test_a_classifier_trained_in_full_follows_a_later_to():
    """`model.to(bfloat16)` takes the head along, as it does any plain module; it still runs."""
    model = inject(distilbert().bfloat16(), "all-linear", modules_to_save=["pre_classifier", "classifier"])
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_half_of_a_tie_cannot_be_trained_in_full(name):
    with pytest.raises(UserError, match="is tied to .*; name both"):
        inject(llama(tie_word_embeddings=True), ["q_proj"], modules_to_save=[name])


def test_an_injected_model_trains():
    model = inject(llama(), "all-linear", rank=3)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    attach_norm_refresh(model, optimizer)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
