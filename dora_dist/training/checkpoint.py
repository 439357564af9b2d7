"""Checkpoints: one format for every strategy and world size, written from shards, whole or not there.

A checkpoint is a directory `step-NNNNNNNN` of safetensors and JSON. Tensors are unsharded and go by the names of
the parameters, so what one strategy wrote any other reads:

    adapter_model.safetensors, adapter_config.json    the trained tensors: a PEFT adapter
    optimizer.safetensors                             AdamW's moments and step of each of them
    rng.safetensors                                   each rank's random state
    manifest.json                                     sizes, SHA-256, counters, and the run that it belongs to

The frozen base is not stored; the manifest has its fingerprint.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_dist.adapters.adapter import adapter_tensors, write_adapter
from dora_dist.adapters.files import CONFIG, TENSORS
from dora_dist.adapters.peft_format import trained_tensors
from dora_dist.config import CheckpointConfig
from dora_dist.dora.norm_cache import refresh_norms
from dora_dist.errors import RunFailed, UserError
from dora_dist.io.durable import MANIFEST, Damaged, NewDirectory, remove, sweep, verify, write_tensors
from dora_dist.parallel.engine import OptimizerState
from dora_dist.parallel.gather import ShardedTensor, finish, gathered, spread
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, as_matrix
from dora_dist.training.optim import TrainableModel

_OPTIMIZER, _RNG = "optimizer.safetensors", "rng.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_FILES = {TENSORS, CONFIG, _OPTIMIZER, _RNG}
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def counters(self) -> dict[str, Any]:
        return self.manifest["counters"]


class _Contents(NamedTuple):
    """What a checkpoint holds, to be read or written."""

    files: list[
        tuple[str, list[ShardedTensor], Callable[[Tensor], object]]
    ]  # and the sum over those who share a copy
    optimizer: OptimizerState
    random_state: Tensor  # [bytes] uint8


class Checkpoints:
    """The checkpoints of one run, in `directory`. Every rank calls each method at the same point."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        processes: Processes,
        run: dict[str, Any],
    ):
        """`run`: what the manifests say of the run, as JSON."""
        self.directory, self.config, self.processes, self.run = directory, config, processes, run

    def find(self) -> tuple[Checkpoint | None, list[str]]:
        """What `checkpoint.resume` names, verified, and lines for the person who watches.

        Begun again under the same launcher or job, or with the same path to resume from, a run goes on from its
        own newest checkpoint all the same.

        Raises:
            UserError: it is none, or damaged, or every one of this run is damaged.
        """
        found, error = None, None
        notices: list[str] = []
        if self.processes.is_main:
            try:
                for place in (self.directory.parent, self.directory):
                    sweep(place)
                found = self._find(notices)
            except UserError as mistake:
                error = str(mistake)
            except OSError as mistake:
                error = f"output_dir: {str(mistake.filename)!r} cannot be written: {mistake.strerror}"
        told = None if found is None else (str(found.path), found.manifest)
        told, notices, error = self.processes.from_main((told, notices, error))
        if error is not None:
            raise UserError(error)
        return None if told is None else Checkpoint(Path(told[0]), told[1]), notices

    def begin(self, found: Checkpoint | None) -> list[str]:
        """Set aside what is in this directory and a run that goes on from `found` has not made. Returns lines that
        say so."""
        if not self.processes.is_main:
            return []
        ours = found is not None and found.path.parent.resolve() == self.directory.resolve()
        last = found.step if found is not None and ours else -1
        return [_set_aside(path) for path in _checkpoints(self.directory) if _step(path) > last]

    def save(
        self,
        step: int,
        built: TrainableModel,
        counters: dict[str, Any],
        base_model: str,
        before: Callable[[], None] = lambda: None,
    ) -> str | None:
        """Write a checkpoint and delete those that `checkpoint.keep` spares no longer. Where it cannot be written
        (a full disk), all older ones stand, and what is wrong is returned. `before` is called on the rank that
        writes, and may fail likewise.

        Raises:
            RunFailed: it cannot be written, and `checkpoint.on_failure` is stop.
        """
        files = self._contents(built).files
        streams = [(name, pieces, gathered(pieces, sum_, self.processes.device)) for name, pieces, sum_ in files]
        failure = None
        if self.processes.is_main:
            manifest = {"format": FORMAT, "step": step, "counters": counters, "run": self.run}
            try:
                before()
                with NewDirectory(self.directory / _name(step)) as new:
                    (_, tensors, values), *others = streams
                    write_adapter(built.model, base_model, tensors, values, new.file)
                    for name, tensors, values in others:
                        with new.file(name) as file:
                            write_tensors(file, [tensor.head for tensor in tensors], values)
                    new.commit(manifest)
                with suppress(OSError):  # this one stands; the next save tries again
                    for path in _checkpoints(self.directory)[: -self.config.keep]:
                        remove(path)
            except OSError as error:
                failure = f"{error.strerror} ({error.filename or self.directory})"
        for _, _, values in streams:
            finish(values)
        failure = self.processes.from_main(failure)
        if failure is None:
            return None
        message = f"step {step}: the checkpoint was not written: {failure}; the ones before it stand"
        if self.config.on_failure == "stop":
            raise RunFailed(message)
        return message

    def newest(self) -> Path | None:
        """Of this run's, as rank 0 finds it."""
        found = [str(path) for path in _checkpoints(self.directory)[-1:]] if self.processes.is_main else []
        found = self.processes.from_main(found)
        return Path(found[0]) if found else None

    def restore(self, found: Checkpoint, built: TrainableModel) -> None:
        """Read the trained tensors, the optimizer's state and, where the ranks are as many as they were, each
        rank's random state.

        Raises:
            UserError: the checkpoint's tensors are not this run's.
        """
        trained = dict(trained_tensors(built.model))
        then = found.manifest["run"]
        same_world = all(then[key] == self.run[key] for key in ("world_size", "device"))
        contents = self._contents(built)
        for name, pieces, _ in contents.files:
            if name == TENSORS:
                pieces = [piece for piece in pieces if piece.name in trained]
            if name != _RNG or same_world:
                spread(found.path / name, pieces, self.processes)
        for parameter in dict.fromkeys(trained.values()):
            built.shards.after_write(parameter)
        contents.optimizer.commit()
        if same_world:
            _set_random_state(contents.random_state)
        refresh_norms(built.model, built.shards)
        built.engine.loss_scale.value, built.engine.loss_scale.good_steps = found.counters["loss_scale"]

    def _contents(self, built: TrainableModel) -> "_Contents":
        shards, engine = built.shards, built.engine
        shards.reshard(built.model)
        optimizer = engine.optimizer_state(_trained(built.model))
        random_state = _get_random_state()
        files: list[tuple[str, list[ShardedTensor], Callable[[Tensor], object]]] = [
            (TENSORS, adapter_tensors(built.model, shards), shards.sum_),
            (_OPTIMIZER, optimizer.tensors, optimizer.sum_),
            (_RNG, list(_random_pieces(random_state, self.processes)), self.processes.sum_),
        ]
        return _Contents(files, optimizer, random_state)

    def _find(self, notices: list[str]) -> Checkpoint | None:
        resume, problems = self.config.resume, []
        for path in reversed(_checkpoints(self.directory)):
            try:
                own = _verified(path)
            except Damaged as damage:
                problems.append(str(damage))
                notices.append(f"warning: {path.name} is damaged ({damage}); trying the one before it")
                continue
            if resume == "auto" or self._has_begun(own):
                return own
            break
        if resume not in ("auto", "none"):
            return _read_named(Path(resume))
        if problems and resume == "auto":
            raise UserError(
                f"checkpoint.resume: every checkpoint in {str(self.directory)!r} is damaged; the newest: "
                f"{problems[0]}; to begin anew, set checkpoint.resume=none"
            )
        return None

    def _has_begun(self, own: Checkpoint) -> bool:
        """Whether a checkpoint of this directory comes from the command that is being run: then to begin again, as
        the command says, would lose what it has trained."""
        then = own.manifest["run"]
        same_launch = then["launch"] is not None and then["launch"] == self.run["launch"]
        return same_launch or self.config.resume == then["config"]["checkpoint"]["resume"] != "none"


