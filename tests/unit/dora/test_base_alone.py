"""adapters_off: the base model to the bit, and back."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_dist import DoraConfig, UserError, adapters_off, inject_dora
from dora_dist.config import QuantConfig
from dora_dist.dora.inject import set_module
from dora_dist.dora.norm_cache import cache_norms, dora_layers
from dora_dist.models.quantize import pack_linears
from dora_dist.quant.modules import BaseWeight, PackedLinear
from tests.support.models import gpt2
from tests.support.peft import CASES, logits, ours, randomized
from tests.support.rounding import MODEL, assert_near

PLAIN = [name for name, case in CASES.items() if not case.ours.get("modules_to_save")]


def packed_base(base: nn.Module, model: nn.Module) -> nn.Module:
    """`base` with what is in 4 bits in `model`, and no adapter."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseWeight) and module.layout is not None:
            own = base.get_submodule(name)
            set_module(base, name, PackedLinear(own.weight, own.bias, module.layout, module.transposed))
    return base


def turned_off(model: nn.Module) -> torch.Tensor:
    with adapters_off(model):
        return logits(model)


@pytest.mark.parametrize("name", PLAIN)
def test_the_base_model_to_the_bit(name):
    case = CASES[name]
    want, model = logits(case.make()), randomized(ours(case))
    adapted = logits(model)
    assert not torch.allclose(adapted, want, atol=1e-2)
    if name == "gpt_oss experts":  # the class sums a token's experts and their biases in another order
        assert_near(turned_off(model), want, MODEL)
    else:
        assert torch.equal(turned_off(model), want)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize(
    "settings", [{"magnitude_axis": "in", "dropout": 0.5}, {"method": "lora", "dropout": 0.5}]
)
def test_in_training_with_dropout_and_cached_norms(settings):
    want = logits(gpt2())
    model = randomized(inject_dora(gpt2(), DoraConfig(rank=3, targets=["all-linear", "wte"], **settings)))
    cache_norms(model)
    for layer in dora_layers(model).values():
        layer.train()
    assert torch.equal(turned_off(model), want)


@pytest.mark.parametrize("name", ["llama biases", "gpt2 one block"])
def test_in_four_bits(name):
    model = randomized(ours(CASES[name]))
    pack_linears(model, QuantConfig(scheme="nf4"))
    assert torch.equal(turned_off(model), logits(packed_base(CASES[name].make(), model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_and_under_autocast(dtype):
    case = CASES["llama biases"]
    base, model = case.make().to(dtype), randomized(ours(case)).to(dtype)
    assert torch.equal(turned_off(model), logits(base))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(turned_off(model), logits(base))
        assert torch.equal(turned_off(randomized(ours(case))), logits(case.make()))


def test_compiled():
    torch._dynamo.reset()
    layer, x = nn.Linear(6, 8), torch.ones(3, 6)
    want = layer(x)
    model = randomized(inject_dora(nn.Sequential(layer), DoraConfig(rank=2, targets=["0"])))
    adapted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        with adapters_off(model):
            assert torch.equal(compiled(x), want)
        assert torch.equal(compiled(x), adapted)


def test_contexts_nest():
    model = randomized(ours(CASES["llama"]))
    adapted = logits(model)
    with adapters_off(model):
        base = logits(model)
        with adapters_off(model):
            assert torch.equal(logits(model), base)
            twin = copy.deepcopy(model)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(twin), adapted), "a copy outlives the context"


def test_an_exception_ends_it():
    model = randomized(ours(CASES["llama"]))
    adapted = logits(model)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_no_backward_meets_it(reentrant):
    """Neither one of a forward inside, nor one inside that recomputes."""
    model = inject_dora(nn.Sequential(nn.Linear(6, 8)), DoraConfig(rank=2, targets=["0"]))
    x = torch.ones(3, 6, requires_grad=True)
    loss = checkpoint(model, x, use_reentrant=reentrant).sum()
    with adapters_off(model):
        assert not checkpoint(model, x, use_reentrant=reentrant).requires_grad
        with torch.enable_grad(), pytest.raises(RuntimeError, match="outside"):
            model(x)
        with pytest.raises(RuntimeError, match="outside"):
            loss.backward()
    loss = model(x).sum()
    with adapters_off(model):
        loss.backward()  # nothing is computed again
    assert model[0].magnitude.grad.abs().sum() > 0


def test_what_is_trained_in_full_is_refused():
    with (
        pytest.raises(UserError, match="'model.embed_tokens', 'lm_head'"),
        adapters_off(ours(CASES["llama embedding in full"])),
    ):
        raise AssertionError
    with pytest.raises(UserError, match="inject_dora"), adapters_off(gpt2()):
        raise AssertionError
