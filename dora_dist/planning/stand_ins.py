"""All that stands in a rehearsal for something else: for weight files, the watchdog and rows, and in the place of
what it replaces in torch, in DeepSpeed and in this package; and the names of what it holds and does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_dist.config import RunConfig
from dora_dist.data.batches import GlobalBatch
from dora_dist.dora import experts, norm_cache, norm_math, products
from dora_dist.models import weights
from dora_dist.models.weights import base_tensors, packed_layers
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.shards import Rectangle
from dora_dist.planning.fake_group import every_rank_alike, shapes_uncounted
from dora_dist.planning.trace import HOST, REDUCED, Collective, Tracer
from dora_dist.quant import modules
from dora_dist.training.optim import TrainableModel

BASE, SCALES, TRAINED, NORMS = "base weights", "scales of 4-bit weights", "A, B and m", "norms and other buffers"
STATES, GRADIENTS, ACTIVATIONS = "optimizer states", "gradients", "activations"
LOGITS, BACKWARD, OTHER, ROWS = "logits and loss", "backward's own tensors", "other", HOST + "rows of files"

_FEW_EXPERTS = 8  # of a block, besides the one that stands for all: to go through many takes a rehearsal time
_ALLOCATION = 512  # what torch's CUDA allocator rounds up to
_PINNED = {HOST + tag for tag in (BASE, SCALES, TRAINED, GRADIENTS)}
# What goes through a weight or an activation piece by piece holds the same for each.
_PIECES = (
    (modules, "pieces"), (weights, "_pieces"), (norm_math, "row_tiles"), (products, "row_tiles"),
    (products, "token_tiles"),
)  # fmt: skip


def tag_what_is_held(built: TrainableModel, tracer: Tracer, offloaded: str) -> None:
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


def tag_head(model: nn.Module, tracer: Tracer) -> None:
    """What is made inside the output head is logits and their loss."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return
    before = []

    def begin(*_: object) -> None:
        before.append((tracer.phase, tracer.tag))
        tracer.enter(Phase.HEAD, LOGITS)

    def end(*_: object) -> None:
        tracer.enter(*before.pop())

    head.register_forward_pre_hook(begin)
    head.register_forward_hook(end)


class Watch:
    """Told by the training loop what comes next, as the watchdog is."""

    def __init__(self, tracer: Tracer, offloaded: str):
        self.tracer, self.offloaded = tracer, offloaded

    def at(self, _: int, phase: Phase, number: int = 0, watched: bool = True) -> None:
        tracer = self.tracer
        tracer.micro = number
        if phase is Phase.STEP:
            for tag in (BACKWARD, REDUCED):
                tracer.rename(tag, self.offloaded + GRADIENTS)
        tags = {Phase.FORWARD: ACTIVATIONS, Phase.BACKWARD: BACKWARD, Phase.NORMS: OTHER}
        tracer.enter(phase, self.offloaded + STATES if phase is Phase.STEP else tags[phase])


class Files:
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


def full_batch(config: RunConfig, world_size: int) -> GlobalBatch:
    """One step's full rows: of two micro-batches where there are more, the first stands for all but the last."""
    B, T = config.sequences, config.data.seq_len
    ids = torch.zeros(B, T, dtype=torch.long)
    if config.model.causal:
        micro = {"input_ids": ids, "targets": ids}
        if config.train.objective == "kto":
            micro |= {"labels": ids[:, 0], "other_input_ids": ids, "other_targets": ids}
        if config.data.packing:
            micro |= {"position_ids": ids, "document_lengths": torch.full((B, 1), T)}
    else:
        micro = {"input_ids": ids, "attention_mask": ids, "labels": ids[:, 0]}
    tokens = B * T * world_size
    return GlobalBatch([micro] * min(2, config.train.accumulation), tokens, tokens)


