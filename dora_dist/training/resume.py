"""Which checkpoint a run goes on from: those on the disk, whether they are whole, which run each belongs to, and
what may have changed since."""

import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dora_dist.adapters.files import CONFIG, TENSORS
from dora_dist.errors import UserError
from dora_dist.io.durable import MANIFEST, Damaged, verify

FORMAT = 1
OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_PARTS = {"format": int, "step": int, "counters": dict, "run": dict}  # of a manifest
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


class Checkpoint(NamedTuple):
    """A checkpoint to go on from, and what its manifest says."""

    path: Path
    step: int
    counters: dict[str, Any]
    run: dict[str, Any]  # see `describe_run`


def checkpoint_name(step: int) -> str:
    return f"step-{step:08}"


def checkpoints_in(directory: Path, after: int = -1) -> list[Path]:
    """In the order of their steps, those after step `after`."""
    paths = directory.iterdir() if directory.is_dir() else ()
    steps = {path: int(match[1]) for path in paths if (match := _NAME.fullmatch(path.name))}
    return sorted((path for path in steps if steps[path] > after), key=lambda path: steps[path])


def find_checkpoint(directory: Path, resume: str, run: dict[str, Any], notices: list[str]) -> Checkpoint | None:
    """What `checkpoint.resume` says to go on from: the newest in the run's own `directory` that is whole, the one
    that it names, or none. Adds what the person who watches should know to `notices`.

    Raises:
        UserError: it names none, or a damaged one, or every one of this run is damaged.
    """
    problems = []
    for path in reversed(checkpoints_in(directory)):
        try:
            own = _verified(path)
        except Damaged as damage:
            problems.append(str(damage))
            notices.append(f"warning: {path.name} is damaged ({damage}); trying the one before it")
            continue
        if resume == "auto" or has_begun(own.run, run):
            return own
        break
    if resume not in ("auto", "none"):
        return _read_named(Path(resume))
    if problems and resume == "auto":
        raise UserError(
            f"checkpoint.resume: every checkpoint in {str(directory)!r} is damaged; the newest: "
            f"{problems[0]}; to begin anew, set checkpoint.resume=none"
        )
    return None


def set_aside(path: Path) -> str:
    """Rename a checkpoint so that no run finds it. Returns a line that says so."""
    number = 1
    while (aside := path.with_name(f"aside-{number}-{path.name}")).exists():
        number += 1
    path.rename(aside)
    return f"checkpoint {path.name}, from which this run does not go on, is set aside as {aside.name}"


def _verified(path: Path) -> Checkpoint:
    """Raises Damaged: what is there is not what was written, or not a checkpoint's."""
    manifest = verify(path, {TENSORS, CONFIG, OPTIMIZER, RNG})
    if any(not isinstance(manifest.get(key), kind) for key, kind in _PARTS.items()):
        raise Damaged(f"{path / MANIFEST} is not a checkpoint's")
    if manifest["format"] != FORMAT:
        raise Damaged(f"{path / MANIFEST} has format {manifest['format']}; this version reads {FORMAT}")
    if path.name != checkpoint_name(manifest["step"]):
        raise Damaged(f"{path / MANIFEST} is of step {manifest['step']}")
    return Checkpoint(path, manifest["step"], manifest["counters"], manifest["run"])


def _read_named(path: Path) -> Checkpoint:
    """A checkpoint, or the newest of a run's directory."""
    if not (path / MANIFEST).is_file():
        inside = [p for place in (path / "checkpoints", path) for p in checkpoints_in(place)]
        if not inside:
            raise UserError(
                f"checkpoint.resume: {str(path)!r} is neither a checkpoint nor a run's directory with "
                "checkpoints; valid are also auto and none"
            )
        path = inside[-1]
    try:
        return _verified(path)
    except Damaged as damage:
        raise UserError(f"checkpoint.resume: {damage}; name an older checkpoint") from None


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


def compare(found: Checkpoint, run: dict[str, Any], force: bool, steps: int) -> list[str]:
    """Lines that say where the run goes on and what has changed. UserError: it cannot go on from there."""
    problems = _contradictions(found.run, run)
    if problems and not force:
        raise UserError(
            f"checkpoint.resume: {str(found.path)!r} belongs to another run: {'; '.join(problems)}. Set "
            "checkpoint.force=true to go on from it all the same, or checkpoint.resume=none to begin anew"
        )
    lines = [f"resumed from {found.path}, after step {found.step} of {steps}"]
    if found.step >= steps:
        lines.append("no step is left to train; to begin anew, set checkpoint.resume=none")
    changes = [*problems, *_free_changes(found.run, run)]
    return lines + ([f"changed since then: {'; '.join(changes)}"] if changes else [])


def _contradictions(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why a run cannot go on from a checkpoint of another: one line each."""
    found = [f"{what} ({then['fingerprints'].get(key)}, now {now['fingerprints'][key]})" for key, what in
             _FINGERPRINTS.items() if then["fingerprints"].get(key) != now["fingerprints"][key]]  # fmt: skip
    if then["rows_per_step"] != now["rows_per_step"]:
        found.append(
            f"a step takes {now['rows_per_step']} rows (train.micro_batch_size x train.accumulation x processes), "
            f"then {then['rows_per_step']}"
        )
    return found + [line for key, line in _changes(then["config"], now["config"]) if _is_fixed(key)]


def _free_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
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
