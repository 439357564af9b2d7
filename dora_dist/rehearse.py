"""A rehearsal of a run: the real build and the real steps of one rank, on fake tensors among absent ranks.

It needs config.json alone: no weights, no GPU, no other process, seconds rather than hours. What it finds is
counted, not estimated: every tensor that the code holds, every kernel it starts, every collective it sends.

Of a model with many equal blocks two short versions are rehearsed. Each further block adds the same, so what a
step holds, computes and sends is a straight line in the number of blocks, which is drawn through the two.
"""

import gc
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dora_dist import decomposition, packed, products, weights
from dora_dist.backends.process import Processes
from dora_dist.backends.rehearsal import (
    collective_of,
    every_rank_alike,
    fake_group,
    send_in_python,
    shapes_uncounted,
    stay_fake,
)
from dora_dist.build import Blueprint, Strategy, build, choose_strategy, draw_blueprint
from dora_dist.config import RunConfig
from dora_dist.data import GlobalBatch
from dora_dist.errors import RunFailed, UserError
from dora_dist.launcher import end_with_parent
from dora_dist.phases import Phase
from dora_dist.shards import blocks
from dora_dist.stand_ins import (
    BASE,
    Files,
    Watch,
    full_batch,
    gloo_scratch,
    rounded,
    tell_apart,
    tell_head,
)
from dora_dist.target import rehearsed_gpu
from dora_dist.trace import HOST, Call, Tracer
from dora_dist.trainer import Trainer

_attend = F.scaled_dot_product_attention
_SHORT = {"zero3": (3, 5)}  # blocks of the two short versions, else 3 and 4: ZeRO-3 is at two blocks at a time
_STEPS = {"zero3": 3}  # else 2: the second has the optimizer's states, the third ZeRO-3's prefetches


_UNKNOWN = "this run cannot be rehearsed, so whether it fits is not known: "
_KILLED = _UNKNOWN + "its process was killed; perhaps the machine has no memory left"
# What goes through a weight piece by piece holds the same for each.
_PIECES = ((packed, "_pieces"), (weights, "_pieces"), (decomposition, "row_tiles"), (products, "row_tiles"))

Peaks = dict[tuple[Phase, bool], dict[str, float]]  # (phase, on the host) -> what is held at the fullest -> bytes


@dataclass(frozen=True)
class Job:
    """What to rehearse."""

    config: RunConfig
    directory: Path  # holds config.json
    world_size: int
    ranks_per_node: int
    gpu: bool = True  # as on GPUs; else as on this machine's CPU, with gloo
    device_memory: float = float("inf")  # bytes, which parallel.strategy: auto asks for
    blocks: int | None = None  # of the model's; None: all
    around: Callable[[], AbstractContextManager] | None = None  # the rehearsal, for comparisons
    every_piece: bool = False  # also go through a weight piece by piece, which takes time and holds nothing more


@dataclass(frozen=True)
class Short:
    """What one rehearsal found, of the last of its steps."""

    strategy: str
    blocks: int
    peaks: Peaks  # over all steps
    calls: list[Call]


@dataclass(frozen=True)
class Rehearsed:
    """What a run's rank does in a step, and holds. `runs` are of fewer blocks than `blocks`, or one of all."""

    job: Job
    strategy: str
    blocks: int
    runs: tuple[Short, ...]

    def at_full_depth(self, measure: Callable[[Short], Mapping[Any, float]]) -> dict[Any, float]:
        """What `measure` finds in each run, drawn on to all blocks. What it leaves out is zero."""
        found = [measure(run) for run in self.runs]
        if len(found) == 1:
            return dict(found[0])
        first, second = self.runs
        ahead = (self.blocks - second.blocks) / (second.blocks - first.blocks)
        keys = dict.fromkeys([*found[0], *found[1]])
        values = [[f.get(key, 0.0) for f in found] for key in keys]
        return {key: b + (b - a) * ahead for key, (a, b) in zip(keys, values, strict=True)}

    def peaks(self) -> Peaks:
        flat = self.at_full_depth(
            lambda run: {(phase, tag): size for phase, held in run.peaks.items() for tag, size in held.items()}
        )
        peaks: Peaks = {}
        for (phase, tag), size in flat.items():
            peaks.setdefault(phase, {})[tag] = size
        return peaks

    def peak(self, on_host: bool = False, loading: bool | None = None) -> float:
        """Bytes, the most that is held: while `loading`, in a step, or (None) ever."""
        sums = [
            sum(held.values())
            for (phase, host), held in self.peaks().items()
            if host == on_host and loading in (None, phase is Phase.LOADING)
        ]
        return max(sums, default=0.0)


class Rehearsals:
    """Makes rehearsals, each in processes of its own: a fake group stays in a process for its lifetime. They are
    forked from two that have imported what they need, which takes as long as many a rehearsal.

        with Rehearsals() as rehearse:
            rehearse(Job(config, directory, world_size=64, ranks_per_node=8)).peak()
    """

    def __enter__(self) -> "Rehearsals":
        self._pool = ProcessPoolExecutor(
            2, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def __call__(self, job: Job) -> Rehearsed:
        """
        Raises:
            UserError: the configuration is refused, as training would.
            RunFailed: its code does something that fake tensors cannot.
        """
        job = replace(job, config=_plain(job.config))
        try:
            # Meanwhile this process draws the model, and finds how many of its blocks are worth it.
            for _ in range(2):
                self._pool.submit(_import)
            total, depths = _depths(job)
            futures = [self._pool.submit(_forked, _in_child, replace(job, blocks=n)) for n in depths]
            found = [future.result() for future in futures]
        except BrokenProcessPool:
            raise RunFailed(_KILLED) from None
        for result in found:
            if isinstance(result, Exception):
                raise result
        runs = tuple(result for result in found if isinstance(result, Short))
        return Rehearsed(job, runs[0].strategy, total, runs)


def _import() -> None:
    """In a process that others are forked from, which has done so with this file."""


def _forked(make: Callable[[Job], Any], job: Job) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=end_with_parent) as pool:
        try:
            return pool.submit(make, job).result()
        except BrokenProcessPool:
            return RunFailed(_KILLED)


