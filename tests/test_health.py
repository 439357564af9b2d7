"""What a run notices of itself: signals, steps that are not finite, losses that leap, slow ranks."""

import math
import os
import signal

import pytest
import torch

from dora_dist import health
from dora_dist.health import SpeedCheck, StepCheck, StopSignals


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
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with StopSignals() as signals:
            assert signals.received is None
            os.kill(os.getpid(), number)
            assert signals.received == number.name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


@pytest.mark.parametrize(("repeated_s", "ends"), [(600.0, False), (0.0, True)])
def test_a_second_signal_ends_the_process_unless_it_is_the_same_one(repeated_s, ends, monkeypatch):
    monkeypatch.setattr(health, "_REPEATED_S", repeated_s)
    pid = os.fork()
    if pid == 0:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM) == ends


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


def test_the_product_takes_time():
    assert 0 < SpeedCheck(0, 1, torch.device("cpu"), lambda _: None).measure() < 10
