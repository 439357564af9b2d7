"""Checkpoints: one format for every strategy and world size, written from shards, whole or not there.

A checkpoint is a directory `step-NNNNNNNN` of safetensors and JSON. Tensors are unsharded and go by PEFT's keys,
so what one strategy wrote any other reads:

    adapter_model.safetensors, adapter_config.json    the trained tensors: a PEFT adapter
    optimizer.safetensors                             AdamW's moments and step of each of them
    rng.safetensors                                   each rank's random state
    manifest.json                                     sizes, SHA-256, counters, and the run that it belongs to

The frozen base is not stored; the manifest has its fingerprint.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_dist.adapters.adapter import adapter_tensors, write_adapter
from dora_dist.adapters.files import TENSORS
from dora_dist.adapters.peft_format import trained_tensors
from dora_dist.config import CheckpointConfig
from dora_dist.dora.norm_cache import refresh_norms
from dora_dist.errors import RunFailed, UserError
from dora_dist.io.durable import NewDirectory, remove, sweep, write_tensors
from dora_dist.parallel.engine import OptimizerState
from dora_dist.parallel.gather import ShardedTensor, finish, gathered, spread
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, as_matrix
from dora_dist.training.optim import TrainableModel
from dora_dist.training.resume import (
    FORMAT,
    OPTIMIZER,
    RNG,
    Checkpoint,
    checkpoint_name,
    checkpoints_in,
    find_checkpoint,
    set_aside,
)


class _File(NamedTuple):
    """A file of tensors, and this rank's part of each."""

    name: str
    pieces: list[ShardedTensor]
    sum_: Callable[[Tensor], object]  # over the ranks that share a copy


class Checkpoints:
    """The checkpoints of one run, in `directory`. Every rank calls each method at the same point."""

    def __init__(self, directory: Path, config: CheckpointConfig, processes: Processes, run: dict[str, Any]):
        """`run`: what the manifests say of the run (`describe_run`)."""
        self.directory, self.config, self.processes, self.run = directory, config, processes, run

    def find(self) -> tuple[Checkpoint | None, list[str]]:
        """What `checkpoint.resume` names, verified, and lines for the person who watches.

        Begun again under the same launcher or job, or with the same path to resume from, a run goes on from its
        own newest checkpoint all the same.

        Raises:
            UserError: it is none, or damaged, or every one of this run is damaged.
        """
        told, notices = self.processes.on_main(self._find)
        return None if told is None else Checkpoint(Path(told[0]), *told[1:]), notices

    def _find(self) -> tuple[tuple | None, list[str]]:
        notices: list[str] = []
        try:
            for place in (self.directory.parent, self.directory):
                sweep(place)
            found = find_checkpoint(self.directory, self.config.resume, self.run, notices)
        except OSError as error:
            raise UserError(f"output_dir: {str(error.filename)!r} cannot be written: {error.strerror}") from None
        return None if found is None else (str(found.path), *found[1:]), notices

    def is_own(self, found: Checkpoint) -> bool:
        """Whether a checkpoint lies in this run's directory."""
        return found.path.parent.resolve() == self.directory.resolve()

    def begin(self, found: Checkpoint | None) -> list[str]:
        """Set aside what is in this directory and a run that goes on from `found` has not made. Returns lines that
        say so."""
        if not self.processes.is_main:
            return []
        last = found.step if found is not None and self.is_own(found) else -1
        return [set_aside(path) for path in checkpoints_in(self.directory, after=last)]

    def save(
        self, step: int, built: TrainableModel, counters: dict[str, Any], before: Callable[[], None]
    ) -> str | None:
        """Write a checkpoint and delete those that `checkpoint.keep` spares no longer. Where it cannot be written
        (a full disk), all older ones stand, and what is wrong is returned. `before` is called on the rank that
        writes, and may fail likewise.

        Raises:
            RunFailed: it cannot be written, and `checkpoint.on_failure` is stop.
        """
        files, _, _ = self._contents(built)
        streams = [gathered(file.pieces, file.sum_, self.processes.device) for file in files]
        failure = None
        if self.processes.is_main:
            try:
                before()
                self._write(step, built, counters, files, streams)
                with suppress(OSError):  # this one stands; the next save tries again
                    for path in checkpoints_in(self.directory)[: -self.config.keep]:
                        remove(path)
            except OSError as error:
                failure = f"{error.strerror} ({error.filename or self.directory})"
        for values in streams:
            finish(values)
        failure = self.processes.from_main(failure)
        if failure is None:
            return None
        message = f"step {step}: the checkpoint was not written: {failure}; the ones before it stand"
        if self.config.on_failure == "stop":
            raise RunFailed(message)
        return message

    def _write(
        self,
        step: int,
        built: TrainableModel,
        counters: dict[str, Any],
        files: list[_File],
        streams: list[Iterator[Tensor]],
    ) -> None:
        """`streams`: the whole tensors of each of `files`, the adapter's first."""
        with NewDirectory(self.directory / checkpoint_name(step)) as new:
            base_model = self.run["config"]["model"]["path"]
            write_adapter(built.model, base_model, files[0].pieces, streams[0], new.file)
            for (name, pieces, _), values in zip(files[1:], streams[1:], strict=True):
                with new.file(name) as file:
                    write_tensors(file, [piece.head for piece in pieces], values)
            new.commit({"format": FORMAT, "step": step, "counters": counters, "run": self.run})

    def newest(self) -> Path | None:
        """Of this run's, as rank 0 finds it."""
        found = self.processes.on_main(lambda: [str(path) for path in checkpoints_in(self.directory)[-1:]])
        return Path(found[0]) if found else None

    def restore(self, found: Checkpoint, built: TrainableModel) -> None:
        """Read the trained tensors, the optimizer's state and, where the ranks are as many as they were, each
        rank's random state.

        Raises:
            UserError: the checkpoint's tensors are not this run's.
        """
        trained = dict(trained_tensors(built.model))
        same_world = all(found.run[key] == self.run[key] for key in ("world_size", "device"))
        files, optimizer, random_state = self._contents(built)
        for name, pieces, _ in files:
            if name == TENSORS:
                pieces = [piece for piece in pieces if piece.name in trained]
            if name != RNG or same_world:
                spread(found.path / name, pieces, self.processes)
        for parameter in dict.fromkeys(trained.values()):
            built.shards.after_write(parameter)
        optimizer.commit()
        if same_world:
            _set_random_state(random_state)
        refresh_norms(built.model, built.shards)
        built.engine.loss_scale.value, built.engine.loss_scale.good_steps = found.counters["loss_scale"]

    def _contents(self, built: TrainableModel) -> tuple[list[_File], OptimizerState, Tensor]:
        """What a checkpoint holds, to be read or written: its files, and what of it this rank has to put back
        where it is from, the optimizer's state and a random state ([bytes] uint8)."""
        built.shards.reshard(built.model)
        optimizer = built.engine.optimizer_state(_trained(built.model))
        random_state = _get_random_state()
        files = [
            _File(TENSORS, adapter_tensors(built.model, built.shards), built.shards.sum_),
            _File(OPTIMIZER, optimizer.tensors, optimizer.sum_),
            _File(RNG, list(_random_pieces(random_state, self.processes)), self.processes.sum_),
        ]
        return files, optimizer, random_state


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
