"""The models that are measured: Llamas with random weights, and runs that train them."""

import argparse
from pathlib import Path
from typing import Any

import torch

from dora_dist.config import (
    DataConfig,
    DoraConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)

VOCABULARY = 2048  # small, so that the output head does not hide the adapted layers
_LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SHAPES = {
    "8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA_3
    ),
    "70B": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA_3
    ),
    "405B": dict(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **_LLAMA_3
    ),
}
"""Those of Llama 3.1."""


_HELP = {"tokens": "of a row", "batch": "rows of a micro-batch", "rank": "of the adapters"}


def count(text: str) -> int:
    """The type of an option."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def add_shape(parser: Any, **defaults: int | None) -> None:
    """Options for sizes of what is trained, those named: hidden, layers, tokens, batch, rank."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=_HELP.get(name))


def sizes(
    hidden: int, layers: int, tokens: int, *, vocabulary: int = VOCABULARY, head: int = 64, grouped: bool = False,
    intermediate: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A Llama's. `head`: features of a head; `grouped`: four heads share a key, where they can."""
    heads = max(1, hidden // head)
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate or hidden * 11 // 4,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": tokens,
        "num_key_value_heads": heads // 4 if grouped and heads % 4 == 0 else heads,
    }  # fmt: skip


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{"use_cache": False, "tie_word_embeddings": False, **settings})


def write_model(directory: Path, **settings: Any) -> Path:
    """A directory with the config.json of a Llama, for what needs no weights or random ones."""
    llama(**settings).save_pretrained(directory)
    return directory


def random_model(config: Any, dtype: torch.dtype, device: torch.device, checkpointing: bool = False) -> Any:
    """A causal model of a transformers configuration, as it is trained."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run_config(
    model: Path, strategy: Any, tokens: int, *, rank: int = 16, dtype: Any = "bfloat16", four_bit: bool = False,
    replicas: int = 1, cpu_offload: bool = False, **train: Any,
) -> RunConfig:  # fmt: skip
    """A run over a model of random weights, all of whose linear layers are adapted."""
    return RunConfig(
        model=ModelConfig(path=str(model), init="random", dtype=dtype),
        dora=DoraConfig(rank=rank, targets="all-linear"),
        quant=QuantConfig(scheme="nf4" if four_bit else "none"),
        data=DataConfig(train="none", seq_len=tokens),
        train=TrainConfig(**train),
        parallel=ParallelConfig(strategy=strategy, replicas=replicas, cpu_offload=cpu_offload),
    )
