"""What stands in for an inference engine that takes weights, as vLLM's and SGLang's models do."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


class StandInEngine:
    """Loads a checkpoint's tensors, and then what it is sent: by names that it has, of their shapes and dtypes."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self.tensors |= load_file(path)
        self.received: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            assert name in self.tensors, f"{name}: the checkpoint has no such tensor"
            own = self.tensors[name]
            assert (tensor.shape, tensor.dtype) == (own.shape, own.dtype), name
            assert tensor.is_contiguous(), name
            own.copy_(tensor)
            self.received.append(name)

    def model(self, scratch: Path) -> torch.nn.Module:
        """What generates."""
        shutil.copytree(self.directory, scratch, ignore=shutil.ignore_patterns("*.safetensors*"))
        config = json.loads((scratch / "config.json").read_text())
        untied = "lm_head.weight" in self.tensors
        (scratch / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": not untied}))
        save_file(self.tensors, scratch / "model.safetensors", {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(scratch).eval()
