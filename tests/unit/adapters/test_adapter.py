"""Merging, atomic saves, and adapters that do not fit."""

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_dist import (
    DoraConfig,
    UserError,
    inject_dora,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from dora_dist.adapters.peft_format import trained_tensors
from dora_dist.config import QuantConfig
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_cache import cache_norms
from dora_dist.io import durable
from dora_dist.models.quantize import pack_linears
from dora_dist.parallel.shards import RowsOfCopies, as_matrix
from dora_dist.quant.modules import FrozenExperts
from tests.support.models import deepseek_v3, distilbert, gpt2, llama, mixture
from tests.support.peft import CASES, IDS, Case, logits, ours, randomized
from tests.support.rounding import MODEL, assert_near, roundings

MERGED = {
    **{name: CASES[name] for name in ("llama biases", "llama lora", "llama rslora", "distilbert", "gpt2")},
    "untied embedding": CASES["llama embedding"],
    "tied embedding": CASES["gpt2 tied embedding"],
    "tied head": Case(lambda: llama(tie_word_embeddings=True), ["lm_head", "q_proj"]),
    "both of a tie": CASES["llama tied, both adapted"],
    "axis in": Case(gpt2, ["wpe", "c_attn", "lm_head"], {"magnitude_axis": "in"}),
    "magnitude only": Case(llama, ["q_proj"], {"magnitude_only": ["embed_tokens", "up_proj"]}),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_model_computes_what_the_adapter_did(name, tmp_path):
    model = randomized(ours(MERGED[name]))
    cache_norms(model)
    want = logits(model)
    adapted = model.dora.layers
    before = {n: model.get_submodule(n) for n in adapted}
    assert merge_adapter(model) is model
    assert_near(logits(model), want, MODEL)
    assert not any(isinstance(m, DoraLayer) for m in model.modules()) and not hasattr(model, "dora")
    for layer_name in adapted:
        module = model.get_submodule(layer_name)
        assert type(module) in (nn.Linear, Conv1D, nn.Embedding)
        assert getattr(module, "bias", None) is before[layer_name].bias
        assert repr(module) == repr(MERGED[name].make().get_submodule(layer_name))
    assert model.state_dict().keys() == MERGED[name].make().state_dict().keys()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_near(logits(again), logits(model), MODEL, about="transformers tied again what the merge untied")


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_over_4_bits_load_and_merge(kind, tmp_path):
    def packed():
        model = ours(Case(partial(mixture, kind), ["experts.down_proj", "q_proj"]))
        pack_linears(model, QuantConfig(scheme="nf4"))
        return model

    model = randomized(packed())
    assert model.model.layers[0].mlp.experts.down_proj.layout is not None
    save_adapter(model, tmp_path)
    adapted = logits(model)
    assert not torch.allclose(adapted, logits(packed()), atol=1e-2), "the adapter does nothing"
    assert torch.equal(logits(load_adapter(packed(), tmp_path)), adapted)
    merge_adapter(model)
    assert not any(isinstance(m, DoraLayer) for m in model.modules())
    assert model.model.layers[0].mlp.experts.down_proj.dim() == 3
    assert_near(logits(model), adapted, MODEL)


@pytest.mark.parametrize("made", [partial(mixture, "qwen3_moe"), llama], ids=["experts", "linear"])
def test_transformers_saves_an_adapted_model_only_once_it_is_merged(made, tmp_path):
    model = randomized(ours(Case(made, ["q_proj", "down_proj"])))
    adapted = logits(model)
    for saved in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(UserError, match="save_adapter") as told:
            saved.save_pretrained(tmp_path / "model")
    assert "\n" not in str(told.value) and not (tmp_path / "model").exists()
    merge_adapter(model).save_pretrained(tmp_path / "model")
    assert_near(logits(type(model).from_pretrained(tmp_path / "model").eval()), adapted, MODEL)


def test_merging_one_half_of_a_tie_keeps_the_others_weight():
    model = randomized(ours(CASES["gpt2 tied embedding"]))
    base = model.lm_head.weight.detach().clone()
    merge_adapter(model)
    assert torch.equal(model.lm_head.weight, base)
    assert not torch.equal(model.transformer.wte.weight, base)
    assert not model.config.tie_word_embeddings


def test_a_merge_that_unties_nothing_leaves_the_tie():
    model = merge_adapter(randomized(ours(Case(lambda: llama(tie_word_embeddings=True), ["q_proj"]))))
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_into_bf16_rounds_once_and_returns_the_trained_modules():
    case = Case(lambda: distilbert().bfloat16(), ["q_lin", "lin1"], {"modules_to_save": ["classifier"]})
    model = randomized(ours(case))
    layer = model.distilbert.transformer.layer[0].attention.q_lin
    V = layer.weight.double() + layer.spec.scaling * (layer.lora_B @ layer.lora_A).double()
    want = (layer.magnitude.double() / V.norm(dim=1))[:, None] * V
    head = model.classifier.weight.detach().clone()
    adapted = logits(model)
    merge_adapter(model)
    merged = model.distilbert.transformer.layer[0].attention.q_lin.weight
    assert ((merged.double() - want).abs() <= want.abs() * 2**-8).all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.classifier.weight, head.bfloat16())
    assert not model.classifier._forward_hooks and not model.classifier._forward_pre_hooks
    assert (logits(model) - adapted).norm() < roundings(5, torch.bfloat16) * adapted.norm()


@pytest.mark.parametrize(("made", "saved"), [(llama, ["mlp", "down_proj"]), (deepseek_v3, ["shared_experts"])])
def test_what_is_named_twice_to_be_trained_in_full_is_saved_once(made, saved, tmp_path):
    """By itself, and as part of another module."""
    model = inject_dora(made(), DoraConfig(rank=2, targets=["o_proj"], modules_to_save=saved))
    names = model.dora.saved
    assert names and all(name.endswith(saved[0]) for name in names)
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).down_proj.weight.mul_(2)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(made(), tmp_path)), logits(model))


