"""One way to time: contenders take turns within a process, so that what disturbs the machine disturbs all."""

import ctypes
import math
import time
from collections.abc import Callable, Iterator

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
Seconds = dict[str, list[float]]  # contender -> one a round


def take_turns(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device, end: float = math.inf
) -> Iterator[Seconds]:
    """Time each once a round, in rotating order. Yields the seconds so far after each round, of which none but the
    first begins after `end` (time.monotonic)."""
    names = list(works)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(rounds):
        if turn and time.monotonic() > end:
            return
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(time_once(works[name], device))
        yield seconds


def time_rounds(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> Seconds:
    *_, seconds = take_turns(works, rounds, device)
    return seconds


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """A CPU by the process's CPU time, a GPU by events."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed. Else some rounds pay for its pages again and others do not, by how
    the heap happens to lie: up to a fifth of a backward's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def wall_seconds(work: Callable[[], object], device: torch.device) -> float:
    """With what a GPU still does, and what waits for other processes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def growth(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a GPU holds while `work` runs, beyond those before it; 0 on a CPU. Runs it."""
    if device.type == "cpu":
        work()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
