"""The same adapter computes the same in PEFT, and moves between the two bit by bit."""

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from dora_dist import DoraConfig, UserError, inject_dora, load_adapter, save_adapter
from dora_dist.adapters.peft_format import trained_tensors
from tests.support.models import bert, deepseek_v3, distilbert, llama, mixture
from tests.support.peft import (
    CASES,
    DEEPSEEK_MLPS,
    IDS,
    Case,
    as_in_files,
    file_tensors,
    logits,
    ours,
    peft_load,
    peft_tensors,
    randomized,
    theirs,
)
from tests.support.rounding import MODEL, assert_near

pytest.importorskip("peft")

OURS_ALONE = ("distilbert frozen head", "distilbert half a head")  # PEFT trains both heads always


def assert_same_tensors(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("name", CASES)
def test_our_adapter_in_peft(name, tmp_path):
    """PEFT selects the same modules with the same ranks, holds the same bits, computes the same."""
    case = CASES[name]
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    loaded = peft_load(case.make(), tmp_path)
    assert_same_tensors(peft_tensors(loaded), file_tensors(tmp_path))
    written = file_tensors(tmp_path)
    for key, parameter in as_in_files(model).items():
        assert torch.equal(written[key], parameter), key
    got, want = logits(model), logits(loaded)
    assert not torch.allclose(want, logits(case.make()), atol=1e-2), "the adapter does nothing"
    assert_near(got, want, MODEL)


@pytest.mark.parametrize("name", [n for n in CASES if n not in OURS_ALONE])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "injected"])
def test_peft_adapter_here(name, bare, tmp_path):
    case = CASES[name]
    peft_model = theirs(case)
    with torch.no_grad():
        for parameter_name, parameter in peft_model.named_parameters():
            if "lora_magnitude" in parameter_name:
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter).clamp(-1, 1))
            elif parameter.requires_grad:
                parameter.normal_(0, 0.3)
        if name == "llama tied in full":  # PEFT trains two copies, which one tied weight can hold while equal
            model = peft_model.base_model.model
            head = model.lm_head.modules_to_save.default.weight
            head.copy_(model.model.embed_tokens.modules_to_save.default.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(tmp_path)
    model = load_adapter(case.make() if bare else ours(case), tmp_path).eval()
    assert_same_tensors(as_in_files(model), peft_tensors(peft_model))
    assert_near(logits(model), logits(peft_model), MODEL)


def test_gradients_agree_with_pefts(tmp_path):
    case = CASES["llama biases"]
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    peft_model = peft_load(case.make(), tmp_path)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for m in (model, peft_model):
        m(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {k.replace(".default", ""): p.grad for k, p in peft_model.named_parameters()}
    for key, parameter in trained_tensors(model):
        want = wanted[key if key.endswith(".weight") else key + ".weight"]
        assert_near(parameter.grad, want, MODEL, about=key)


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "injected"])
def test_magnitude_only_stands_in_with_zero_factors(bare, tmp_path):
    case = Case(llama, ["q_proj"], {"magnitude_only": ["embed_tokens", "v_proj"]})
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    loaded = peft_load(llama(), tmp_path)
    assert_same_tensors(peft_tensors(loaded), file_tensors(tmp_path))
    assert_near(logits(model), logits(loaded), MODEL)
    again = load_adapter(llama() if bare else ours(case), tmp_path).eval()
    assert again.model.layers[0].self_attn.v_proj.lora_A is None
    assert_same_tensors(dict(trained_tensors(again)), dict(trained_tensors(model)))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "injected"])
def test_magnitude_per_input_feature_is_ours_alone(bare, tmp_path):
    case = Case(llama, ["q_proj", "down_proj"], {"magnitude_axis": "in"})
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    with pytest.raises((ValueError, KeyError)):
        peft_load(llama(), tmp_path)
    again = load_adapter(llama() if bare else ours(case), tmp_path).eval()
    assert_same_tensors(dict(trained_tensors(again)), dict(trained_tensors(model)))
    assert torch.equal(logits(again), logits(model))


