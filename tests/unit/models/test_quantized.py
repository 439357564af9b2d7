"""load_quantized: the 4-bit base of a run, for loops that are not ours."""

import copy

import pytest
import torch

from dora_dist import DoraConfig, QuantConfig, UserError, inject_dora, load_adapter, load_quantized, merge_adapter
from dora_dist.dora.experts import DoraExperts
from dora_dist.dora.layers import DoraLinear
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.quant.modules import FrozenExperts, PackedLinear
from tests.support.models import gpt2, mixture, save_model
from tests.unit.models.test_merge import NF4, logits

QUANT = QuantConfig(**NF4)
BASES = {
    "llama": (None, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "qwen3_moe": (lambda: mixture("qwen3_moe"), ["experts", "q_proj"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_the_base_of_a_run(run, tiny_llama, name, dtype, tmp_path):
    """With the run's adapter it computes what the run does, and merges to the same model."""
    make, targets = BASES[name]
    path = tiny_llama if make is None else save_model(make(), tmp_path / "base")
    text = str(dtype).removeprefix("torch.")
    _, built = run(path, dtype=text, quant=NF4, attention="eager", rank=2, targets=targets)
    model = load_quantized(path, QUANT, dtype=dtype, attention="eager")
    assert any(isinstance(m, PackedLinear | FrozenExperts) for m in model.modules()) and not model.training
    load_adapter(model, tmp_path / "run" / "adapter")
    assert torch.equal(logits(model), logits(built))
    kinds = [[type(layer) for layer in dora_layers(each).values()] for each in (model, built)]
    assert kinds[0] == kinds[1]
    assert torch.equal(logits(merge_adapter(model)), logits(merge_adapter(built)))


def test_injection_starts_at_the_base(tiny_llama):
    model = load_quantized(tiny_llama, dtype=torch.float32)
    base = copy.deepcopy(model)
    inject_dora(model, DoraConfig(rank=2, targets="all-linear"))
    layers = dora_layers(model).values()
    assert (
        all(isinstance(layer, DoraLinear) and layer.layout is not None for layer in layers) and len(layers) == 14
    )
    torch.testing.assert_close(logits(model), logits(base))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_all_linear_means_experts(tmp_path):
    model = load_quantized(save_model(mixture("deepseek_v3"), tmp_path))
    inject_dora(model, DoraConfig(rank=2, targets="all-linear"))
    assert not any(isinstance(m, FrozenExperts) for m in model.modules())
    assert sum(isinstance(m, DoraExperts) for m in model.modules()) == 2


def test_a_new_head_is_alike_everywhere(tiny_llama):
    heads = [load_quantized(tiny_llama, task="sequence_classification", num_labels=3).score for _ in range(2)]
    assert torch.equal(heads[0].weight, heads[1].weight) and heads[0].weight.std() > 0


def test_refusals(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="'nf4'"):
        load_quantized(tiny_llama, QuantConfig())
    with pytest.raises(UserError, match="no directory"):
        load_quantized("./nowhere")
    model = load_quantized(tiny_llama, QuantConfig(scheme="nf4", skip=[]))
    with pytest.raises(UserError, match=r"'lm_head' is in 4 bits.*quant\.skip"):
        inject_dora(model, DoraConfig(rank=2, targets=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match="rank: 20 is larger"):
        inject_dora(model, DoraConfig(rank=20, targets=["q_proj"]))
    with pytest.raises(UserError, match="matches no module"):
        inject_dora(model, DoraConfig(rank=2, targets=["query"]))