def _verified(path: Path) -> Checkpoint:
    """Raises Damaged: what is there is not what was written, or not a checkpoint's."""
    manifest = verify(path, _FILES)
    parts = {"format": int, "step": int, "counters": dict, "run": dict}
    if any(not isinstance(manifest.get(key), kind) for key, kind in parts.items()):
        raise Damaged(f"{path / MANIFEST} is not a checkpoint's")
    if manifest["format"] != FORMAT:
        raise Damaged(f"{path / MANIFEST} has format {manifest['format']}; this version reads {FORMAT}")
    if path.name != _name(manifest["step"]):
        raise Damaged(f"{path / MANIFEST} is of step {manifest['step']}")
    return Checkpoint(path, manifest)


def _set_aside(path: Path) -> str:
    number = 1
    while (aside := path.with_name(f"aside-{number}-{path.name}")).exists():
        number += 1
    path.rename(aside)
    return f"checkpoint {path.name}, from which this run does not go on, is set aside as {aside.name}"


def _checkpoints(directory: Path) -> list[Path]:
    """In the order of their steps."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=_step)


def _name(step: int) -> str:
    return f"step-{step:08}"


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _read_named(path: Path) -> Checkpoint:
    """A checkpoint, or the newest of a run's directory."""
    if not (path / MANIFEST).is_file():
        inside = [p for place in (path / "checkpoints", path) for p in _checkpoints(place)]
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


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters, tied ones once."""
    first: dict[nn.Parameter, str] = {}
    for key, parameter in trained_tensors(model):
        first.setdefault(parameter, key)
    return [(key, parameter) for parameter, key in first.items()]


def _random_pieces(own_state: Tensor, processes: Processes) -> Iterator[ShardedTensor]:
    for rank in range(processes.world_size):
        own = [Rectangle(as_matrix(own_state))] if rank == processes.rank else []
        yield ShardedTensor(f"rank.{rank}", torch.uint8, tuple(own_state.shape), own, owned=True)


def _get_random_state() -> Tensor:
    """[bytes] of the CPU's generator, and of this rank's GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def _set_random_state(state: Tensor) -> None:
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state[length:])
