"""A rehearsal of a run: the real build and the real steps of one rank, on fake tensors among absent ranks.

It needs config.json alone: no weights, no GPU, no other process, seconds rather than hours. What it finds is
counted, not estimated: every tensor that the code holds, every kernel it starts, every collective it sends.

Of a model with many equal blocks, perhaps after a few others, two short versions are rehearsed. Each further block
adds the same, so what a step holds, computes and sends is a straight line in the number of blocks, which is drawn
through the two.
"""

import gc
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dora_dist.config import RunConfig
from dora_dist.data.batches import GlobalBatch
from dora_dist.device import rehearsed_gpu
from dora_dist.dora.experts import ExpertsForward
from dora_dist.errors import RunFailed, UserError
from dora_dist.models.build import Blueprint, make_blueprint, sizes_of
from dora_dist.parallel.orphans import end_with_parent
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import blocks
from dora_dist.parallel.strategy import Strategy, choose_strategy, strategy_for
from dora_dist.planning.fake_group import collective_of, fake_group, reduce_in_python
from dora_dist.planning.stand_ins import (
    BASE,
    Files,
    Watch,
    full_batch,
    gloo_scratch,
    replacements,
    rounded,
    tag_head,
    tag_what_is_held,
)
from dora_dist.planning.trace import HOST, Call, Peaks, Tracer
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer

T = TypeVar("T")

_last_drawn: tuple[tuple, Blueprint] | None = None  # what about it matters, and the model
# Equal blocks of the two short versions, else 3 and 4. In one process the second adds what every further one adds;
# ZeRO-3 is at two blocks at a time.
_SHORT = {"single": (2, 3), "zero3": (3, 5)}
_UNKNOWN = "this run cannot be rehearsed, so whether it fits is not known: "
_KILLED = _UNKNOWN + "its process was killed; perhaps the machine has no memory left"


@dataclass(frozen=True)
class Job:
    config: RunConfig
    directory: Path  # holds config.json
    world_size: int
    ranks_per_node: int
    gpu: bool = True  # as on GPUs; else as on this machine's CPU, with gloo
    device_memory: float = float("inf")  # bytes, which parallel.strategy: auto asks for
    blocks: int | None = None  # of the model's; None: all, as two short versions tell of them
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
    reason: str  # for the strategy
    blocks: int
    runs: tuple[Short, ...]
    coverage: tuple[str, ...] = ()  # lines on which share of the base is adapted
    experts: bool = False  # tokens choose among experts, each as often as another

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

    def fullest(self, on_host: bool = False, loading: bool | None = None) -> tuple[Phase, dict[str, float]]:
        """When the most is held, and what, the largest first: while `loading`, in a step, or (None) ever."""
        held = {
            phase: tags
            for (phase, host), tags in self.peaks().items()
            if host == on_host and loading in (None, phase is Phase.LOADING)
        }
        moment = max(held, key=lambda phase: sum(held[phase].values()), default=Phase.LOADING)
        return moment, dict(sorted(held.get(moment, {}).items(), key=lambda item: -item[1]))

    def peak(self, loading: bool | None = None) -> float:
        """Bytes of a GPU then."""
        return sum(self.fullest(loading=loading)[1].values())


class Rehearsals:
    """Makes rehearsals, each in processes of its own: a fake group stays in a process for its lifetime. They are
    forked from one that has imported what they need and drawn the model: `here`, from this one, which must then
    have no threads and no GPU in use; else from one that is started for them.

        with Rehearsals() as rehearse:
            rehearse(Job(config, directory, world_size=64, ranks_per_node=8)).peak()
    """

    def __init__(self, here: bool = False):
        self._pool = None if here else ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent)

    def __enter__(self) -> "Rehearsals":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def __call__(self, job: Job) -> Rehearsed:
        """
        Raises:
            UserError: the configuration is refused, as training would.
            RunFailed: its code does something that fake tensors cannot.
        """
        job = replace(job, config=_plain(job.config))
        try:
            found = (
                _rehearsed(job, _in_child) if self._pool is None
                else self._pool.submit(_rehearsed, job, _in_child).result()
            )  # fmt: skip
        except BrokenProcessPool:
            raise RunFailed(_KILLED) from None
        if isinstance(found, Exception):
            raise found
        return found


