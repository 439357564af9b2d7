"""What a run is doing, as a value: the training loop tells it, and watchdog, rehearsals and benchmarks read it."""

from enum import Enum


class Phase(Enum):
    """The value is its name in results and tables; the sentences about it are made where they are shown."""

    START = "start"
    LOADING = "loading"
    DATA = "data"
    FORWARD = "forward"  # of a micro-batch
    HEAD = "loss"  # the part of the forward that makes logits, in rehearsals
    BACKWARD = "backward"  # of a micro-batch
    STEP = "optimizer step"
    NORMS = "norms"
    SPEEDS = "speeds"
    LOG = "log"
    AGREEMENT = "agreement"
    EVALUATION = "evaluation"  # of a batch
    SAMPLING = "sampling"
    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"
    END = "end"
