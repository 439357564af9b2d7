"""Shapes of models that people know, as config.json alone: for what needs no weights."""

from pathlib import Path

_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SHAPES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA),
    "405B": dict(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **_LLAMA
    ),
}
"""Those of Llama 3.1."""


def write_shape(name: str, directory: Path) -> Path:
    """A directory with the config.json of one of them."""
    from transformers import LlamaConfig

    LlamaConfig(**SHAPES[name], tie_word_embeddings=False).save_pretrained(directory / name)
    return directory / name