def _rehearsed(job: Job, in_child: Callable[[Job], Any]) -> Rehearsed | UserError | RunFailed:
    """Draw the model, and rehearse it in processes forked from this one."""
    torch.set_num_threads(1)  # nothing here computes, and a fork of a process whose kernels had threads can hang
    drawn = _caught(_draw, job)
    if isinstance(drawn, Exception):
        return drawn
    weight_bytes = sizes_of(drawn.model).weight_bytes
    name, reason = strategy_for(job.config.parallel, weight_bytes, job.world_size, job.device_memory)
    found = [
        (type(block), *((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()))
        for block in blocks(drawn.model)
    ]
    depths: Sequence[int | None] = [job.blocks]
    others = next((i for i in range(len(found)) if len(set(found[i:])) == 1), 0)
    first, second = (others + count for count in _SHORT.get(name, (3, 4)))
    if job.blocks is None and len(found) > second:
        depths = (first, second)
    # Of a short model `auto` might make another.
    parallel = replace(job.config.parallel, strategy=name)  # type: ignore[arg-type]
    short = replace(job, config=replace(job.config, parallel=parallel))
    gc.freeze()  # the children's collections need not look at what is here
    children = [_fork(in_child, replace(short, blocks=n)) for n in depths]
    gc.unfreeze()
    results = [result() for result in children]
    runs = tuple(result for result in results if isinstance(result, Short))
    if len(runs) < len(results):
        return next(result for result in results if not isinstance(result, Short))
    experts = any(isinstance(module, ExpertsForward) for module in drawn.model.modules())
    return Rehearsed(job, name, reason, len(found), runs, drawn.coverage, experts)


def _fork(make: Callable[[Job], Any], job: Job) -> Callable[[], Any]:
    """Begin `make(job)` in a copy of this process, which ends with it. Returns what waits for the result."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(make, job, sender))
    process.start()
    sender.close()

    def result() -> Any:
        try:
            return receiver.recv()
        except EOFError:
            return RunFailed(_KILLED)
        finally:
            receiver.close()
            process.join()

    return result


def _send(make: Callable[[Job], Any], job: Job, sender: Connection) -> None:
    end_with_parent()
    sender.send(make(job))


def _in_child(job: Job) -> Short | UserError | RunFailed:
    return _caught(rehearse_here, job)


def _caught(make: Callable[[Job], T], job: Job) -> T | UserError | RunFailed:
    """Errors as values: not all that libraries raise can be sent to another process."""
    try:
        return make(job)
    except UserError as error:
        return UserError(str(error))
    except Exception as error:  # whatever a model's or a library's code does not do with fake tensors
        return RunFailed(_UNKNOWN + (str(error).strip() or type(error).__name__).splitlines()[0])


def _plain(config: RunConfig) -> RunConfig:
    """Without what changes nothing here: the values of an adapter to go on from, and compilation."""
    dora, train = replace(config.dora, init_from=None), replace(config.train, compile=False)
    return replace(config, dora=dora, train=train)


def rehearse_here(job: Job) -> Short:
    """In this process, which is of no other use afterwards."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing here asks a GPU, whether there is one or not
    # torch makes its pool of threads anew after a fork; two of autograd's threads that ask at once would fail.
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        fake_group(job.world_size, job.ranks_per_node),
        rehearsed_gpu() if job.gpu else nullcontext(),
        job.around() if job.around is not None else nullcontext(),
    ):
        warnings.simplefilter("ignore")
        blueprint = _draw(job)
        if job.blocks is not None:
            _shorten(blueprint.model, job.blocks)
        settings = (job.config.parallel, job.config.train)
        strategy = choose_strategy(*settings, sizes_of(blueprint.model), Processes(), job.device_memory)
        if strategy.name == "fsdp":
            strategy.mesh  # type: ignore[union-attr]  # noqa: B018 - a mesh cannot be made of fake tensors
        tracer = Tracer(collective_of, **({"rounded": rounded} if job.gpu else {"scratch_of": gloo_scratch}))
        batch = full_batch(job.config, job.world_size)  # real: the lengths of documents are read
        with (
            replacements(blueprint.model, strategy.name, tracer, job.gpu, job.every_piece),
            FakeTensorMode(allow_non_fake_inputs=True),
            tracer,
        ):
            count = sum(1 for _ in blocks(blueprint.model))
            _run(job, blueprint, strategy, tracer, batch)
        return Short(strategy.name, count, tracer.peaks, tracer.calls)


def _run(job: Job, blueprint: Blueprint, strategy: Strategy, tracer: Tracer, batch: GlobalBatch) -> None:
    config = job.config
    blueprint.model.config.pad_token_id = 0  # type: ignore[union-attr]  # RunData sets one: classifiers ask for it
    offloaded = HOST if config.parallel.cpu_offload and job.gpu else ""  # states and gradients
    weights_at = offloaded if strategy.name in ("fsdp", "zero3") else ""
    tracer.enter(Phase.LOADING, weights_at + BASE)
    blueprint = replace(blueprint, files=Files(blueprint.model, tracer))  # type: ignore[arg-type]
    built = build_to_train(blueprint, strategy)
    gc.collect()
    tag_what_is_held(built, tracer, weights_at)
    reduce_in_python(built.engine.module)
    tag_head(built.model, tracer)
    steps = 2  # the second has the optimizer's states
    watch: Any = Watch(tracer, offloaded)
    trainer = Trainer(built, config.model, config.train, config.data.packing, steps, watch)
    first = replace(batch, micro_batches=batch.micro_batches[:1])
    for step in range(steps):
        tracer.calls = []
        trainer.train_step(batch if step == steps - 1 else first)


def _draw(job: Job) -> Blueprint:
    """The last one drawn is kept: processes forked from this one find it, and so do other runs of its model."""
    global _last_drawn
    config = job.config
    split = job.world_size if config.parallel.strategy == "zero3" else 1
    checked = (config.data.packing, config.train.activation_checkpointing)
    about = (config.model, config.dora, config.quant, job.directory, split, checked)
    if _last_drawn is None or _last_drawn[0] != about:
        _last_drawn = about, make_blueprint(config, job.directory, job.world_size, from_files=False)
    return replace(_last_drawn[1], config=config)


def _shorten(model: nn.Module, count: int) -> None:
    """Leave the first blocks of it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                setattr(parent, name, child[:count])
