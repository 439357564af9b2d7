"""What a run notices of itself: signals, steps that are not finite, losses that leap, slow ranks."""

import ctypes
import math
import mmap
import os
import signal
import struct

import pytest
import torch

from dora_dist.training import health
from dora_dist.training.health import SpeedCheck, StepCheck, StopSignals
from tests.support.launch import wait_until


def checked(losses, norms=None, max_skipped=3):
    """The warnings of a run of these losses and gradient norms."""
    warnings = []
    check = StepCheck(2, max_skipped, warnings.append)
    for step, loss in enumerate(losses, 1):
        norm = 1.0 if norms is None else norms[step - 1]
        check.add(step, torch.tensor(loss), torch.tensor(norm))
    check.finish()
    return warnings


def test_a_signal_is_a_wish_and_the_handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with StopSignals() as signals:
            signals.heed(signal.SIGINT)
            assert signals.received is None
            os.kill(os.getpid(), number)
            assert signals.received == number.name
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_is_ignored_stays_so():
    """As in the background of a script, where Ctrl-C is not for this process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.heed(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("first", "second", "pause", "ends"),
    [
        ("SIGTERM", "SIGTERM", 4.0, False),  # by the launcher, once more
        ("SIGTERM", "SIGUSR1", 6.0, True),
        ("SIGINT", "SIGINT", 0.5, False),  # from the terminal and by the launcher
        ("SIGINT", "SIGTERM", 0.5, False),  # deepspeed's answer to Ctrl-C
        ("SIGINT", "SIGINT", 1.5, True),
        ("SIGTERM", "SIGINT", 1.5, True),
    ],
)
def test_a_second_signal_ends_a_process_that_hangs_unless_it_is_the_same_one(
    first, second, pause, ends, monkeypatch
):
    clock = mmap.mmap(-1, 8)  # shared with the child
    heard, hear = os.pipe()

    def now():
        (seconds,) = struct.unpack("d", clock[:])
        os.write(hear, b".")
        return seconds

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(health.time, "monotonic", now)
        with StopSignals() as signals:
            signals.heed(signal.SIGINT)
            os.write(hear, b".")
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # the second time it waits for itself, as for a rank that is gone
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
    os.read(heard, 1)
    for name, seconds in ((first, 0.0), (second, pause)):
        clock[:] = struct.pack("d", seconds)
        os.kill(child, signal.Signals[name])
        os.read(heard, 1)  # the child has looked at its clock
    ended = wait_until(
        lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), 20 if ends else 0.3
    )
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (ended, status) == (ends, 128 + signal.Signals[second] if ends else -signal.SIGKILL)


def test_skipped_steps_are_told_and_too_many_end_the_run():
    nan = math.nan
    skipped = "the gradient is not finite; no rank took the step"
    assert checked([1.0] * 4, [1.0, nan, math.inf, 1.0]) == [
        f"step 2: {skipped} (1 skipped in a row; train.max_skipped_steps: 3)",
        f"step 3: {skipped} (2 skipped in a row; train.max_skipped_steps: 3)",
    ]
    checked([1.0] * 7, [nan, nan, nan, 1.0, nan, nan, nan])  # three in a row, twice
    with pytest.raises(RuntimeError, match=r"step 4: the gradient is not finite \(4 in a row"):
        checked([1.0] * 4, [nan] * 4)
    with pytest.raises(RuntimeError, match="step 1"):
        checked([1.0], [nan], max_skipped=0)


def test_a_leap_is_told_once_with_step_and_rank(capsys):
    steady = [2.0 + 0.01 * (step % 5) for step in range(40)]
    checked([*steady, 9.0, *steady])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: rank 2: step 41: the loss leapt to 9")
    checked([5.0 - 0.05 * step for step in range(60)])  # what training does
    checked([2.0] * 5 + [9.0] + [2.0] * 5)  # too early to know
    checked([2.0] * 40 + [2.001] * 3)  # tiny, though many deviations
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_not_finite_is_told_by_its_rank(capsys):
    checked([1.0, math.inf, 1.0])
    assert capsys.readouterr().err == "warning: rank 2: step 2: the loss is inf\n"


@pytest.mark.parametrize(("mine", "told"), [([0.05, 0.05], True), ([0.05, 0.011], False), ([0.012, 0.012], False)])
def test_a_slow_rank_warns_at_the_second_time(mine, told, capsys, monkeypatch):
    def sum_(seconds):
        seconds += torch.tensor([0.010, 0.011, 0.0, 0.012], dtype=seconds.dtype)

    check = SpeedCheck(2, 4, torch.device("cpu"), sum_)
    for number, seconds in enumerate(mine, 1):
        monkeypatch.setattr(check, "measure", lambda seconds=seconds: seconds)
        check.run(50 * number)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == told and all("rank 2: step 100" in line and "0.2" in line for line in lines)


def test_the_fastest_of_a_few_products_counts(monkeypatch):
    now, seconds = 0.0, iter([0.5, 0.125, 0.25, 1.0])

    def product(*_):
        nonlocal now
        now += next(seconds)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(health.time, "perf_counter", lambda: now)
    assert SpeedCheck(0, 1, torch.device("cpu"), lambda _: None).measure() == 0.125
