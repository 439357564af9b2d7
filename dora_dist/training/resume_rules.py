"""Which run a checkpoint belongs to: what must be the same for training to go on from it, and what may change."""

import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# What decides the numbers that training goes on with. The rest (learning rate, steps, strategy, ...) may change,
# which is told.
_FIXED = ("model", "dora", "quant", "data", "train.seed")
_FREE = (
    "dora.accept_other_base", "model.allow_pickle", "model.path", "model.attention", "dora.init_from",
    "data.train", "data.eval", "output_dir",
)  # fmt: skip
_UNTOLD = ("output_dir", "log.", "checkpoint.", "parallel.strategy")  # the last is told as what it came to
_FINGERPRINTS = {
    "base": "model.path: the base model is another",
    "tokenizer": "model.path: the tokenizer is another",
    "train": "data.train: the rows are others",
}


def describe_run(
    settings: dict[str, Any], world_size: int, device: str, strategy: str, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """What a manifest says of its run; JSON. `settings`: the whole configuration; `launch` is the same for all
    lives of a run that a launcher restarts or a scheduler requeues."""
    import transformers

    import dora_dist

    train = settings["train"]
    return {
        "config": settings,
        "world_size": world_size,
        "device": device,
        "launch": _launch(),
        "strategy": strategy,
        "rows_per_step": train["micro_batch_size"] * train["accumulation"] * world_size,
        "fingerprints": dict(fingerprints),
        "versions": {
            "dora_dist": dora_dist.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _launch() -> str | None:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    job = os.environ.get("SLURM_JOB_ID")
    return f"slurm {job}" if job else f"torchrun {run}" if run != "none" else None


def has_begun(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint in a run's own directory comes from the command that is being run: then to begin again,
    as the command says, would lose what it has trained."""
    if then["launch"] is not None and then["launch"] == now["launch"]:
        return True
    return now["config"]["checkpoint"]["resume"] == then["config"]["checkpoint"]["resume"] != "none"


def contradictions(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why a run cannot go on from a checkpoint of another: one line each."""
    found = [f"{what} ({then['fingerprints'].get(key)}, now {now['fingerprints'][key]})" for key, what in
             _FINGERPRINTS.items() if then["fingerprints"].get(key) != now["fingerprints"][key]]  # fmt: skip
    if then["rows_per_step"] != now["rows_per_step"]:
        found.append(
            f"a step takes {now['rows_per_step']} rows (train.micro_batch_size x train.accumulation x processes), "
            f"then {then['rows_per_step']}"
        )
    return found + [line for key, line in _changes(then["config"], now["config"]) if _is_fixed(key)]


def free_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What else is not as it was."""
    changes = _changes(then["config"], now["config"])
    told = [line for key, line in changes if not _is_fixed(key) and not key.startswith(_UNTOLD)]
    other = [key for key in ("world_size", "strategy") if then[key] != now[key]]
    return told + [f"{key} {now[key]}, was {then[key]}" for key in other]


def _is_fixed(key: str) -> bool:
    return key.startswith(_FIXED) and key not in _FREE


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(key, what has changed) of two configurations."""
    for name in sorted(then.keys() | now.keys()):
        key, old, new = above + name, then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and not above:
            yield from _changes(old, new, f"{key}.")
        elif old != new:
            yield key, f"{key} {new!r}, was {old!r}"