def rounded(tag: str, size: int) -> int:
    """What torch's allocators take: of a GPU's memory multiples of 512 bytes, of pinned host memory powers of
    two."""
    if tag in _PINNED:
        return 1 << (size - 1).bit_length() if size else 0
    return -(-size // _ALLOCATION) * _ALLOCATION


def gloo_scratch(collective: Collective) -> int:
    """gloo gathers into memory of its own first, and reduces a copy."""
    return collective.bytes if collective.kind in ("all_gather", "reduce_scatter") and collective.ranks > 1 else 0


@contextmanager
def replacements(
    model: nn.Module, strategy: str, tracer: Tracer, gpu: bool = True, every_piece: bool = False
) -> Iterator[list[str]]:
    """Around a rehearsal of `model`; the names of what is replaced. Without `every_piece` it goes through the
    first piece of a weight alone.

    Raises:
        LookupError: something is not there, or was replaced in vain.
    """
    names = []
    with ExitStack() as around:

        def put(owner: Any, name: str, make: Callable, needed: bool = False) -> None:
            names.append(around.enter_context(replaced(owner, name, make, needed)))

        if gpu:
            put(F, "scaled_dot_product_attention", _as_on_gpus)
        put(experts, "tokens_each", _balanced)
        if not every_piece:
            for module, name in _PIECES:
                put(module, name, _first_of)
            put(norm_cache, "blocks", partial(_one_block_for_all, tracer=tracer))
            put(modules.Groups, "of", partial(_one_expert_for_all, tracer=tracer))
        for module, name, answer in every_rank_alike(zero=strategy.startswith("zero")):
            put(module, name, lambda _, answer=answer: answer)
        put(model, "to", lambda _: lambda *_, **__: model)  # torch cannot swap fake parameters
        put(torch, "compile", _uncompiled)
        put(*shapes_uncounted(tracer.paused), needed=strategy == "fsdp")
        put(torch.UntypedStorage, "resize_", tracer.following)
        yield names


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Callable], needed: bool = False) -> Iterator[str]:
    """What `make` makes of `owner.name` in its place; its full name. A name that another version has moved would
    be replaced in vain.

    Raises:
        LookupError: it is not there, or nothing has called it that is `needed`.
    """
    full = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not hasattr(owner, name):
        raise LookupError(f"{full} is to be replaced in a rehearsal, and is not there")
    calls, stand_in = 0, make(getattr(owner, name))

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return stand_in(*arguments, **options)

    with mock.patch.object(owner, name, counted):
        yield full
    if needed and not calls:
        raise LookupError(f"{full} was replaced in a rehearsal, and nothing called it")


def _uncompiled(_: Callable) -> Callable:
    """Of a library that decorates functions with torch.compile: nothing here computes, and inductor's import takes
    longer than a step."""
    return lambda model=None, **_: model or (lambda function: function)


def _balanced(_: Callable) -> Callable:
    """In place of counting a router's choices: as its losses have it, each expert gets as many tokens."""
    return lambda routed, experts: [len(range(e, len(routed), experts)) for e in range(experts)]


class _OneForAll(tuple):
    """The first stands for `number`, the rest for none."""

    tracer: Tracer
    number: int

    @classmethod
    def of(cls, items: Sequence[Any], tracer: Tracer, number: int) -> "_OneForAll":
        made = cls(items)
        made.tracer, made.number = tracer, number
        return made

    def __iter__(self) -> Iterator[Any]:
        items = super().__iter__()
        with self.tracer.standing_for(self.number):
            yield from islice(items, 1)
        with self.tracer.standing_for(0):
            yield from items


def _one_block_for_all(blocks: Callable, tracer: Tracer) -> Callable:
    def one(*rows: Any) -> Sequence[Any]:
        found = blocks(*rows)
        return _OneForAll.of(found[:1], tracer, len(found))

    return one


def _one_expert_for_all(of: Callable, tracer: Tracer) -> Callable:
    """Groups in which one expert's tokens stand for all experts', and a few other experts have the rest of the
    tokens, whose results are held."""

    def groups(counts: Sequence[int]) -> Any:
        active = sum(map(bool, counts))
        if active <= _FEW_EXPERTS:
            return of(counts)
        rest = sum(counts) - counts[0]
        few = [len(range(e, rest, _FEW_EXPERTS)) for e in range(_FEW_EXPERTS)]
        found = of([counts[0], *few, *[0] * (len(counts) - 1 - len(few))])
        return replace(found, spans=_OneForAll.of(found.spans, tracer, active))

    return groups


def _as_on_gpus(attend: Callable) -> Callable:
    """GPUs' kernels drop without holding what they drop, and take values of other sizes than queries; a CPU's
    attention would fall back to its definition, which holds all scores."""

    def attended(
        query: Tensor, key: Tensor, value: Tensor, *more: Any, dropout_p: float = 0, **options: Any
    ) -> Tensor:
        missing = query.shape[-1] - value.shape[-1]
        if missing > 0:
            value = F.pad(value, (0, missing))
        return attend(query, key, value, *more, **options)[..., : value.shape[-1] - max(0, missing)]

    return attended


def _first_of(pieces: Callable) -> Callable:
    return lambda *arguments: list(islice(pieces(*arguments), 1))
