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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
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
from dora_dist.build import Blueprint, Built, Strategy, build, choose_strategy, draw_blueprint
from dora_dist.config import RunConfig
from dora_dist.data import GlobalBatch
from dora_dist.errors import RunFailed, UserError
from dora_dist.shards import Rectangle, blocks
from dora_dist.target import rehearsed_gpu
from dora_dist.trace import HOST, REDUCED, Call, Collective, Tracer
from dora_dist.trainer import Trainer
from dora_dist.weights import base_tensors, packed_layers

_attend = F.scaled_dot_product_attention
_SHORT = {"zero3": (3, 5)}  # blocks of the two short versions, else 3 and 4: ZeRO-3 is at two blocks at a time
_STEPS = {"zero3": 3}  # else 2: the second has the optimizer's states, the third ZeRO-3's prefetches
_ALLOCATION = 512  # what torch's CUDA allocator rounds up to
BASE, SCALES, TRAINED, NORMS = "base weights", "scales of 4-bit weights", "A, B and m", "norms and other buffers"
STATES, GRADIENTS, ACTIVATIONS = "optimizer states", "gradients", "activations"
LOGITS, BACKWARD, OTHER, ROWS = "logits and loss", "backward's own tensors", "other", HOST + "rows of files"
LOADING, FORWARD, HEAD, BACK, STEP, REFRESH = "loading", "forward", "loss", "backward", "optimizer step", "norms"

_UNKNOWN = "this run cannot be rehearsed, so whether it fits is not known: "
# What goes through a weight piece by piece holds the same for each.
_PIECES = ((packed, "_pieces"), (weights, "_pieces"), (decomposition, "row_tiles"), (products, "row_tiles"))
_PINNED = {HOST + tag for tag in (BASE, SCALES, TRAINED, GRADIENTS)}

Peaks = dict[tuple[str, bool], dict[str, float]]  # (phase, on the host) -> what is held at the fullest -> bytes


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
            if host == on_host and loading in (None, phase == LOADING)
        ]
        return max(sums, default=0.0)


def rehearse(job: Job) -> Rehearsed:
    """Rehearse a run, in processes of their own: a fake group stays in a process for its lifetime.

    Raises:
        UserError: the configuration is refused, as training would.
        RunFailed: its code does something that fake tensors cannot.
    """
    job = replace(job, config=_plain(job.config))
    total, depths = _depths(job)
    context = multiprocessing.get_context("spawn")
    with ExitStack() as pools:
        futures = [
            pools.enter_context(ProcessPoolExecutor(1, mp_context=context)).submit(
                _in_child, replace(job, blocks=n)
            )
            for n in depths
        ]
        try:
            found = [future.result() for future in futures]
        except BrokenProcessPool:
            raise RunFailed(_UNKNOWN + "its process was killed; perhaps the machine has no memory left") from None
    for result in found:
        if isinstance(result, Exception):
            raise result
    runs = tuple(result for result in found if isinstance(result, Short))
    return Rehearsed(job, runs[0].strategy, total, runs)


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
        tracer = Tracer(collective_of, **({"rounded": _rounded} if job.gpu else {"scratch_of": _gloo_scratch}))
        around.enter_context(shapes_uncounted(tracer.paused))
        batch = _batch(job.config, job.world_size)  # real: the lengths of documents are read
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
    tracer.enter(LOADING, weights_at + BASE)
    blueprint = replace(blueprint, files=_Files(blueprint.model, tracer))  # type: ignore[arg-type]
    built = build(blueprint, strategy)
    gc.collect()
    _tell_apart(built, tracer, weights_at)
    send_in_python(built.engine.module)
    _tell_head(built.model, tracer)
    steps = _STEPS.get(strategy.name, 2)
    told: Any = SimpleNamespace(steps=steps, causal=config.model.task == "causal_lm")
    trainer = Trainer(config, built, strategy, told, log=None, watch=_Watch(tracer, offloaded))  # type: ignore[arg-type]
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


