"""iter_merged_weights: the tensors of the merged model as a checkpoint has them, out of the live one."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dora_dist import DoraConfig, UserError, inject_dora, iter_merged_weights, merge_adapter
from dora_dist.config import QuantConfig
from dora_dist.dora import merged
from dora_dist.dora.norm_cache import cache_norms, dora_layers
from dora_dist.models.quantize import pack_linears
from tests.support.engine import StandInEngine
from tests.support.models import gpt2, llama, mixture
from tests.support.peft import CASES, logits, ours, randomized
from tests.support.rounding import MODEL, assert_near
from tests.support.small import small_model


def kept(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in iter_merged_weights(model, **options)}


def saved(model: nn.Module, directory) -> dict[str, torch.Tensor]:
    """What transformers writes of a copy of `model` that was merged."""
    merge_adapter(copy.deepcopy(model)).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def check(model: nn.Module, directory) -> set[str]:
    """The names of what the adapter changes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want, everything, changed = saved(model, directory), kept(model, changed_only=False), kept(model)
    assert everything.keys() == want.keys()
    for name, tensor in want.items():
        assert everything[name].dtype == tensor.dtype and torch.equal(everything[name], tensor), name
    assert all(torch.equal(tensor, want[name]) for name, tensor in changed.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return set(changed)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_the_merged_model(name, tmp_path):
    model = randomized(ours(CASES[name]))
    changed = check(model, tmp_path / "merged")
    CASES[name].make().save_pretrained(tmp_path / "base")
    base, want = (load_file(tmp_path / kind / "model.safetensors") for kind in ("base", "merged"))
    assert changed >= {key for key in want if key not in base or not torch.equal(want[key], base[key])}
    assert len(changed) < len(want)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_four_bits(kind, dtype, tmp_path):
    model = randomized(inject_dora(mixture(kind).to(dtype), DoraConfig(rank=2, targets="all-linear")))
    pack_linears(model, QuantConfig(scheme="nf4"))
    check(model, tmp_path)


def test_what_is_in_four_bits_and_not_adapted():
    """It is not what the checkpoint holds."""
    model = randomized(inject_dora(mixture("qwen3_moe"), DoraConfig(rank=2, targets=["q_proj"])))
    pack_linears(model, QuantConfig(scheme="nf4", skip=["o_proj", "lm_head"]))
    changed = kept(model)
    assert len(changed) == 2 * (3 + 3 * 3)  # q, k, v, and three experts' three
    for layer in (0, 1):
        block = model.get_submodule(f"model.layers.{layer}")
        own = block.self_attn.k_proj.matrix[:]
        assert torch.equal(changed[f"model.layers.{layer}.self_attn.k_proj.weight"], own)
        down = block.mlp.experts.down_proj.matrix[:].chunk(3)
        for expert, rows in enumerate(down):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            assert torch.equal(changed[name], rows)


def test_against_plain_mathematics():
    model = randomized(inject_dora(llama(), DoraConfig(rank=3, alpha=7, targets=["q_proj"])))
    cache_norms(model)
    for layer in dora_layers(model).values():
        layer.lora_A.data.mul_(1.5)  # what is cached is old now
    found = kept(model)
    for name, layer in dora_layers(model).items():
        V = layer.weight.double() + 7 / 3 * layer.lora_B.double() @ layer.lora_A.double()
        want = layer.magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        assert_near(found.pop(f"{name}.weight"), want, layer.in_features)
    assert not found


def test_a_fused_projection_that_the_model_splits(tmp_path):
    """Of one tensor in the checkpoint several are made; then the whole of it comes."""
    torch.manual_seed(0)
    model = inject_dora(small_model("hrm_text").eval(), DoraConfig(rank=2, targets=["q_proj", "gate_proj"]))
    check(randomized(model), tmp_path)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: mixture("mixtral")], ids=["llama", "gpt2", "mixtral"])
def test_an_engine_computes_what_the_model_does(make, tmp_path):
    make().save_pretrained(tmp_path / "base")
    engine = StandInEngine(tmp_path / "base")
    model = randomized(inject_dora(make(), DoraConfig(rank=3, targets="all-linear")))
    engine.load_weights(iter_merged_weights(model))
    assert_near(logits(engine.model(tmp_path / "engine")), logits(model), MODEL)


def test_each_weight_is_merged_once_and_let_go(monkeypatch):
    model = inject_dora(mixture("qwen3_moe"), DoraConfig(rank=2, targets=["experts", "q_proj"]))
    made, merge = [], merged.merge_
    monkeypatch.setattr(merged, "merge_", lambda *args: made.append(args[0]) or merge(*args))
    kept(model)
    blocks = sum(layer.num_experts for layer in dora_layers(model).values())
    assert len(made) == blocks


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda block: torch.compile(block, backend="eager")])
def test_names_know_no_wrappers(wrap):
    model = inject_dora(mixture("qwen3_moe"), DoraConfig(rank=2, targets="all-linear"))
    want = kept(model)
    layers = model.model.layers
    layers[0] = wrap(layers[0])
    got = kept(model)
    assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_refusals():
    with pytest.raises(UserError, match="inject_dora"):
        iter_merged_weights(llama())
    model = inject_dora(llama(), DoraConfig(rank=2, targets=["q_proj"]))
    with pytest.raises(UserError, match=r"\.module"):
        iter_merged_weights(nn.DataParallel(model))
