"""How long a training step waits for collectives, seen from outside: nothing of the step is replaced.

On the host every wait for a collective goes through `Work.wait`, but for DDP's, which its reducer does after the
last gradient; on a GPU the profiler's intervals are taken.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dora_dist.parallel.phases import Phase

PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.NORMS)


class Phases:
    """Stands in the watchdog's place, which the training loop tells what it does next."""

    def __init__(self) -> None:
        self.now, self.since = Phase.START, 0.0

    def at(self, step: int, phase: Phase, number: int = 0, watched: bool = True) -> None:
        assert phase in PHASES, phase
        self.now, self.since = phase, time.perf_counter()

    def purpose(self, collective: str) -> str:
        """What a collective is for that is sent now."""
        gathers = collective == "all_gather"
        return {
            Phase.FORWARD: "forward gathers" if gathers else "forward",
            Phase.BACKWARD: "backward gathers" if gathers else "gradients",
        }.get(self.now, self.now.value)


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
    intervals: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            intervals["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    return uncovered(intervals[True], intervals[False]) / 1e6  # microseconds


def uncovered(intervals: Iterable[tuple[float, float]], by: Iterable[tuple[float, float]]) -> float:
    """The length of the union of `intervals` that the union of `by` does not cover."""
    edges = [(end, which, step) for which, spans in enumerate((intervals, by)) for span in spans
             for end, step in zip(span, (1, -1), strict=True)]  # fmt: skip
    total, since, inside = 0.0, 0.0, [0, 0]
    for at, which, step in sorted(edges):
        if inside[0] and not inside[1]:
            total += at - since
        since = at
        inside[which] += step
    return total
