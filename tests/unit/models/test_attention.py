"""Attention over packed documents by their lengths: what single rows give, and what the dense mask gives."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DogeConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from dora_dist.data.packing import packed_attention
from dora_dist.models import attention
from dora_dist.models.attention import CausalAttention
from tests.support.rounding import MODEL, assert_near

TINY = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **TINY,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0, **TINY),
}  # fmt: skip
LENGTHS, T = [[5, 1, 7], [16], [2, 9]], 16  # padding: 3, 0, 5


def make(name, implementation="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention that matters
    return model.eval()


def batch():
    torch.manual_seed(1)
    positions = torch.zeros(len(LENGTHS), T, dtype=torch.long)
    for row, lengths in zip(positions, LENGTHS, strict=True):
        row[: sum(lengths)] = torch.cat([torch.arange(n) for n in lengths])
    return {"input_ids": torch.randint(3, 40, (len(LENGTHS), T)), "position_ids": positions}


def real(logits):
    """Those of documents, not of padding."""
    return torch.cat([row[: sum(lengths)] for row, lengths in zip(logits, LENGTHS, strict=True)])


def gradients(logits, model):
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), list(model.parameters()))


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_are_what_the_dense_mask_makes_of_them(name, kernel, monkeypatch):
    if kernel == "varlen":
        monkeypatch.setattr(attention, "_fits_varlen", lambda *_: True)
        monkeypatch.setattr(attention, "varlen", lambda: varlen_in_words)
    model = make(name)
    dense = real(
        model(
            **batch(), attention_mask=packed_attention(torch.tensor([[5, 1, 7], [16, 0, 0], [2, 9, 0]]), T)
        ).logits
    )
    with CausalAttention(model).over(LENGTHS):
        found = real(model(**batch()).logits)
        got = gradients(found, model)
    assert_near(found, dense, MODEL)
    for ours, theirs in zip(got, gradients(dense, model), strict=True):
        assert_near(ours, theirs, MODEL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_on_a_gpu(name):
    """16-bit documents go through torch's varlen_attn where it is there."""
    model = make(name).to("cuda", torch.bfloat16)
    inputs = {key: value.to("cuda") for key, value in batch().items()}
    mask = packed_attention(torch.tensor([[5, 1, 7], [16, 0, 0], [2, 9, 0]], device="cuda"), T)
    dense = real(model(**inputs, attention_mask=mask).logits)
    with CausalAttention(model).over(LENGTHS):
        found = real(model(**inputs).logits)
        got = gradients(found, model)
    assert (found - dense).norm() <= 0.03 * dense.norm()
    total = torch.cat([g.flatten() for g in gradients(dense, model)])
    assert (torch.cat([g.flatten() for g in got]) - total).norm() <= 0.05 * total.norm()


def varlen_in_words(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size):
    """torch's varlen_attn [tokens, N, D], which needs a GPU."""
    assert bounds_q.dtype == torch.int32 and bounds_q.equal(bounds_k) and window_size == (-1, 0)
    parts = []
    for start, end in pairwise(bounds_q.tolist()):
        assert end - start <= longest_q == longest_k
        document = (t[start:end].transpose(0, 1) for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*document, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_are_what_single_rows_are(name):
    model, packed = make(name), batch()
    with CausalAttention(model).over(LENGTHS), torch.no_grad():
        found = real(model(**packed).logits)
    single = []
    for ids, lengths in zip(packed["input_ids"], LENGTHS, strict=True):
        for document in ids[: sum(lengths)].split(lengths):
            with torch.no_grad():
                single.append(model(input_ids=document[None]).logits[0])
    assert_near(found, torch.cat(single), MODEL)


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_checkpointing_recomputes_with_the_same_documents(name):
    results = []
    for checkpointing in (False, True):
        model = make(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with CausalAttention(model).over(LENGTHS):
            results.append(gradients(real(model(**batch()).logits), model))
    for plain, again in zip(*results, strict=True):
        assert_near(again, plain, MODEL)


def test_plain_rows_and_calls_from_outside():
    model = make("llama")
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        want, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        with CausalAttention(model).over(None):
            assert model(ids).logits.equal(want)
        assert model(ids, attention_mask=mask).logits.equal(padded)  # the model is as it was
    assert model.config._attn_implementation == "sdpa"


def test_which_models_fit():
    assert CausalAttention.fits(make("llama"))
    assert not CausalAttention.fits(make("llama", "eager"))
    small = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, **TINY}
    for config, fits in (
        (MistralConfig(num_key_value_heads=2, sliding_window=4, **small), False),
        (MistralConfig(num_key_value_heads=2, sliding_window=None, **small), True),
        (Qwen2Config(num_key_value_heads=2, **small), True),
        (DogeConfig(num_key_value_heads=2, **small), False),  # adds to the causal mask
        (Qwen2Config(num_key_value_heads=2, use_sliding_window=True, max_window_layers=1, **small), False),
    ):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        assert CausalAttention.fits(model) == fits


def test_attention_that_ignores_the_documents_is_told():
    model = make("llama", "eager")
    with pytest.raises(RuntimeError, match=r"data\.packing"), CausalAttention(model).over(LENGTHS):
        torch.nn.Linear(1, 1)(torch.ones(1))