def test_a_merged_model_can_be_injected_again():
    model = inject_dora(merge_adapter(randomized(ours(CASES["llama"]))), DoraConfig(rank=2, targets="all-linear"))
    assert len(model.dora.layers) == 14


def test_merging_leaves_4_bit_experts_that_were_not_adapted():
    """As it leaves linear layers; dense, most of a model would need four times the memory."""
    model = inject_dora(
        mixture("qwen3_moe"), DoraConfig(rank=2, targets=["q_proj", "^model.layers.1.mlp.experts"])
    )
    pack_linears(model, QuantConfig(scheme="nf4"))
    randomized(model)
    cache_norms(model)
    want = logits(model)
    packed, adapted = (layer.mlp.experts for layer in merge_adapter(model).model.layers)
    assert isinstance(packed.down_proj, FrozenExperts) and packed.down_proj.weight.dtype == torch.uint8
    assert isinstance(adapted.down_proj, nn.Parameter) and adapted.down_proj.dtype == torch.float32
    assert_near(logits(model), want, MODEL)


def test_merging_needs_an_injected_unsharded_model():
    with pytest.raises(UserError, match="has no DoRA layers"):
        merge_adapter(llama())
    model = ours(CASES["llama"])
    model.lm_head.weight.placements = (SimpleNamespace(),)  # what a DTensor has
    with pytest.raises(UserError, match="needs whole weights"):
        merge_adapter(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, DoraLayer)


