"""An output that the backward reads, though the model may write into it: OLMo clamps it, others have a
ReLU(inplace=True) behind it.

Autograd's own check would make that an error, and checkpointing, whose hooks hide it from that check, a wrong
gradient. Here the backward asks, and computes the output anew where it was written into.
"""

import torch
from torch import Tensor


class KeptOutput:
    """Knows whether an output was written into after it was given out. It shares the output's version counter and
    holds none of its memory: checkpointing is to free that."""

    def __init__(self, y: Tensor):
        self._counter = y.detach()
        self._counter.data = y.new_empty(0)
        self._version = self._counter._version

    @property
    def overwritten(self) -> bool:
        return self._counter._version != self._version


def keep(y: Tensor) -> tuple[Tensor, KeptOutput | None]:
    """(what to save of an output for the backward, what to ask there). Compiled code counts no versions, but its
    compiler leaves out a copy of what is never written into. What inference mode makes has no backward."""
    if torch.compiler.is_compiling():
        return y.clone(), None
    if y.is_inference():
        return y, None
    return y.data, KeptOutput(y)


def is_overwritten(kept: KeptOutput | None) -> bool:
    return kept is not None and kept.overwritten
