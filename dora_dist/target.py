"""Which kind of device code is run for: the one that its tensors lie on, or the GPU that a rehearsal stands for.

A rehearsal (rehearse.py) runs on fake tensors that lie on no device but say "cpu". What chooses between a GPU's
way and a CPU's asks here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

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
