"""The losses by chunks against those of whole logits: values and every gradient, heads of all kinds."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from dora_dist.config import DoraConfig
from dora_dist.dora.inject import inject_dora
from dora_dist.dora.layers import AdapterSpec, DoraLinear
from dora_dist.models import head_loss as loss_module
from dora_dist.models.head_loss import (
    HeadLoss,
    attach_head_loss,
    has_plain_logits,
    row_sums,
    summed_loss,
    supervised_positions,
    token_losses,
)
from dora_dist.quant.modules import PackedLinear
from dora_dist.quant.nf4 import Nf4
from tests.support.rounding import MODEL, assert_near

B, T, H, V = 2, 13, 24, 40
SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Several chunks, the last one smaller."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 5 * 4 * V)
    monkeypatch.setattr(loss_module, "_LEAST_ROWS", 1)


def make_head(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(H, V, bias=kind != "linear", dtype=dtype)
    if kind == "adapted":
        head = DoraLinear(linear.weight, linear.bias, AdapterSpec(3, 2.0))
        head.reset_parameters()
        nn.init.normal_(head.lora_B, std=0.2)
        return head
    linear.requires_grad_(kind == "trained")
    return PackedLinear(linear.weight, linear.bias, Nf4(V, H, dtype)) if kind == "packed" else linear


def losses_and_gradients(head, hidden, targets, by_chunks, factor=None):
    """[N], and the gradients of their sum with a factor on each."""
    hidden = hidden.clone().requires_grad_()
    positions = supervised_positions(targets)
    if by_chunks:
        with HeadLoss(head, V).of(positions, targets.flatten()[positions]):
            losses = head(hidden)
    else:
        losses = token_losses(head(hidden).flatten(0, 1), targets.flatten())[positions]
    factors = torch.linspace(-1, 3, len(losses)) if factor is None else factor
    trained = [p for p in head.parameters() if p.requires_grad]
    return [losses, *torch.autograd.grad((losses * factors).sum(), [hidden, *trained])]


@pytest.mark.parametrize("supervised", ["all", "some", "none"])
@pytest.mark.parametrize("kind", ["linear", "bias", "packed", "trained", "adapted"])
def test_it_is_the_loss_of_whole_logits(kind, supervised):
    head = make_head(kind, torch.float32)
    hidden, targets = 2 * torch.randn(B, T, H), torch.randint(V, (B, T))
    if supervised != "all":
        targets[:, ::2] = -100
    if supervised == "none":
        targets[:] = -100
    got = losses_and_gradients(head, hidden, targets, by_chunks=True)
    want = losses_and_gradients(copy.deepcopy(make_head(kind, torch.float32)), hidden, targets, by_chunks=False)
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs, B * T + H + V)


def test_sums_over_rows():
    targets = torch.randint(V, (3, T))
    targets[0, 2:], targets[1], targets[2, ::3] = -100, -100, -100
    values = torch.randn(int((targets != -100).sum()), requires_grad=True)
    got, want, start = row_sums(values, targets), [], 0
    for row in targets:
        end = start + int((row != -100).sum())
        want.append(values[start:end].sum())
        start = end
    torch.testing.assert_close(got, torch.stack(want))
    gradient = torch.autograd.grad(got @ torch.tensor([1.0, 2.0, 3.0]), values)[0]
    assert gradient.equal(torch.tensor([1.0] * 2 + [3.0] * (len(values) - 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_no_worse_than_those_of_whole_logits(dtype):
    hidden, targets = torch.randn(B, T, H), torch.randint(V, (B, T))
    exact = losses_and_gradients(make_head("linear", dtype).double(), hidden.to(dtype).double(), targets, False)
    errors = [
        (
            losses_and_gradients(make_head("linear", dtype), hidden.to(dtype), targets, by_chunks)[1].double()
            - exact[1]
        )
        for by_chunks in (True, False)
    ]
    assert errors[0].norm() <= 1.5 * errors[1].norm()  # saved in 16 bits: rounded once more
    losses = losses_and_gradients(make_head("linear", dtype), hidden.to(dtype), targets, True)[0]
    assert losses.dtype == torch.float32


def test_the_factor_of_a_16_bit_gradient_is_not_rounded():
    factor = 1 + 2.0**-9  # halfway between two numbers of bf16
    hidden, targets = torch.randn(B, T, H, dtype=torch.bfloat16), torch.randint(V, (B, T))
    head = make_head("linear", torch.bfloat16)
    once = losses_and_gradients(head, hidden, targets, True, 1.0)[1]
    scaled = losses_and_gradients(head, hidden, targets, True, factor)[1]
    assert scaled.equal((once.float() * factor).bfloat16())


def test_no_tensor_holds_all_logits():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == V:
                self.largest = max(self.largest, out.numel() // V)
            return out

    targets = torch.randint(V, (B, 10 * H))
    for kind in ("linear", "trained"):
        with Watch() as watch:
            losses_and_gradients(make_head(kind, torch.float32), torch.randn(B, 10 * H, H), targets, True)
        assert watch.largest == H  # the weight itself


CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "tied": LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(
        vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, dropout=0.0,
        word_embed_proj_dim=16,
    ),
    "moe": Qwen3MoeConfig(**SMALL, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "gemma2": Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=5.0),
    "cohere": CohereConfig(**SMALL, num_attention_heads=2, bos_token_id=1, eos_token_id=2, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, num_attention_heads=2, logits_scaling=4.0, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
CHANGED = ("gemma2", "cohere", "granite")


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_change_their_logits_are_found(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    forwards = [module.forward for module in model.modules()]
    assert has_plain_logits(model) == (name not in CHANGED)
    assert [module.forward for module in model.modules()] == forwards
    assert model.training


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CHANGED])
def test_the_loss_of_a_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa").eval()
    inject_dora(model, DoraConfig(rank=2, targets="all-linear"))
    ids, targets = torch.randint(3, V, (B, T)), torch.randint(V, (B, T))
    targets[:, :5] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    want = summed_loss(model(ids).logits, targets)
    want_gradients = torch.autograd.grad(want, trained)
    head_loss = attach_head_loss(model)
    got = head_loss.losses(model, {"input_ids": ids}, targets).sum()
    assert_near(got, want, B * T + H + V)
    for ours, theirs in zip(torch.autograd.grad(got, trained), want_gradients, strict=True):
        assert_near(ours, theirs, MODEL)
    assert model(ids).logits.shape == (B, T, V)  # and outside it is what it was


def test_a_head_in_fp32_inside_a_16_bit_model_keeps_its_logits():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).bfloat16()
    inject_dora(model, DoraConfig(rank=2, targets=["q_proj"], modules_to_save=["lm_head"]))
    assert attach_head_loss(model) is None