def _tell_apart(built: Built, tracer: Tracer, offloaded: str) -> None:
    """What is held once all is loaded, by what it is."""
    tracer.rename(offloaded + BASE, offloaded + OTHER)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    scales = [part for layer in packed_layers(built.model).values() for part in layer.weight_parts[1:]]
    others = {id(p) for p in [*trained, *scales]}
    base = [p for p in built.model.parameters() if id(p) not in others]
    for tag, parameters in ((BASE, base), (TRAINED, trained), (SCALES, scales)):
        tracer.retag(offloaded + tag, _own(parameters))
    tracer.retag(NORMS, built.model.buffers())


def _own(parameters: Sequence[Any]) -> Iterator[Tensor]:
    """What this rank holds of each."""
    for parameter in parameters:
        own = getattr(parameter, "ds_tensor", parameter)
        yield own.detach().to_local() if hasattr(own, "to_local") else own


def _tell_head(model: nn.Module, tracer: Tracer) -> None:
    """What is made inside the output head is logits and their loss."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return
    before = []

    def begin(*_: object) -> None:
        before.append((tracer.phase, tracer.tag))
        tracer.enter(HEAD, LOGITS)

    def end(*_: object) -> None:
        tracer.enter(*before.pop())

    head.register_forward_pre_hook(begin)
    head.register_forward_hook(end)


class _Watch:
    """Told by the training loop what comes next, as the watchdog is."""

    def __init__(self, tracer: Tracer, offloaded: str):
        self.tracer, self.offloaded = tracer, offloaded

    def at(self, _: int, operation: str, watched: bool = True) -> None:
        tracer = self.tracer
        if operation.startswith("forward"):
            tracer.micro = int(operation.rpartition(" ")[2])
            tracer.enter(FORWARD, ACTIVATIONS)
        elif operation.startswith("backward"):
            tracer.enter(BACK, BACKWARD)
        elif operation.startswith("gradient norm"):
            tracer.micro = 0
            for tag in (BACKWARD, REDUCED):
                tracer.rename(tag, self.offloaded + GRADIENTS)
            tracer.enter(STEP, self.offloaded + STATES)
        else:
            tracer.enter(REFRESH, OTHER)


class _Files:
    """Weight files that hold just what the model needs, and give fake rows of it."""

    pickled: Sequence[Path] = ()

    def __init__(self, model: nn.Module, tracer: Tracer):
        self.tracer, self.four_bit, self.stored = tracer, {}, {}  # type: ignore[var-annotated]
        layers = packed_layers(model)
        self._dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in base_tensors(model).items():
            layout = layers[tensor].layout if tensor in layers else None
            self.shapes[name] = layout.shape if layout else tuple(tensor.shape)
            self._dtypes[name] = layout.dtype if layout else tensor.dtype

    def read(self, name: str, own: Rectangle) -> Tensor:
        with self.tracer.held_for(ROWS):
            return torch.empty(own.values.shape, dtype=self._dtypes[name])

    def rows(self, name: str, rows: slice) -> Tensor:
        with self.tracer.held_for(ROWS):
            return torch.empty(rows.stop - rows.start, self.shapes[name][1], dtype=self._dtypes[name])


def _batch(config: RunConfig, world_size: int) -> GlobalBatch:
    """One step's full rows: of two micro-batches where there are more, the first stands for all but the last."""
    B, T = config.train.micro_batch_size, config.data.seq_len
    ids = torch.zeros(B, T, dtype=torch.long)
    if config.model.task == "causal_lm":
        micro = {"input_ids": ids, "targets": ids}
        if config.data.packing:
            micro |= {"position_ids": ids, "document_lengths": torch.full((B, 1), T)}
    else:
        micro = {"input_ids": ids, "attention_mask": ids, "labels": ids[:, 0]}
    tokens = B * T * world_size
    return GlobalBatch([micro] * min(2, config.train.accumulation), tokens, tokens)


def _rounded(tag: str, size: int) -> int:
    """What torch's allocators take: of a GPU's memory multiples of 512 bytes, of pinned host memory powers of
    two."""
    if tag in _PINNED:
        return 1 << (size - 1).bit_length() if size else 0
    return -(-size // _ALLOCATION) * _ALLOCATION


def _gloo_scratch(collective: Collective) -> int:
    """gloo gathers into memory of its own first, and reduces a copy."""
    return collective.bytes if collective.kind in ("all_gather", "reduce_scatter") and collective.ranks > 1 else 0
