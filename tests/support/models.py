"""Tiny models, their tokenizer and rows to train them on, made from fixed seeds."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn


def llama_config(**settings: Any) -> Any:
    """The tests' one Llama: awkward sizes in two layers, and whatever `settings` change."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 96, "hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 3, "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **settings})


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    return _made(LlamaForCausalLM, llama_config(**settings))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": 96,
        "n_positions": 64,
        "n_embd": 10,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.3,
    }
    return _made(GPT2LMHeadModel, GPT2Config(**sizes))


def qwen2_moe() -> nn.Module:
    """Three experts in 3-D parameters, a shared one, and a gate of one row."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=96, hidden_size=12, intermediate_size=17, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, moe_intermediate_size=7, shared_expert_intermediate_size=10, num_experts=3,
        num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    return _made(Qwen2MoeForCausalLM, config)


def deepseek_v3() -> nn.Module:
    """A dense layer, and two with four experts and a shared one."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=96, hidden_size=12, intermediate_size=17, moe_intermediate_size=7, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=5,
        q_lora_rank=6, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, initializer_range=0.3,
    )  # fmt: skip
    model = _made(DeepseekV3ForCausalLM, config)
    model.set_experts_implementation("eager")  # on CPUs, the default takes no odd sizes
    return model


def mixture(model_type: str, experts: int = 3) -> nn.Module:
    """Any of transformers' mixtures, computed expert by expert: on CPUs, what it chooses takes no odd sizes."""
    from tests.support.small import small_model

    torch.manual_seed(0)
    sizes = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), experts)
    model = small_model(model_type, sizes=sizes, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=96, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=17,
        max_position_embeddings=32, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return _made(BertForSequenceClassification, config)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=96, dim=12, n_layers=2, n_heads=2, hidden_dim=17, max_position_embeddings=32,
        initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return _made(DistilBertForSequenceClassification, config)


def _made(cls: type, config: Any) -> nn.Module:
    """Random weights from one seed, biases among them, in evaluation mode."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def make_tiny_llama(directory: Path) -> Path:
    """An awkward Llama: 17 intermediate features, 2 rows in k and v, biases, zero rows; the quickstart's words."""
    model: Any = llama(
        head_dim=2, attention_bias=True, mlp_bias=True, max_position_embeddings=64, pad_token_id=None
    )
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3].zero_()
        model.model.layers[1].self_attn.v_proj.weight[1].zero_()
        model.model.layers[1].mlp.up_proj.weight[:, 5].zero_()
    return save_model(model, directory)


def make_tiny_mixture(directory: Path) -> Path:
    """Three experts, of which each token goes to two."""
    return save_model(mixture("qwen3_moe"), directory)


def make_tiny_gpt2(directory: Path) -> Path:
    """Conv1D layers and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=64, n_embd=10, n_layer=2, n_head=2, n_inner=17, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return save_model(GPT2LMHeadModel(config), directory)


def make_tiny_distilbert(directory: Path) -> Path:
    """A bare encoder, as on the hub: a classifier's head is new."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=96, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32, pad_token_id=0,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.2,
    )  # fmt: skip
    return save_model(DistilBertForMaskedLM(config), directory)


def save_model(model: nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    letter_tokenizer().save_pretrained(directory)
    return directory


def letter_tokenizer():
    """One token per printable ASCII character: 95 of them, ids 1..95, and padding 0."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, **{chr(c): c - 31 for c in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="~")


def make_rows(path: Path, count: int) -> Path:
    """prompt_completion rows of different lengths."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
    rows = [
        {"prompt": f"{words[i % 12]} {i}:", "completion": " " + " ".join(words[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_pairs(path: Path, count: int) -> Path:
    """Rows of preferences, of different lengths."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
    rows = [
        {
            "prompt": f"{words[i % 12]} {i}:",
            "chosen": " " + " ".join(words[i % 5 : i % 5 + 1 + i % 3]),
            "rejected": " " + " ".join(words[i % 7 + 1 : i % 7 + 2 + i % 2]),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_labelled(path: Path, count: int) -> Path:
    """Rows of unpaired preferences: those of `make_pairs`, a chosen completion or a rejected one."""
    pairs = [json.loads(line) for line in make_pairs(path, count).read_text().splitlines()]
    names = ["rejected" if i % 3 == 0 else "chosen" for i in range(count)]
    rows = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair, name in zip(pairs, names, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_command(directory: Path, **sections: Any) -> list[str]:
    """The arguments of `dora-dist` for a run of these sections of a YAML. Writes the YAML to `directory`; the
    run's output goes to `directory`/run."""
    config = {**sections, "parallel": {"force": True}, "output_dir": str(directory / "run")}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["train", "--config", str(path)]
