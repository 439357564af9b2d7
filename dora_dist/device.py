"""What depends on the device: which kind code is run for, the dtypes and copies that go with it, time and memory.

Code is run for the device that its tensors lie on, or for the GPU that a rehearsal stands for: a rehearsal runs on
fake tensors that lie on no device but say "cpu". What chooses between a GPU's way and a CPU's asks here.
"""

import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)

_gpu_is_rehearsed = False


def is_gpu(device: torch.device) -> bool:
    """Whether to go a GPU's way with tensors of `device`."""
    return device.type == "cuda" or _gpu_is_rehearsed


def gpu_is_rehearsed() -> bool:
    """Whether tensors stand for those of a GPU that may not be there."""
    return _gpu_is_rehearsed


@contextmanager
def rehearsed_gpu() -> Iterator[None]:
    """Inside, fake tensors stand for a GPU's."""
    global _gpu_is_rehearsed
    _gpu_is_rehearsed = True
    try:
        yield
    finally:
        _gpu_is_rehearsed = False


def constant_when_compiled(function: Function) -> Function:
    """torch.compile calls it once and takes the result for a constant: what imports a library cannot be traced.
    torch.compiler.assume_constant_result does the same, and imports all of torch._dynamo, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, ratios and trained tensors of a base of `dtype` are held: fp32, or fp64."""
    return torch.promote_types(dtype, torch.float32)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor copied without making the host wait: to a GPU from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Stopwatch:
    """Time spent in a `with` block: by events on a GPU, so that nothing waits for it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> "Stopwatch":
        self._marks = [self._mark()]
        return self

    def __exit__(self, *exception: object) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Of the latest block; 0 before the first."""
        if len(self._marks) < 2:
            return 0.0
        start, end = self._marks
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, of the process's resident memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_host_memory() -> float:
    """Bytes that a program can still take; infinite where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else float("inf")
