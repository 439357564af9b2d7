"""What a program does with fake tensors: the memory it holds, the kernels it starts, the collectives it sends.

Nothing is computed. Fake tensors (torch's FakeTensorMode) have shapes, dtypes and storages of a size but no
memory, so a model of any size goes through the very code that trains it, and a `Tracer` around it writes down
what happens.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

from dora_dist.parallel.phases import Phase

HOST = "host: "
"""What is held for something that begins so lies in host memory."""
GATHERED, REDUCED = "gathered weights", "gradients under way"
COPY_IN = "all_gather_copy_in"  # FSDP2's
_MAKES_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ANSWERS = {torch.bool: True, torch.uint8: 0}  # to the host that asks for a tensor's value; else 1


Peaks = dict[tuple[Phase, bool], dict[str, float]]  # (phase, on the host) -> what is held at the fullest -> bytes


class Collective(NamedTuple):
    """What is sent by one call. `bytes`: of what is gathered, reduced or sent, whole; `ranks`: of the group;
    `stride`: between neighbours in it (1: those of a machine are side by side); `blocks`: the host waits."""

    kind: str
    bytes: int
    ranks: int
    stride: int
    blocks: bool


@dataclass(frozen=True)
class Call:
    """One kernel, or one collective. `reads` and `writes`: the storages, by number."""

    name: str
    phase: Phase
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    bytes: int = 0  # read and written
    host_bytes: int = 0  # those of them that lie in host memory
    flops: int = 0
    dtype: torch.dtype = torch.float32  # of what is multiplied
    micro: int = 0  # the micro-batch, from 1; 0: none
    collective: Collective | None = None
    times: int = 1  # that it is run: it stands for others alike


class _Held:
    __slots__ = ("bytes", "number", "tag", "watch")

    def __init__(self, number: int, tag: str):
        self.number, self.tag, self.bytes = number, tag, 0
        self.watch: Any = None


class Tracer(TorchDispatchMode):
    """Around code that works on fake tensors, inside FakeTensorMode. `phase` is what that code is doing, and peaks
    are kept for each; `tag` is what new memory is held for."""

    def __init__(
        self,
        collective_of: Callable[[Any, tuple, dict[str, Any]], Collective | None],
        scratch_of: Callable[[Collective], int] = lambda _: 0,
        rounded: Callable[[str, int], int] = lambda tag, size: size,
    ):
        """`collective_of`: what an operator's call sends, known to who knows the process groups; `scratch_of`:
        what its library holds until it is done; `rounded`: what an allocator takes for some bytes, held for a
        tag."""
        super().__init__()
        self.collective_of, self.scratch_of, self.rounded = collective_of, scratch_of, rounded
        self.phase, self.tag = Phase.START, Phase.START.value
        self.micro, self.times = 0, 1
        self.live: Counter[str] = Counter()
        self.peaks: Peaks = {}
        self.calls: list[Call] = []
        self._totals, self._most = [0, 0], Counter[tuple[Phase, bool]]()
        self._held: dict[int, _Held] = {}
        self._paused = False
        self._behind = ("", 0)  # what the last collective holds: it may still run beside the next
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap `__torch_dispatch__` so that dynamo passes it over, at a tenth of a rehearsal's time;
        nothing is compiled in one."""
        return False

    def enter(self, phase: Phase, tag: str) -> None:
        self.phase, self.tag = phase, tag
        for on_host in (False, True):
            self._note_peak(on_host)

    def retag(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are held for."""
        for tensor in tensors:
            held = self._held.get(tensor.untyped_storage()._cdata)
            if held is not None:
                self._set(held, held.bytes, tag)

    def rename(self, old: str, new: str) -> None:
        """All that is held for `old` is held for `new` from now on."""
        for held in list(self._held.values()):
            if held.tag == old:
                self._set(held, held.bytes, new)

    def held_for(self, tag: str) -> AbstractContextManager:
        """New memory is held for `tag` inside."""
        return mock.patch.object(self, "tag", tag)

    def standing_for(self, count: int) -> AbstractContextManager:
        """What is run inside stands for as many runs; for none if others stand for it."""
        return mock.patch.object(self, "times", self.times * count)

    def paused(self) -> AbstractContextManager:
        """Nothing is counted inside."""
        return mock.patch.object(self, "_paused", True)

    def following(self, resize: Callable) -> Callable:
        """A storage's `resize_` that is counted: FSDP2 frees gathered weights by it, and takes memory for them
        again."""

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            held = self._held.get(storage._cdata)
            if held is not None:
                self._set(held, size, GATHERED)
            return result

        return resized

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # most of all calls
            return args[0].fake_device
        if func is torch.ops.aten.slice.Tensor and type(args[0]) is FakeTensor:  # most of all others, by ZeRO-3
            return self._sees_view(args[0], func, args, kwargs or {})
        kwargs = kwargs or {}
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        if any(is_traceable_wrapper_subclass(tensor) for tensor in inputs):
            return NotImplemented  # a DTensor: what it does with its local part comes here by itself
        fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)  # a mesh of ranks, say, has values
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            return _ANSWERS.get(args[0].dtype, 1)
        if fake and func is torch.ops.aten.nonzero.default:  # every token is learned
            result = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        elif fake and func.is_view and len(inputs) == 1:
            return self._sees_view(inputs[0], func, args, kwargs)
        elif func is torch.ops.aten.cat.default and _are_alike(inputs):
            result = inputs[0].new_empty(sum(map(len, inputs)))
        else:
            result = func(*args, **kwargs)
        if not self._paused:
            self._record(func, args, kwargs, inputs, result)
        return result

    def _sees_view(self, tensor: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        """It holds nothing, and starts no kernel."""
        if not self._paused:
            self._hold(tensor)
        return _view(tensor, func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], result: Any) -> None:
        read = {self._hold(t).number: t for t in inputs}
        before = self._count
        outputs = list(_tensors((result,)))
        new = {held.number: t for t in outputs if (held := self._hold(t)).number > before}
        collective = self.collective_of(func, args, kwargs)
        changed = list(_changed(func, args, kwargs)) if func._schema.is_mutable else []
        copies_in = func._opname == COPY_IN  # whose schema does not say that it writes
        if copies_in:
            inputs, changed = args[0], [args[1]]
        if collective is None and (func._opname in _MAKES_NO_KERNEL or not (new or changed)):
            return  # a view, or memory alone
        written = {*new, *(self._hold(t).number for t in changed or (inputs if collective else ()))}
        if collective is not None:
            self._begin(collective, inputs)
        touched = [*inputs, *new.values()]
        size = sum(_extent(t) for t in touched)
        call = Call(
            func._opname,
            self.phase,
            tuple(read),
            tuple(written),
            2 * size if copies_in else size,
            sum(_extent(t) for t in touched if self._hold(t).tag.startswith(HOST)),
            _flops(func, args, kwargs, result),
            inputs[0].dtype if inputs else torch.float32,
            self.micro,
            collective,
            self.times,
        )
        self.calls.append(call)
        if copies_in and call.host_bytes:  # offloaded rows lie on the GPU until they are sent
            self._add(GATHERED, call.host_bytes)
            self._add(GATHERED, -call.host_bytes)

    def _begin(self, collective: Collective, tensors: list[Tensor]) -> None:
        tag = GATHERED if collective.kind == "all_gather" else REDUCED
        for held in (self._hold(tensor) for tensor in tensors):
            if held.tag == self.tag:  # made for it
                self._set(held, held.bytes, tag)
        scratch = self.scratch_of(collective)
        self._add(tag, scratch)
        self._add(*self._behind)
        self._behind = tag, -scratch
        if collective.blocks:
            self._add(*self._behind)
            self._behind = tag, 0

    def _hold(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self._held.get(key)
        if held is None:
            self._count += 1
            held = self._held[key] = _Held(self._count, self.tag)
            held.watch = weakref.ref(storage, lambda _: self._release(key))
            self._set(held, 0 if tensor.is_meta else storage.nbytes(), self.tag)
        return held

    def _release(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._set(held, 0, held.tag)

    def _set(self, held: _Held, size: int, tag: str) -> None:
        size = self.rounded(tag, size)
        self._add(held.tag, -held.bytes)
        held.tag, held.bytes = tag, size
        self._add(tag, size)

    def _add(self, tag: str, size: int) -> None:
        on_host = tag.startswith(HOST)
        self.live[tag] += size
        self._totals[on_host] += size
        if size > 0:
            self._note_peak(on_host)

    def _note_peak(self, on_host: bool) -> None:
        key = (self.phase, on_host)
        if self._totals[on_host] >= self._most[key]:
            self._most[key] = self._totals[on_host]
            self.peaks[key] = {t: n for t, n in self.live.items() if n and t.startswith(HOST) == on_host}


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of one call. Attention, which torch counts as if it were not causal or, on CPUs, not at all, by a rule here:
    two products of [T, D] with [D, S] a head in the forward, five in the backward."""
    name = func._opname
    if "attention_for_cpu" in name or "varlen_attn" in name:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        products = 5 if "backward" in name else 2
        query, key = given["query"], given["key"]
        if "varlen" in name:  # [B T, N, D]; `max_k`: the longest document
            pairs, causal = query.shape[0] * int(given["max_k"]), True
            heads, D = query.shape[1], query.shape[2]
        else:
            B, heads, T, D = query.shape
            pairs, causal = B * T * key.shape[2], bool(given.get("is_causal"))
        return 2 * products * pairs * heads * D // (2 if causal else 1)
    counted = flop_registry.get(func._overloadpacket)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=result))


def _extent(tensor: Tensor) -> int:
    """Bytes that a kernel touches of it: expanded dimensions are read from the caches."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes in place."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors((value,))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among `values`, and in the lists there."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are fake, one-dimensional and of one dtype and device: the parts that many ranks sent. What such
    a list makes needs no thought, which takes FakeTensorMode time for each part."""
    kinds = {(type(t), t.dim(), t.dtype, t.device) for t in tensors}
    return len(kinds) == 1 and next(iter(kinds))[:2] == (FakeTensor, 1)


def _view(tensor: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What FakeTensorMode makes of an operator that gives views of `tensor`, in a quarter of its time: there are
    more of these than of all others, and their devices and shapes need no thought."""
    with in_kernel_invocation_manager(tensor.fake_mode):
        result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return FakeTensor(tensor.fake_mode, result, tensor.fake_device)
    return type(result)(FakeTensor(tensor.fake_mode, view, tensor.fake_device) for view in result)
