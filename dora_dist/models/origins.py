"""Which elements of which file tensors a model's tensors are made of, as transformers declares it.

Published checkpoints have other names than the model, a tensor for each expert, or several tensors in one. What
transformers does to them while loading (conversion_mapping.py) runs here on tensors without numbers, which know
where each part of them comes from. Such an account serves both ways: to read any part of a model's tensor, and to
write a model's tensors as the checkpoint had them.
"""

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from dora_dist.errors import UserError


class Inexpressible(Exception):
    """An operation that moves elements in a way that boxes cannot say."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor: `size` elements from `start` in each dimension. The first is the element `offset` of the
    file tensor `source`, seen flat; a step along a dimension is a step of `stride` there."""

    source: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def cut(self, start: Sequence[int], stop: Sequence[int]) -> "Box | None":
        """What of it lies between these indices of the tensor."""
        low = [max(a, b) for a, b in zip(self.start, start, strict=True)]
        size = [min(a + n, b) - c for a, n, b, c in zip(self.start, self.size, stop, low, strict=True)]
        if any(n <= 0 for n in size):
            return None
        moved = sum((a - b) * s for a, b, s in zip(low, self.start, self.stride, strict=True))
        return replace(self, start=tuple(low), size=tuple(size), offset=self.offset + moved)

    def move(self, dim: int, by: int) -> "Box":
        return replace(self, start=tuple(a + by * (d == dim) for d, a in enumerate(self.start)))

    def places(self, start: Sequence[int]) -> tuple[slice, ...]:
        """Where it lies in the part of the tensor that begins at `start`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.start, start, self.size, strict=True))


class Traced(Tensor):
    """A tensor without numbers that knows its boxes, sorted. Operations that only move elements run on it."""

    boxes: list[Box]
    _rows: list[int]  # where each begins
    _most_rows: int  # of any of them

    @staticmethod
    def __new__(cls, shape: Sequence[int], boxes: list[Box]) -> "Traced":
        made = Tensor._make_wrapper_subclass(cls, tuple(shape))
        made.boxes = sorted(boxes, key=lambda box: box.start)
        made._rows = [box.start[0] for box in made.boxes if box.start]
        made._most_rows = max((box.size[0] for box in boxes if box.size), default=0)
        return made

    @classmethod
    def of_file(cls, source: str, shape: Sequence[int]) -> "Traced":
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return cls(shape, [Box(source, (0,) * len(shape), tuple(shape), strides)])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        run = _OPERATIONS.get(func.overloadpacket)
        if run is None:
            raise Inexpressible(str(func))
        return run(*args, **{k: v for k, v in (kwargs or {}).items() if k == "dim"})

    def told(self) -> str:
        """The file tensors that it is made of."""
        sources = list(dict.fromkeys(box.source for box in self.boxes))
        return f"the file's {sources[0]!r}" + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")

    def within(self, start: Sequence[int], stop: Sequence[int]) -> list[Box]:
        """The boxes of a part of it, in the whole's indices."""
        near = slice(None)
        if start:
            near = slice(bisect_right(self._rows, start[0] - self._most_rows), bisect_left(self._rows, stop[0]))
        return [part for box in self.boxes[near] if (part := box.cut(start, stop)) is not None]


def _narrow(x: Traced, dim: int, start: int, stop: int) -> Traced:
    dim %= x.dim()
    low, high = [0] * x.dim(), list(x.shape)
    low[dim], high[dim] = start, stop
    shape = [*x.shape[:dim], stop - start, *x.shape[dim + 1 :]]
    return Traced(shape, [box.move(dim, -start) for box in x.within(low, high)])