class Twins(nn.Module):
    """One stack's names are suffixes of the other's, as in models with a vision tower."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.tower = self.stack(), nn.ModuleDict({"model": self.stack()})

    def stack(self) -> nn.Module:
        return nn.ModuleDict({"proj": nn.Linear(6, 6), "out": nn.Linear(6, 6)})

    def forward(self, x):
        for part in (self.model, self.tower["model"]):
            x = part["out"](part["proj"](x).tanh())
        return x


@pytest.mark.parametrize(
    ("targets", "pattern", "ranks"),
    [
        (["model.*"], {"^model.out": 4}, {"model.proj": 3, "model.out": 4}),
        (["proj", "out"], {"^model.out": 4}, None),
        (["tower*proj", "out"], {"tower.model.out": 1, "out": 2}, None),
    ],
)
def test_names_that_are_suffixes_of_others(targets, pattern, ranks, tmp_path):
    config = DoraConfig(rank=3, alpha=7, targets=targets, rank_pattern=pattern)
    model = randomized(inject_dora(Twins(), config))
    if ranks is not None:
        assert {n: model.get_submodule(n).spec.rank for n in model.dora.layers} == ranks
    save_adapter(model, tmp_path)
    loaded = peft_load(Twins(), tmp_path)
    assert_same_tensors(peft_tensors(loaded), file_tensors(tmp_path))
    again = load_adapter(Twins(), tmp_path)
    assert again.dora.layers == model.dora.layers
    x = torch.randn(4, 6)
    assert torch.equal(again(x), model(x))
    assert_near(loaded(x), model(x), MODEL)


def test_pefts_patterns_are_regular_expressions(tmp_path):
    fitting = {r"layers\.0\..*proj": 2, "^model.layers.1.self_attn.q_proj": 4, "q_proj": 1}  # the first counts
    patterns = {"rank_pattern": fitting}
    peft_model = theirs(Case(llama, ["q_proj", "up_proj"], patterns))
    peft_model.save_pretrained(tmp_path)
    model = load_adapter(llama(), tmp_path)
    ranks = {n: model.get_submodule(n).spec.rank for n in model.dora.layers}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 2,
        "model.layers.1.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "saved", "task"),
    [
        (llama, [], "CAUSAL_LM"),
        (bert, ["classifier"], "SEQ_CLS"),
        (distilbert, ["pre_classifier", "classifier"], "SEQ_CLS"),
        (distilbert, ["classifier"], None),  # for SEQ_CLS PEFT would look for a trained pre_classifier
        (bert, [], None),
    ],
)
def test_configuration_names_task_and_base(make, saved, task, tmp_path):
    model = inject_dora(make(), DoraConfig(rank=2, alpha=4, targets="all-linear", modules_to_save=saved))
    save_adapter(model, tmp_path, base_model="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task
    assert config["base_model_name_or_path"] == "some/base"
    assert config["use_dora"] is True and config["r"] == 2 and config["lora_alpha"] == 4


def test_an_adapter_that_peft_would_bend_is_kept_from_it(tmp_path):
    """PEFT would train pre_classifier in full: it takes it for the classifier of modules_to_save."""
    case = Case(distilbert, ["q_lin", "pre_classifier"], {"modules_to_save": ["classifier"]})
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    with pytest.raises((ValueError, KeyError)):
        peft_load(distilbert(), tmp_path)
    assert torch.equal(logits(load_adapter(ours(case), tmp_path).eval()), logits(model))


@pytest.mark.parametrize(
    "more",
    [
        {"rank_pattern": {"gate_up_proj": 2}, "dropout": 0.1},
        {"magnitude_axis": "in"},
        {"targets": ["q_proj"], "magnitude_only": ["experts.gate_up_proj", "layers.0.mlp.experts.down_proj"]},
    ],
    ids=["out", "in", "magnitude only"],
)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_dora_on_experts_is_ours_alone_and_says_so(kind, more, tmp_path):
    case = Case(partial(mixture, kind), more.get("targets", ["experts", "q_proj"]), more)
    case.ours.pop("targets", None)
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    with pytest.raises(KeyError, match="DORA_DIST"):
        peft_load(case.make(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "PEFT has " in config["not_for_peft"] and config["lora_dropout"] == case.ours.get("dropout", 0.0)
    assert not torch.allclose(logits(model), logits(case.make()), atol=1e-2), "the adapter does nothing"
    for base in (case.make(), ours(case)):
        again = load_adapter(base, tmp_path).eval()
        assert again.dora.layers == model.dora.layers
        assert_same_tensors(dict(trained_tensors(again)), dict(trained_tensors(model)))
        assert torch.equal(logits(again), logits(model))


def test_experts_of_another_shape_are_named(tmp_path):
    case = Case(partial(mixture, "qwen3_moe"), ["experts"])
    save_adapter(randomized(ours(case)), tmp_path)
    five = mixture("qwen3_moe", experts=5)
    with pytest.raises(
        UserError, match=r"experts.base_layer.lora_A.weight' is \[9, 32\], the model needs \[15, 32\]"
    ):
        load_adapter(five, tmp_path)


def test_names_that_peft_takes_for_experts_are_kept_from_it(tmp_path):
    """PEFT has no DoRA for them; as LoRA (among CASES) they go by the parameter."""
    case = Case(deepseek_v3, ["*_a_proj", *DEEPSEEK_MLPS], {"dropout": 0.1})
    model = randomized(ours(case))
    save_adapter(model, tmp_path)
    with pytest.raises(KeyError, match="DORA_DIST"):
        peft_load(deepseek_v3(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["not_for_peft"].startswith("model.layers.0.mlp.up_proj: PEFT takes layers of this name for")
    assert config["lora_dropout"] == 0.1
    again = load_adapter(deepseek_v3(), tmp_path).eval()
    assert again.dora.layers == model.dora.layers
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["mlp.gate.weight"], "mean 'model.layers.1.mlp.gate.weight', which no layer here is for"),
        (["nonsense"], "match no parameter of this model"),
    ],
)
def test_parameters_that_are_no_layers_weights_are_refused(targets, message, tmp_path):
    save_adapter(randomized(ours(CASES["deepseek shared"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_parameters": targets}))
    with pytest.raises(UserError, match=message):
        load_adapter(deepseek_v3(), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["k"]),
        ("bias", "all"),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(key, value, tmp_path):
    save_adapter(randomized(ours(CASES["llama"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=key):
        load_adapter(model, tmp_path)
    assert_same_tensors(model.state_dict(), before)


def test_names_without_the_wrappers_of_torch_compile(tmp_path):
    model = randomized(ours(CASES["llama"]))
    save_adapter(torch.compile(model), tmp_path / "whole")
    plain = file_tensors(tmp_path / "whole")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    save_adapter(model, tmp_path / "block")
    assert_same_tensors(file_tensors(tmp_path / "block"), plain)
    peft_model = peft_load(llama(), tmp_path / "whole")
    assert_near(logits(peft_model), logits(randomized(ours(CASES["llama"]))), MODEL)
