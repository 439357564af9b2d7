"""Merging a base whose tensors transformers renames or fuses while it loads them: it loads the whole base, and it
saves the merged model, under the base's own names.

Memory: the base three times (as loaded, as merged, and what saving makes of it).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.dora.experts import ExpertsForward, restore
from dora_dist.errors import UserError
from dora_dist.models.build import Blueprint
from dora_dist.models.huggingface import load_with_transformers
from dora_dist.models.merge_weights import Drift, Entry, Probe, merged_values
from dora_dist.models.weights import base_tensors, missing_from, stack_experts
from dora_dist.parallel.shards import Rectangle, as_matrix


class LoadedWeights:
    """A loaded model's tensors, to be read as weight files are."""

    def __init__(self, model: nn.Module):
        self.model, self.four_bit = model, {}  # type: ignore[var-annotated]
        self.tensors = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, own: Rectangle) -> Tensor:
        return as_matrix(self.tensors[name])[own.rows, own.cols]

    def rows(self, name: str, rows: slice) -> Tensor:
        return self.tensors[name][rows]


def load_renamed(blueprint: Blueprint) -> LoadedWeights | None:
    """The base, where the names in its files are not the model's own.

    Raises:
        UserError: it cannot be loaded here; says what would help.
    """
    files, model = blueprint.files, blueprint.model
    assert files is not None
    trained = {name for name, tensor in base_tensors(model).items() if tensor.requires_grad}
    missing = [name for name in missing_from(files, model) if name not in trained]
    if not missing:
        return None
    told = f"model.path: {str(files.directory)!r} has no tensor {missing[0]!r} ({len(missing)} missing)"
    if files.four_bit:
        raise UserError(f"{told}: of a base in 4 bits merge needs files whose names are the model's own")
    needed = 3 * sum(file.stat().st_size for file in {*files.pickled, *(t.path for t in files.stored.values())})
    if needed > available_memory():
        raise UserError(
            f"{told}: transformers renames or fuses its tensors, and to merge them takes {needed / 1e9:.0f} GB of "
            f"host memory, of which {available_memory() / 1e9:.0f} GB are free. Merge on a larger machine, or "
            "write the base anew under the model's own names: from_pretrained(...).save_pretrained(DIRECTORY, "
            "save_original_format=False)"
        )
    loaded = load_with_transformers(blueprint.config.model, files, blueprint.head)
    stack_experts(loaded, model)
    return LoadedWeights(loaded)


@torch.no_grad()
def write_loaded(
    entries: list[Entry], weights: LoadedWeights, out: Path, base: str, limit: int, unties: bool
) -> int:
    """Merge into the loaded model and have transformers save it. Returns how many files there are.

    Raises:
        RuntimeError: an adapted weight does not act on vectors as base and adapter do.
    """
    model: Any = weights.model
    drift = Drift()
    for entry in entries:
        probes: dict[str, Probe] = {}
        values = merged_values(entry, weights, base, drift, probes)
        for name, probe in probes.items():
            probe.check(name, values)
        _put(model, entry.name, values)
    if unties:
        for module in model.modules():
            if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
                module.config.tie_word_embeddings = False
    else:
        model.tie_weights()
    for module in model.modules():
        if isinstance(module, ExpertsForward):
            restore(module)
    model.save_pretrained(out, max_shard_size=limit)
    drift.tell()
    return len(list(out.glob("*.safetensors")))


def _put(model: nn.Module, name: str, values: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    if key in module._buffers:
        module._buffers[key] = values
    else:
        module._parameters[key] = nn.Parameter(values, requires_grad=False)


def available_memory() -> float:
    """Bytes of host memory that a program can still take; infinite where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else float("inf")
