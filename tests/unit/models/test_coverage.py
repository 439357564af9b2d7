"""Which share of a base is adapted, and which warnings say what is not."""

import torch
from torch import nn

from dora_dist import DoraConfig, inject_dora
from dora_dist.models.coverage import coverage
from tests.support.models import deepseek_v3, llama, mixture, qwen2_moe

LAYER = 2 * 12 * 12 + 2 * 4 * 12 + 3 * 12 * 17  # q and o, k and v, the MLP of `llama`
TOTAL = 2 * (LAYER + 2 * 12) + 12 + 2 * 96 * 12


def lines(model: nn.Module, idle=(), **settings) -> list[str]:
    inject_dora(model, DoraConfig(**{"rank": 2, **settings}), None, idle)
    return coverage(model, idle)


def percent(part: int, total: int = TOTAL) -> str:
    return f"{100 * part / total:.1f} %"


def test_the_share_counts_each_weight_once():
    assert lines(llama(), targets="all-linear") == [f"adapted: {percent(2 * LAYER)} of the base's weights"]
    tied = lines(llama(tie_word_embeddings=True), targets=["all-linear", "embed_tokens", "lm_head"])
    once = TOTAL - 96 * 12
    assert tied == [f"adapted: {percent(2 * LAYER + 96 * 12, once)} of the base's weights"]
    saved = lines(llama(), targets="all-linear", modules_to_save=["lm_head"])
    assert saved == [f"adapted: {percent(2 * LAYER)} of the base's weights, {percent(96 * 12)} trained in full"]


def test_what_is_large_and_not_adapted_is_named():
    (_, told) = lines(llama(intermediate_size=64), targets=["q_proj"])
    total = TOTAL + 2 * 3 * 12 * 47
    shares = ", ".join(f"{kind} ({percent(2 * 12 * 64, total)})" for kind in ("gate_proj", "up_proj", "down_proj"))
    assert told == (
        f"warning: not adapted, of the base's weights: {shares}; to adapt them too, add gate_proj, up_proj, "
        "down_proj to dora.targets"
    )
    # What takes no part in the loss is not to be named.
    idle = {n for n, _ in llama().named_modules() if n.endswith(("gate_proj", "up_proj", "down_proj"))}
    assert len(lines(llama(intermediate_size=64), idle, targets=["q_proj"])) == 1


def test_experts_are_named_as_targets_know_them():
    total = sum(p.numel() for p in mixture("qwen3_moe").parameters())
    up, down = 2 * 3 * 96 * 32, 2 * 3 * 32 * 48  # of two layers' three experts
    told = "to adapt them too, add"
    whole = lines(mixture("qwen3_moe"), targets=["q_proj"])[-1]
    assert f"experts ({percent(up + down, total)})" in whole and f"{told} experts to dora.targets" in whole
    (share, half) = lines(mixture("qwen3_moe"), targets=["experts.down_proj"])
    assert share == f"adapted: {percent(down, total)} of the base's weights"
    assert f"experts.gate_up_proj ({percent(up, total)}); {told} experts.gate_up_proj to dora.targets" in half
    assert len(lines(mixture("qwen3_moe"), targets="all-linear")) == 1
    lines(mixture("qwen3_moe"), targets=["experts.gate_up_proj"])  # the name is a target


def test_what_is_left_out_is_listed():
    _, idle, small, *_ = lines(qwen2_moe(), {"model.layers.1.self_attn.q_proj"}, targets="all-linear")
    assert idle == "left out, as they take no part in the loss of text: model.layers.*.self_attn.q_proj"
    assert small == "left out, as a side is smaller than the rank: model.layers.*.mlp.shared_expert_gate (2)"


def test_half_of_what_is_one_matrix_is_told():
    _, half, *_ = lines(deepseek_v3(), targets=["up_proj"])
    assert half == (
        "left out, as gate_proj and up_proj are one matrix there, and only one of them is named: "
        "model.layers.*.mlp.experts.gate_up_proj (2)"
    )


def test_what_no_layer_is_for_is_told():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.zeros(30, 6))

    model = nn.ModuleDict({"tables": nn.ModuleList([Table()]), "linear": nn.Linear(6, 6)})
    _, told = lines(model, targets="all-linear")
    assert told == (
        f"warning: tables (Table) holds {percent(180, 222)} of the base's weights and is not adapted: DoRA has no "
        "layer for it"
    )


def test_a_router_loss_that_is_asked_for_is_told():
    model = mixture("qwen3_moe")
    assert len(lines(model, targets="all-linear")) == 1
    model.config.output_router_logits = True
    assert "output_router_logits" in coverage(model, ())[-1]
