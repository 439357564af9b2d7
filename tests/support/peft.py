"""The same adapter here and in PEFT: tiny models, configurations of both kinds, values moved between them."""

import copy
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dora_dist import DoraConfig, inject_dora
from dora_dist.adapters.peft_format import stacked_tensors, trained_tensors
from tests.support.models import bert, deepseek_v3, distilbert, gpt2, llama, mixture

IDS = torch.tensor([[5, 17, 3, 90, 41, 41, 8], [1, 2, 60, 11, 77, 30, 95]])


@dataclass(frozen=True)
class Case:
    """One adapter in both vocabularies: `ours` for DoraConfig, `theirs` for LoraConfig (None: the same)."""

    make: object
    targets: list[str] | str
    ours: dict = field(default_factory=dict)
    theirs: dict | None = None
    their_targets: list[str] | str | None = None


LLAMA_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
DISTIL_TARGETS = "q_lin k_lin v_lin out_lin lin1 lin2".split()
DEEPSEEK_MLPS = ["layers.0.mlp.up_proj", "shared_experts.gate_proj", "layers.2.mlp.shared_experts.down_proj"]
DISTIL_HEADS = ["pre_classifier", "classifier"]
EXPERT_PATTERNS = {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"experts.down_proj": 5.0}}
PATTERNS = {"rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 3.5}}
FIRST_Q = "model.layers.0.self_attn.q_proj"
CASES = {
    "llama": Case(llama, LLAMA_TARGETS),
    "llama biases": Case(lambda: llama(attention_bias=True, mlp_bias=True), LLAMA_TARGETS),
    "llama lora": Case(llama, LLAMA_TARGETS, {"method": "lora"}, {"use_dora": False}),
    "llama patterns": Case(llama, LLAMA_TARGETS, PATTERNS),
    "llama rslora": Case(llama, LLAMA_TARGETS, {"rslora": True, **PATTERNS}, {"use_rslora": True, **PATTERNS}),
    "llama one layer": Case(llama, [FIRST_Q]),
    "llama glob": Case(llama, ["model.layers.1.*_proj"], {}, {}, r"model\.layers\.1\..*_proj"),
    "llama all-linear": Case(llama, "all-linear"),
    "llama embedding": Case(llama, ["embed_tokens", "q_proj"]),
    "llama embedding in full": Case(llama, ["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama tied in full": Case(
        lambda: llama(tie_word_embeddings=True), ["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "llama tied, both adapted": Case(lambda: llama(tie_word_embeddings=True), ["embed_tokens", "lm_head"]),
    # PEFT takes gate_proj and its like for experts of this model, wherever they stand.
    "deepseek shared": Case(
        deepseek_v3,
        ["q_a_proj", *DEEPSEEK_MLPS],
        {"method": "lora", "rank_pattern": {"layers.0.mlp.up_proj": 2}, "alpha_pattern": {"gate_proj": 5.0}},
        {
            "use_dora": False,
            "target_parameters": [f"{name}.weight" for name in DEEPSEEK_MLPS],
            "rank_pattern": {"layers.0.mlp.up_proj.weight": 2},
            "alpha_pattern": {"gate_proj.weight": 5.0},
        },
        ["q_a_proj"],
    ),
    **{
        f"{kind} experts": Case(
            partial(mixture, kind),
            ["experts", "q_proj"],
            {"method": "lora", **EXPERT_PATTERNS},
            {"use_dora": False, "target_parameters": ["gate_up_proj", "experts.down_proj"], **EXPERT_PATTERNS},
            ["q_proj"],
        )
        for kind in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text")
    },
    "one projection": Case(
        partial(mixture, "qwen3_moe"),
        ["experts.down_proj"],
        {"method": "lora"},
        {"use_dora": False, "target_parameters": ["down_proj"]},
        [],
    ),
    "one layer's experts": Case(
        partial(mixture, "gpt_oss"),
        ["layers.1.mlp.experts"],
        {"method": "lora"},
        {
            "use_dora": False,
            "target_parameters": [f"model.layers.1.mlp.experts.{key}" for key in ("down_proj", "gate_up_proj")],
        },
        [],
    ),
    "gpt2": Case(gpt2, ["c_attn", "c_proj", "c_fc"]),
    "gpt2 one block": Case(gpt2, ["h.1.mlp.c_proj"]),
    "gpt2 tied embedding": Case(gpt2, ["wte", "wpe", "c_attn"]),
    "gpt2 Linear and Conv1D": Case(gpt2, ["lm_head", "c_fc"]),
    "bert": Case(bert, ["query", "key", "value", "dense"], {"modules_to_save": ["classifier"]}),
    "bert partly": Case(bert, ["intermediate.dense"], {"modules_to_save": ["classifier"]}),
    "distilbert": Case(distilbert, DISTIL_TARGETS, {"modules_to_save": DISTIL_HEADS}),
    "distilbert frozen head": Case(distilbert, DISTIL_TARGETS),
    # PEFT takes pre_classifier for classifier: our file must hold it although it is frozen here.
    "distilbert half a head": Case(distilbert, DISTIL_TARGETS, {"modules_to_save": ["classifier"]}),
}


def ours(case: Case) -> nn.Module:
    return inject_dora(case.make(), DoraConfig(rank=3, alpha=7, targets=case.targets, **case.ours)).eval()


def randomized(model: nn.Module) -> nn.Module:
    """Nonzero factors, magnitudes moved by up to half."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in trained_tensors(model):
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("lora_magnitude_vector"):
                parameter.mul_(1 + 0.5 * noise.clamp(-1, 1))
            else:
                parameter.copy_(0.3 * noise)
    return model


def as_in_files(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors of an injected model."""
    stacked = stacked_tensors(model)
    return {k: stacked[k].to_file(p.detach()) if k in stacked else p for k, p in trained_tensors(model)}


def theirs(case: Case) -> nn.Module:
    """The adapter as PEFT itself makes it, before values are set."""
    from peft import LoraConfig, get_peft_model

    model = case.make()
    settings = {"use_dora": True, **copy.deepcopy(case.ours if case.theirs is None else case.theirs)}
    task = "SEQ_CLS" if case.ours.get("modules_to_save") in (["classifier"], DISTIL_HEADS) else None
    targets = case.targets if case.their_targets is None else case.their_targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type=task, **settings)
        return get_peft_model(model, config).eval()


def peft_load(base: nn.Module, directory: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, directory).eval()


def peft_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def file_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")