def _slice(x: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Traced:
    if step != 1:
        raise Inexpressible("slices with steps")
    begin, stop, _ = slice(start, end).indices(x.shape[dim])
    return _narrow(x, dim, begin, stop)


def _split(x: Traced, size: int | list[int], dim: int = 0) -> list[Traced]:
    whole = x.shape[dim]
    sizes = size if isinstance(size, list) else [min(size, whole - at) for at in range(0, whole, size)]
    return [_narrow(x, dim, *ends) for ends in pairwise(accumulate(sizes, initial=0))]


def _select(x: Traced, dim: int, index: int) -> Traced:
    index %= x.shape[dim]
    return _squeeze(_narrow(x, dim, index, index + 1), dim)


def _squeeze(x: Traced, dim: int) -> Traced:
    shape = list(x.shape)
    return _reshape(x, shape[:dim] + shape[dim:][1:] if shape[dim] == 1 else shape)


def _unsqueeze(x: Traced, dim: int) -> Traced:
    shape = list(x.shape)
    shape.insert(dim % (x.dim() + 1), 1)
    return _reshape(x, shape)


def _permute(x: Traced, dims: Sequence[int]) -> Traced:
    def turned(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[d] for d in dims)

    boxes = [Box(b.source, turned(b.start), turned(b.size), turned(b.stride), b.offset) for b in x.boxes]
    return Traced(turned(x.shape), boxes)


def _transpose(x: Traced, dim: int = 0, other: int = 1) -> Traced:
    dims = list(range(x.dim()))
    dims[dim], dims[other] = dims[other], dims[dim]
    return _permute(x, dims)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first, dim = tensors[0], dim % tensors[0].dim()
    starts = list(accumulate((x.shape[dim] for x in tensors), initial=0))
    for x in tensors:
        if any(n != want for d, (n, want) in enumerate(zip(x.shape, first.shape, strict=True)) if d != dim):
            raise UserError(
                f"model.path: {x.told()}, {list(x.shape)}, does not fit beside {first.told()}, {list(first.shape)}"
            )
    boxes = [box.move(dim, by) for x, by in zip(tensors, starts, strict=False) for box in x.boxes]
    return Traced([*first.shape[:dim], starts[-1], *first.shape[dim + 1 :]], boxes)


def _reshape(x: Traced, shape: Sequence[int]) -> Traced:
    """By way of the fewest dimensions of which both shapes' are products."""
    shape = [n if n >= 0 else x.numel() // -math.prod(shape) for n in shape]
    old, new = ([math.prod(s[d:]) for d in range(len(s) + 1)] for s in (x.shape, shape))
    cuts = sorted({*old, *new}, reverse=True)
    if old[0] != new[0] or any(a % b for a, b in pairwise(cuts)):
        raise Inexpressible(f"{tuple(x.shape)} as {tuple(shape)}")
    factors = [a // b for a, b in pairwise(cuts)]

    def of(ends: list[int]) -> list[list[int]]:
        return [factors[cuts.index(a) : cuts.index(b)] for a, b in pairwise(ends)]

    boxes = [made for box in x.boxes for made in _merged(_unmerged(box, of(old)), of(new))]
    return Traced(shape, boxes)


def _unmerged(box: Box, factors: list[list[int]]) -> Box:
    """Each dimension as several."""
    start, size, stride = [], [], []
    for a, n, step, inner in zip(box.start, box.size, box.stride, factors, strict=True):
        for index, (first, count) in enumerate(_range(a, n, inner)):
            start.append(first)
            size.append(count)
            stride.append(step * math.prod(inner[index + 1 :]))
    return Box(box.source, tuple(start), tuple(size), tuple(stride), box.offset)


def _range(start: int, count: int, factors: list[int]) -> list[tuple[int, int]]:
    """`count` indices of a dimension that is the product of `factors`, as ranges in each of these."""
    if len(factors) < 2:
        return [(start, count)] * len(factors)
    inner = math.prod(factors[1:])
    if start % inner == count % inner == 0:
        return [(start // inner, count // inner), *((0, n) for n in factors[1:])]
    if start // inner != (start + count - 1) // inner:
        raise Inexpressible("a range that ends inside a dimension's part")
    return [(start // inner, 1), *_range(start % inner, count, factors[1:])]


def _merged(box: Box, groups: list[list[int]]) -> Iterator[Box]:
    """Groups of dimensions as one each; where that is no box, the boxes that it is."""
    first, start, size, stride = 0, [], [], []
    for group in groups:
        own = range(first, first + len(group))
        first += len(group)
        outer = 1
        for dim, after in pairwise(own):
            outer *= box.size[dim]
            full = group[after - own[0]]
            joined = box.size[after] == full and box.stride[dim] == box.stride[after] * full
            if outer > 1 and not joined:
                for index in range(box.start[dim], box.start[dim] + box.size[dim]):
                    low, high = list(box.start), [a + n for a, n in zip(box.start, box.size, strict=True)]
                    low[dim], high[dim] = index, index + 1
                    part = box.cut(low, high)
                    assert part is not None
                    yield from _merged(part, groups)
                return
        start.append(sum(box.start[d] * math.prod(group[d - own[0] + 1 :]) for d in own))
        size.append(math.prod(box.size[d] for d in own))
        stride.append(box.stride[own[-1]] if group else 0)
    yield Box(box.source, tuple(start), tuple(size), tuple(stride), box.offset)


_aten = torch.ops.aten
_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.slice: _slice,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.select: _select,
    _aten.unbind: lambda x, dim=0: [_select(x, dim, index) for index in range(x.shape[dim])],
    _aten.squeeze: _squeeze,
    _aten.unsqueeze: _unsqueeze,
    _aten.transpose: _transpose,
    _aten.t: _transpose,
    _aten.permute: _permute,
    _aten.cat: _cat,
    _aten.stack: lambda tensors, dim=0: _cat([_unsqueeze(x, dim) for x in tensors], dim),
    **dict.fromkeys((_aten.view, _aten._unsafe_view), _reshape),
    **dict.fromkeys((_aten.clone, _aten.detach, _aten.alias, _aten._to_copy), lambda x: Traced(x.shape, x.boxes)),
}  # fmt: skip


def declared_origins(model: Any, files: Mapping[str, Traced]) -> dict[str, Traced]:
    """Of each of the model's tensors that transformers makes of these file tensors, what it is made of. Those that
    it makes in ways that boxes cannot say are left out.

    Raises:
        UserError: file tensors of which one is to be made do not fit together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    found: dict[str, Traced] = {}
    groups: dict[str, tuple[Any, dict[str, list[Traced]]]] = {}
    for source in sorted(files, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
        if target not in wanted and source in wanted:
            target, pattern = rename_source_key(source, [], [], prefix, wanted)
        if target not in wanted:
            continue
        if pattern is None:
            found.setdefault(target, files[source])
            continue
        collected = groups.setdefault(target, (converter_of[pattern], {}))[1]
        collected.setdefault(pattern, []).append(files[source])
    for target, (converter, collected) in groups.items():
        found |= _converted(model, target, converter, collected)
    return {name: traced for name, traced in found.items() if name in wanted}


def published_origins(model: Any, own: Mapping[str, Traced]) -> dict[str, Traced]:
    """Of each tensor as transformers saves it, which is as it is published, what it is made of. `own`: the model's
    tensors. They are left as they are where boxes cannot say what becomes of them."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, dict(own))
    except Exception as error:  # whatever an operation makes of tensors without numbers
        logging.getLogger(__name__).debug("the names stay the model's: %s", error)
        return dict(own)


def _converted(model: Any, target: str, converter: Any, collected: dict[str, list[Traced]]) -> dict[str, Traced]:
    """The model's tensors that one declared conversion makes of file tensors; none if it cannot."""
    values: dict[str, Any] = collected
    about = {"source_patterns": converter.source_patterns, "target_patterns": converter.target_patterns}
    try:
        for operation in converter.operations:
            values = operation.convert(
                values, **about, full_layer_name=target, model=model, config=model.config, missing_keys=None
            )
    except UserError:
        raise
    except Exception as error:  # whatever an operation meets that its file tensors do not fit
        logging.getLogger(__name__).debug("%s cannot be read by slices: %s", target, error)
        return {}
    whole = target.replace("*.", "0.")
    prefix, _, suffix = next((whole.partition(key) for key in values if key in whole), ("", "", ""))
    made = {prefix + key + suffix: x[0] if isinstance(x, list) else x for key, x in values.items()}
    return {name: x for name, x in made.items() if isinstance(x, Traced)}
