"""A run's health while it trains: signals, steps that are not finite, losses that leap, slow ranks."""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dora_dist.errors import RunFailed
from dora_dist.parallel import orphans

_STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_MEMORY = 0.98  # of the running mean and variance: about the last 50 steps
_REPEATED_S: dict[int, float] = {signal.SIGINT: 1.0}  # within which a second signal is the same one
_LATER_S = 5.0  # the same of other signals
_SLOW = 2.0  # times the median rank's seconds
_LEAP, _FIRST_STEPS = 6.0, 20  # standard deviations that are worth a warning; steps before the first


class StopSignals(AbstractContextManager):
    """Turns a first SIGTERM or SIGUSR1, and what else is to be heeded, into a wish, to be granted after a step.

    A second signal ends the process at once, but neither within 5 s (who signals all processes of a job reaches a
    rank by its launcher once more) nor, for Ctrl-C, within 1 s (a terminal signals launcher and ranks together).
    A thread looks at the signals: the main one, where Python's handlers run, may be in a collective that hangs.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        listening, told = os.pipe()
        os.set_blocking(told, False)
        self._told, self._told_before = told, signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(listening,), name="signals", daemon=True).start()
        for number in _STOPPING:
            self.heed(number)
        return self

    def __exit__(self, *exception: object) -> None:
        orphans.stopping = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)  # with which the thread ends

    def heed(self, number: int) -> None:
        """From now on this signal is a wish, too, unless the process was started to ignore it."""
        if signal.getsignal(number) is not signal.SIG_IGN:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        orphans.stopping = True

    def _listen(self, listening: int) -> None:
        first = None
        with os.fdopen(listening, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in self._before:
                    continue
                if first is None:
                    first = time.monotonic()
                    self._note(number[0], None)
                elif time.monotonic() - first > _REPEATED_S.get(number[0], _LATER_S):
                    os._exit(128 + number[0])


class StepCheck:
    """Looks at every step's loss and gradient norm, one step later: by then they have reached the host without
    anyone having waited for them.

    Args:
        rank: whose losses these are, for warnings.
        max_skipped: steps in a row that may be skipped for gradients that are not finite.
        warn: shows a line; called for the run as a whole on rank 0, for this rank's loss on any.
    """

    def __init__(self, rank: int, max_skipped: int, warn: Callable[[str], None]):
        self.rank, self.max_skipped, self.warn = rank, max_skipped, warn
        self.skipped = 0
        self._pending: tuple[int, Tensor, Any] | None = None
        self._seen, self._mean, self._variance = 0, 0.0, 0.0

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Look at the step before, and take this one. `loss`: this rank's part, as a mean over its own tokens;
        `grad_norm`: the same on every rank.

        Raises:
            RunFailed: more than `max_skipped` steps in a row were skipped; on every rank at once.
        """
        self.finish()
        values = torch.stack([loss.detach().float(), grad_norm.detach().float().to(loss.device)])
        if values.is_cuda:
            host = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = (step, host, arrived)
        else:
            self._pending = (step, values, None)

    def finish(self) -> None:
        """Look at the latest step."""
        if self._pending is None:
            return
        step, values, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        loss, grad_norm = values.tolist()
        if not math.isfinite(loss):
            warn_of_rank(self.rank, f"step {step}: the loss is {loss}")
        else:
            self._compare(step, loss)
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        if self.skipped > self.max_skipped:
            raise RunFailed(
                f"step {step}: the gradient is not finite ({self.skipped} in a row; train.max_skipped_steps: "
                f"{self.max_skipped}); A, B, m and the optimizer are as they were before the first"
            )
        if self.skipped:
            self.warn(
                f"step {step}: the gradient is not finite; no rank took the step ({self.skipped} skipped in a "
                f"row; train.max_skipped_steps: {self.max_skipped})"
            )

    def _compare(self, step: int, loss: float) -> None:
        """Warn of a loss far above the running mean, and add it to that, bounded."""
        if self._seen >= _FIRST_STEPS:
            limit = self._mean + _LEAP * math.sqrt(self._variance)
            if loss > limit and loss > 1.2 * self._mean:
                above = (loss - self._mean) / max(math.sqrt(self._variance), 1e-12)
                warn_of_rank(
                    self.rank,
                    f"step {step}: the loss leapt to {loss:.4g}, {above:.0f} standard deviations above its mean "
                    f"{self._mean:.4g}",
                )
                loss = limit
        self._seen += 1
        weight = max(1 - _MEMORY, 1 / self._seen)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference * difference)


class SpeedCheck:
    """Now and then times a small fixed product on every rank, and has a rank warn that is slow twice in a row. In
    a step all wait for the slowest, which therefore does not show there.

    Args:
        sum_: sums a vector over all ranks, in place.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, sum_: Callable[[Tensor], object]):
        self.rank, self.world_size, self.device, self.sum_ = rank, world_size, device, sum_
        self._was_slow = False

    def run(self, step: int) -> None:
        """On every rank at the same point."""
        seconds = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        seconds[self.rank] = self.measure()
        self.sum_(seconds)
        mine, usual = seconds[self.rank].item(), seconds.median().item()
        slow = mine > _SLOW * usual
        if slow and self._was_slow:
            warn_of_rank(
                self.rank,
                f"step {step}: {socket.gethostname()} computes at {usual / mine:.2f} of the median rank's speed "
                "(a fixed product, for the second time); every step waits for it",
            )
        self._was_slow = slow

    def measure(self) -> float:
        """Seconds of the product, the best of a few."""
        cuda = self.device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if cuda else (256, torch.float32)
        matrix = torch.ones(size, size, dtype=dtype, device=self.device)
        best = math.inf
        for _ in range(4):
            begun = time.perf_counter()
            torch.mm(matrix, matrix)
            if cuda:
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - begun)
        return best


def warn_of_rank(rank: int, text: str) -> None:
    """A warning that concerns one rank, from that rank."""
    print(f"warning: rank {rank}: {text}", file=sys.stderr, flush=True)