@pytest.mark.parametrize("writes", [0, 1], ids=["tensors", "configuration"])
def test_a_save_that_fails_leaves_the_old_files(writes, tmp_path, monkeypatch):
    model = randomized(ours(CASES["llama"]))
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    count = 0

    def flush(handle):
        nonlocal count
        count += 1
        if count > 2 * writes:  # a file, then its directory
            raise OSError("no space left on device")

    monkeypatch.setattr(durable.os, "fsync", flush)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_needs_an_injected_model(tmp_path):
    with pytest.raises(UserError, match="has no DoRA layers"):
        save_adapter(llama(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
M = KEY.replace("lora_A.weight", "lora_magnitude_vector")
BASE = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def edit_tensors(change):
    def apply(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def edit_config(**changes):
    def apply(directory):
        path = directory / "adapter_config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))

    return apply


def write(name, change):
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


NAN = float("nan")
DAMAGES = {
    "no configuration": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "model.safetensors is missing"),
    "a tensor is missing": (edit_tensors(lambda t: t.pop(KEY)), f"{KEY!r} is missing"),
    "a magnitude is missing": (edit_tensors(lambda t: t.pop(M)), f"{M!r} is missing"),
    "one tensor too many": (
        edit_tensors(lambda t: t.update({KEY.replace("q_proj", "zz"): torch.ones(3, 12)})),
        "belongs to no adapted",
    ),
    "another base": (edit_tensors(lambda t: t.update({BASE: torch.ones(12, 12)})), "belongs to no adapted"),
    "shape": (
        edit_tensors(lambda t: t.update({KEY: torch.ones(3, 13)})), "is [3, 13], the model needs [3, 12]"
    ),
    "magnitude of two dimensions": (
        edit_tensors(lambda t: t.update({M: torch.ones(12, 1)})), "is [12, 1], the model needs [12]"
    ),
    "NaN": (edit_tensors(lambda t: t[KEY].view(-1)[7].fill_(NAN)), f"{KEY!r} holds NaN"),
    "infinite": (edit_tensors(lambda t: t[M][2].fill_(-float("inf"))), f"{M!r} holds NaN, infinite"),
    "whole numbers": (edit_tensors(lambda t: t.update({M: torch.ones(12, dtype=torch.int)})), "whole values"),
    "use_dora off": (edit_config(use_dora=False), "use_dora is False, but"),
    "use_dora not there": (edit_config(use_dora="drop"), "use_dora is None, but"),
    "alpha": (edit_config(lora_alpha=8), "by 2.66667, the model by 2.33333"),
    "rslora": (edit_config(use_rslora=True), "dora.rslora"),
    "alpha of one layer": (edit_config(alpha_pattern={"k_proj": 1}), "k_proj' by 0.333"),
    "axis": (edit_config(magnitude_axis="in"), "axis 'in'"),
    "peft_type": (edit_config(peft_type="LOHA"), "peft_type 'LOHA' is not supported"),
    "peft_type not there": (edit_config(peft_type="drop"), "'peft_type' is missing"),
    "rank is text": (edit_config(r="8"), "'r' is missing or of the wrong type"),
    "not JSON": (write("adapter_config.json", lambda b: b[:-9]), "not valid JSON"),
    "not text": (write("adapter_config.json", lambda b: b"\xff\xfe\x00"), "not valid JSON"),
    "not an object": (write("adapter_config.json", lambda b: b"[1]"), "'peft_type' is missing"),
    "cut off": (write("adapter_model.safetensors", lambda b: b[:-50]), "not a readable safetensors file"),
    "empty": (write("adapter_model.safetensors", lambda b: b""), "not a readable safetensors file"),
}  # fmt: skip
ONLY_INJECTED = ("alpha", "rslora", "alpha of one layer", "axis")  # a bare model takes what the file says


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_adapter(randomized(ours(CASES["llama"])), directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "injected"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_named_and_nothing_is_written(damage, bare, saved, tmp_path):
    if bare and damage in ONLY_INJECTED:
        pytest.skip("means another adapter, not a damaged one")
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    apply, message = DAMAGES[damage]
    apply(tmp_path)
    model = llama() if bare else ours(CASES["llama"])
    before = {k: t.clone() for k, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert [type(m) for m in model.modules()] == kinds
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad for p in model.parameters()) == bare


def test_a_rank_reads_its_own_rows_and_hears_of_faults_in_others(tmp_path):
    """Two ranks, one after the other: what is damaged in the last expert is in the second's part alone."""
    made = Case(partial(mixture, "qwen3_moe"), ["experts", "q_proj"])
    whole = randomized(ours(made))
    save_adapter(whole, tmp_path)
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"  # [out, r E], experts fastest
    edit_tensors(lambda t: t[key][-1].unflatten(0, (-1, 3))[:, 2].fill_(torch.nan))(tmp_path)
    told: list[torch.Tensor] = []

    def load(rank: int, sum_: Callable[[torch.Tensor], object]) -> nn.Module:
        return load_adapter(ours(made), tmp_path, RowsOfCopies(rank, 2, sum_))

    first = load(0, told.append)
    for (name, want), (_, got) in zip(trained_tensors(whole), trained_tensors(first), strict=True):
        (own,) = RowsOfCopies(0, 2, told.append).rectangles(want)
        assert torch.equal(as_matrix(got.detach())[own.rows], own.values), name
    assert not told[0].any()
    with pytest.raises(UserError, match=re.escape(f"{key!r} holds NaN")):
        load(1, told.append)
    with pytest.raises(UserError, match=re.escape(f"{key!r} holds NaN")):
        load(0, lambda faults: faults.add_(told[-1]))


def test_an_adapter_for_other_modules_is_refused(tmp_path):
    save_adapter(randomized(ours(CASES["llama"])), tmp_path)
    with pytest.raises(UserError, match="belongs to no adapted module"):
        load_adapter(ours(CASES["llama one layer"]), tmp_path)
    with pytest.raises(UserError, match="target_modules .* match no module"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_a_tied_weight_cannot_hold_two_values(tmp_path):
    case = CASES["llama tied in full"]
    save_adapter(randomized(ours(case)), tmp_path)
    edit_tensors(lambda t: t["base_model.model.lm_head.weight"].add_(1))(tmp_path)
    with pytest.raises(UserError, match="differ, but in the model they are one tied weight"):
        load_adapter(ours(case), tmp_path)


def test_base_weights_in_the_file_are_fine_where_they_are_the_models(tmp_path):
    """PEFT writes embeddings that it adapts; equal to the model's they change nothing."""
    model = randomized(ours(CASES["llama"]))
    save_adapter(model, tmp_path)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    edit_tensors(lambda t: t.update({BASE: weight}))(tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path).eval()), logits(model))


def test_a_16_bit_adapter_is_widened(tmp_path):
    save_adapter(randomized(ours(CASES["llama"])), tmp_path)
    edit_tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))(tmp_path)
    model = load_adapter(llama(), tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    for key, parameter in trained_tensors(model):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, written[key].float())


def test_a_loaded_adapter_goes_on_training(tmp_path):
    save_adapter(randomized(ours(CASES["llama"])), tmp_path)
    model = load_adapter(llama(), tmp_path)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        adapter = name.rpartition(".")[2] in ("lora_A", "lora_B", "magnitude")
        assert parameter.requires_grad == adapter == (parameter.grad is not None), name
