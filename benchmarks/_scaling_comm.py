"""What a training step sends and how long it waits for that, seen from outside: nothing of the step is replaced.

Counting: a dispatch mode sees every collective that goes through torch's dispatcher, whether FSDP2, DDP's reducer
(in C++), DeepSpeed or we ask for it. Waiting: on the host, every wait for a collective goes through `Work.wait`,
but for DDP's, which its reducer does after the last gradient; on a GPU the profiler's intervals are taken.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.phases import Phase

PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.NORMS)
COLLECTIVES = {  # the beginning of an operator's name -> the collective
    "allgather": "all_gather", "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce", "all_reduce": "all_reduce",
    "alltoall": "all_to_all", "all_to_all": "all_to_all",
    "reduce": "reduce", "broadcast": "broadcast", "gather": "gather", "scatter": "scatter", "barrier": "barrier",
    "monitored_barrier": "barrier", "send": "send", "recv": "receive",
}  # fmt: skip
Counts = dict[str, dict[str, dict[str, int]]]  # purpose -> collective -> {"count", "bytes"}


class Phases:
    """Stands in the watchdog's place, which the training loop tells what it does next."""

    def __init__(self) -> None:
        self.now, self.since = Phase.START, 0.0

    def at(self, step: int, phase: Phase, number: int = 0, watched: bool = True) -> None:
        assert phase in PHASES, phase
        self.now, self.since = phase, time.perf_counter()


class Counter(TorchDispatchMode):
    """Collectives by purpose, and the bytes of each one's whole vector: what an all-gather has gathered, what a
    reduce-scatter or an all-reduce sums (of which a reduce-scatter leaves each rank a part)."""

    def __init__(self, phases: Phases):
        super().__init__()
        self.phases = phases
        self.counts: Counts = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again, as operations on local tensors
        result = func(*args, **(kwargs or {}))
        collective = collective_of(func)
        if collective is not None:
            row = self.counts.setdefault(self._purpose(collective), {}).setdefault(
                collective, {"count": 0, "bytes": 0}
            )
            row["count"] += 1
            row["bytes"] += max(map(tensor_bytes, (*args[:2], result)))
        return result

    def _purpose(self, collective: str) -> str:
        gathers = collective == "all_gather"
        return {
            Phase.FORWARD: "forward gathers" if gathers else "forward",
            Phase.BACKWARD: "backward gathers" if gathers else "gradients",
        }.get(self.phases.now, self.phases.now.value)

    def by_collective(self) -> dict[str, dict[str, int]]:
        totals: dict[str, dict[str, int]] = {}
        for rows in self.counts.values():
            for collective, row in rows.items():
                total = totals.setdefault(collective, {"count": 0, "bytes": 0})
                for key, value in row.items():
                    total[key] += value
        return totals


def collective_of(func: Any) -> str | None:
    """The collective that an operator is; None: another operator, or a wait."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace not in ("c10d", "_c10d_functional"):
        return None
    name = name.strip("_")
    return next((collective for start, collective in COLLECTIVES.items() if name.startswith(start)), None)


def tensor_bytes(value: Any) -> int:
    """Of a tensor, or of all in (lists of) lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


class Waits:
    """Seconds that this rank spends waiting for collectives, by phase, between two calls of `take`."""

    def __init__(self, phases: Phases, model: nn.Module, reducer: bool):
        """`reducer`: DDP's averages the gradients of `model`, and waits after the last of them."""
        self.phases, self.seconds = phases, defaultdict[Phase, float](float)
        self._last_gradient: float | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._mark) for p in trained(model)] if reducer else []

    def take(self) -> dict[str, float]:
        taken, self.seconds = {phase.value: self.seconds.get(phase, 0.0) for phase in PHASES}, defaultdict(float)
        return taken

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around steps: `Work.wait` is timed, and what DDP waits at the end of the backward."""
        wait, at = dist.Work.wait, self.phases.at

        def timed_wait(work: dist.Work, *args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *args, **options)
            finally:
                self.seconds[self.phases.now] += time.perf_counter() - start

        def timed_at(*args: Any, **options: Any) -> None:
            at(*args, **options)
            if self.phases.now is Phase.STEP and self._last_gradient is not None:
                self.seconds[Phase.BACKWARD] += self.phases.since - self._last_gradient

        dist.Work.wait, self.phases.at = timed_wait, timed_at  # type: ignore[method-assign]
        try:
            yield
        finally:
            dist.Work.wait, self.phases.at = wait, at  # type: ignore[method-assign]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _mark(self, _: Tensor) -> None:
        self._last_gradient = time.perf_counter()


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def profiled_exposure(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step in which the GPU runs NCCL's kernels and no other. Not tried on a GPU yet."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize(device)
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    intervals: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in kernels:
        intervals["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    return uncovered(intervals[True], intervals[False]) / 1e6  # microseconds


def uncovered(intervals: Iterable[tuple[float, float]], by: Iterable[tuple[float, float]]) -> float:
    """The length of the union of `intervals` that the union of `by` does not cover."""
    both = united([*intervals, *by])
    return length(both) - length(united(by))


def united(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