def _in_child(job: Job) -> "Short | UserError | RunFailed":
    """Errors as values: not all that libraries raise can be sent to another process."""
    try:
        return rehearse_here(job)
    except UserError as error:
        return UserError(str(error))
    except Exception as error:  # whatever a model's or a library's code does not do with fake tensors
        return RunFailed(_UNKNOWN + (str(error).strip() or type(error).__name__).splitlines()[0])


def _plain(config: RunConfig) -> RunConfig:
    """Without what changes nothing here: the values of an adapter to go on from, and compilation."""
    dora, train = replace(config.dora, init_from=None), replace(config.train, compile=False)
    return replace(config, dora=dora, train=train)


def _depths(job: Job) -> tuple[int, Sequence[int | None]]:
    """The number of a model's blocks, and how many of them to rehearse."""
    config = job.config
    model = draw_blueprint(config, job.directory, job.world_size, from_files=False).model
    found = [_signature(block) for block in blocks(model)]
    equal = len(set(found)) == 1
    short = _SHORT.get(config.parallel.strategy, (3, 4))
    return len(found), short if equal and len(found) > short[1] else (None,)


def _signature(block: nn.Module) -> tuple:
    tensors = [(n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()]
    return (type(block), *tensors)


def rehearse_here(job: Job) -> Short:
    """In this process, which is of no other use afterwards."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing here asks a GPU, whether there is one or not
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with ExitStack() as around:
        around.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        around.enter_context(fake_group(job.world_size, job.ranks_per_node))
        if job.gpu:
            around.enter_context(rehearsed_gpu())
            attend = mock.patch.object(F, "scaled_dot_product_attention", _without_dropout)
            around.enter_context(attend)
        if job.around is not None:
            around.enter_context(job.around())
        processes = Processes()
        blueprint = _drawn(job)
        strategy = choose_strategy(job.config, blueprint.model, processes, job.device_memory)
        if strategy.name == "fsdp":
            strategy.mesh  # type: ignore[union-attr]  # noqa: B018 - a mesh cannot be made of fake tensors
        around.enter_context(every_rank_alike())
        for module, name in () if job.every_piece else _PIECES:
            around.enter_context(mock.patch.object(module, name, _first_of(getattr(module, name))))
        tracer = Tracer(collective_of, **({"rounded": rounded} if job.gpu else {"scratch_of": gloo_scratch}))
        around.enter_context(shapes_uncounted(tracer.paused))
        batch = full_batch(job.config, job.world_size)  # real: the lengths of documents are read
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        around.enter_context(tracer)
        count = sum(1 for _ in blocks(blueprint.model))
        _run(job, blueprint, strategy, tracer, batch)
        return Short(strategy.name, count, {k: dict(v) for k, v in tracer.peaks.items()}, tracer.calls)


def _run(job: Job, blueprint: Blueprint, strategy: Strategy, tracer: Tracer, batch: GlobalBatch) -> None:
    config = job.config
    stay_fake(blueprint.model)
    blueprint.model.config.pad_token_id = 0  # type: ignore[union-attr]  # RunData sets one: classifiers ask for it
    offloaded = HOST if config.parallel.cpu_offload and job.gpu else ""  # states and gradients
    weights_at = offloaded if strategy.name in ("fsdp", "zero3") else ""
    tracer.enter(Phase.LOADING, weights_at + BASE)
    blueprint = replace(blueprint, files=Files(blueprint.model, tracer))  # type: ignore[arg-type]
    built = build(blueprint, strategy)
    gc.collect()
    tell_apart(built, tracer, weights_at)
    send_in_python(built.engine.module)
    tell_head(built.model, tracer)
    steps = _STEPS.get(strategy.name, 2)
    told: Any = SimpleNamespace(steps=steps, causal=config.model.task == "causal_lm")
    trainer = Trainer(config, built, strategy, told, log=None, watch=Watch(tracer, offloaded))  # type: ignore[arg-type]
    for _ in range(steps):
        tracer.calls = []
        trainer.train_step(batch)


def _without_dropout(*arguments: Any, dropout_p: float = 0.0, **options: Any) -> Tensor:
    """GPUs' kernels drop without holding what they drop; a CPU's attention would fall back to its definition."""
    return _attend(*arguments, **options)


def _first_of(pieces: Callable) -> Callable:
    return lambda *arguments: list(islice(pieces(*arguments), 1))


def _drawn(job: Job) -> Blueprint:
    blueprint = draw_blueprint(job.config, job.directory, job.world_size, from_files=False)
    for parent in list(blueprint.model.modules()) if job.blocks is not None else ():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                setattr(parent, name, child[: job.blocks])
    return blueprint
