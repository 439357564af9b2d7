"""Checkpoints on the disk: their names, whether they are whole, and which one a run goes on from."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from dora_dist.adapters.files import CONFIG, TENSORS
from dora_dist.errors import UserError
from dora_dist.io.durable import MANIFEST, Damaged, verify
from dora_dist.training.resume_rules import has_begun

FORMAT = 1
OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_PARTS = {"format": int, "step": int, "counters": dict, "run": dict}  # of a manifest


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
