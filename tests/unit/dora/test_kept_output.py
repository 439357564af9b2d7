"""A backward reads what the layer gave out; a model may have written into that, wherever autograd looks away."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_dist import DoraConfig, inject_dora
from dora_dist.config import QuantConfig
from dora_dist.dora import functional
from dora_dist.dora.kept_output import is_overwritten
from dora_dist.models.quantize import pack_linears
from tests.support.peft import IDS


class Writes(nn.Module):
    """Writes into a layer's output, or makes the same anew."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.layer, self.after = nn.Linear(32, 32, bias=False), nn.Linear(32, 8)

    def forward(self, x):
        y = self.layer(x)
        y = y.mul_(3).add_(x).relu_() if self.in_place else (y * 3 + x).relu()
        return self.after(y) ** 2


def gradients(in_place, way, four_bit):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if four_bit else torch.float32
    model = inject_dora(Writes(in_place).to(dtype), DoraConfig(rank=2, targets=["layer"]))
    if four_bit:
        pack_linears(model, QuantConfig(scheme="nf4", skip=["after"]))
    with torch.no_grad():
        model.layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
        model.layer.magnitude.uniform_(1, 2, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    run = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    y = checkpoint(run, x, use_reentrant=False) if way == "checkpointed" else run(x)
    y.sum().backward()
    return [p.grad for p in (x, model.layer.lora_A, model.layer.lora_B, model.layer.magnitude)]


@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
def test_gradients_are_right_where_a_model_writes_into_a_layers_output(way, four_bit):
    """The backward reads that output. Checkpointing and compilation keep autograd from noticing."""
    for written, whole in zip(gradients(True, way, four_bit), gradients(False, way, four_bit), strict=True):
        assert torch.equal(written, whole)


@pytest.mark.parametrize(("kind", "written"), [("Olmo", 3), ("Mixtral", 0), ("Qwen3Moe", 0)])
def test_only_outputs_that_were_written_into_are_computed_anew(kind, written, monkeypatch):
    """OLMo's q, k and v, which it clamps. Mixtral's and Qwen3-MoE's routers add to their loss in place."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 1}  # fmt: skip
    more = {"clip_qkv": 0.01} if kind == "Olmo" else {"output_router_logits": True, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    inject_dora(model, DoraConfig(rank=2, targets="all-linear"))
    answers = []

    def ask(kept):
        answers.append(is_overwritten(kept))
        return answers[-1]

    monkeypatch.setattr(functional, "is_overwritten", ask)
    model(input_ids=IDS[:, :8] % 32, labels=IDS[:, :8] % 32).loss.backward()
    assert len(answers) >= 4 and sum(answers) == written
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
