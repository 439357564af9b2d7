"""Faults of whole runs: ranks and launchers that die, hang or are asked to stop, and what must hold after each."""

import contextlib
import io
import os
import random
import re
import shutil
import socket
import sys
import time
from dataclasses import dataclass

from dora_dist.cli import STOPPED, main
from tests.faults.case import STEPS, Case


@dataclass
class Count:
    """How often what must hold held."""

    held: int = 0
    tried: int = 0
    note: str = ""

    def add(self, holds: bool, problem: object = "") -> None:
        self.tried += 1
        self.held += bool(holds)
        if not holds:
            print(f"DOES NOT HOLD: {problem}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"{self.held}/{self.tried}" + (f"; {self.note}" if self.note else "")


def reference(case: Case, ranks: int, *overrides: str) -> list[tuple]:
    """The curve without a fault."""
    name = f"reference-{ranks}-{abs(hash(overrides)) % 10**8}"
    if not (case.scratch / name).is_dir():
        ended = case.run(name, ranks, *overrides, launcher="none")
        assert ended.status == 0, ended.output[-3000:]
    return case.curve(name)


def killed_rank(case: Case, kills: int = 20, at_a_time: int = 5) -> Count:
    """SIGKILL of a random rank at a random point; torchrun restarts the ranks."""
    count, chance = Count(), random.Random(0)
    expected = reference(case, 2)
    while count.tried < kills:
        steps = sorted(chance.choices(range(1, STEPS + 1), k=min(at_a_time, kills - count.tried)))
        points = [(step, chance.choice(["forward", "backward", "step"]), chance.randrange(2)) for step in steps]
        faults = "; ".join(
            f"restart={n} rank={rank} step={step} point={point} kind=kill"
            for n, (step, point, rank) in enumerate(points)
        )
        case.forget("killed")
        ended = case.run("killed", 2, faults=faults, restarts=len(points))
        equal = ended.status == 0 and case.curve("killed") == expected and not case.orphans("killed")
        fired = len(re.findall(r"^fault kill", ended.output, re.MULTILINE))
        for n in range(len(points)):
            count.add(equal and n < fired, f"{points}, {fired} fired: {ended.output[-2000:]}")
    return count


def chain(case: Case, name: str, ranks: int, faults: list[str], *overrides: str, **options) -> tuple[Count, list]:
    """One run, begun again after each fault. Counts the ends that are as they must be."""
    case.forget(name)
    ends, expected = [], reference(case, ranks, *overrides)
    for fault in [*faults, ""]:
        ends.append(case.run(name, ranks, *overrides, faults=fault, **options))
    count = Count()
    equal = ends[-1].status == 0 and case.curve(name) == expected and not case.orphans(name)
    for end, fault in zip(ends, faults, strict=False):
        count.add(equal and end.status != 0 and "\nfault " in end.output, f"{fault}: {end.output[-2000:]}")
    return count, ends


def killed_launcher(case: Case, kills: int = 10) -> Count:
    chance = random.Random(1)
    steps = sorted(chance.choices(range(1, STEPS + 1), k=kills))
    points = [chance.choice(["forward", "backward", "step", "save", "evaluate"]) for _ in steps]
    faults = [
        f"rank={chance.randrange(2)} step={step + step % 2 if point == 'save' else step} "
        f"point={'step' if point == 'evaluate' else point} kind=launcher"
        for step, point in zip(steps, points, strict=True)
    ]
    return chain(case, "orphaned", 2, faults)[0]


def asked_to_stop(case: Case, stops: int = 20, launcher: str = "torchrun") -> Count:
    """SIGTERM or SIGUSR1 to one rank, or SIGTERM to the launcher, at random steps of one run."""
    chance = random.Random(2)
    total = 3 * stops + 4  # a rank's wish is known to all after the next step
    kinds = ("term", "usr1", "launcher_term") if launcher == "torchrun" else ("term", "usr1")
    faults = [
        f"rank={chance.randrange(2 if launcher == 'torchrun' else 1)} step={3 * n + 2 + chance.randrange(2)} "
        f"point={chance.choice(['forward', 'backward', 'step'])} kind={kinds[n % len(kinds)]}"
        for n in range(stops)
    ]
    return _stops(case, faults, total, launcher)


def asked_to_stop_while_saving(case: Case, stops: int = 10, launcher: str = "torchrun") -> Count:
    """The same while a checkpoint is written and while the model is evaluated."""
    faults = [
        f"rank=0 step={4 * n + 4} point={('save', 'evaluate')[n % 2]} kind={('term', 'usr1')[n // 2 % 2]}"
        for n in range(stops)
    ]
    more = (f"data.eval={case.scratch / 'rows.jsonl'}", "train.eval_every=2")
    return _stops(case, faults, 4 * stops + 4, launcher, *more)


def _stops(case: Case, faults: list[str], total: int, launcher: str, *overrides: str) -> Count:
    ranks = 2 if launcher == "torchrun" else 1
    count, ends = chain(case, "stopped", ranks, faults, f"train.steps={total}", *overrides, launcher=launcher)
    for end in ends[:-1]:
        told = "stopped by" in end.output and (launcher == "torchrun" or end.status == STOPPED)
        if not told:
            count.held -= 1
            print(f"DOES NOT HOLD: {end.status} {end.output[-2000:]}", file=sys.stderr)
    return count


def not_finite(case: Case, strategies: tuple = ("ddp", "fsdp", "zero1", "zero2", "zero3")) -> Count:
    """A gradient of one rank that is NaN or infinite: no rank's state moves, and all go on alike."""
    count = Count()
    for strategy in strategies:
        for kind in ("nan", "inf"):
            case.forget("bad")
            faults = f"rank=1 step=5 point=backward kind={kind}; step=5 point=forward kind=hash; "
            faults += "step=6 point=forward kind=hash; step=9 point=forward kind=hash"
            ended = case.run("bad", 2, f"parallel.strategy={strategy}", faults=faults, launcher="none")
            found = re.findall(r"hash rank (\d) step (\d+) (\w+)", ended.output)
            at = {step: {digest for _, s, digest in found if s == step} for step in ("4", "5", "8")}
            same = len(found) == 6 and all(len(digests) == 1 for digests in at.values())
            holds = same and at["4"] == at["5"] != at["8"] and ended.status == 0
            count.add(holds and len(case.curve("bad")) == STEPS, f"{strategy} {kind}: {ended.output[-2000:]}")
    return count


def stopped_rank(case: Case, launchers: tuple = ("torchrun", "deepspeed")) -> Count:
    """SIGSTOP of a rank: the run must end, and say which rank is missing and where the others wait."""
    count, slowest, timeout = Count(), 0.0, 5
    for launcher in launchers:
        case.forget("hung")
        begun = time.monotonic()
        with case.launch(
            "hung",
            2,
            f"parallel.timeout_s={timeout}",
            faults="rank=1 step=5 point=backward kind=stop",
            launcher=launcher,
        ) as launch:
            while "fault stop" not in launch.printed() and time.monotonic() - begun < 120:
                time.sleep(0.1)
            begun = time.monotonic()
            status, output = launch.end()
        seconds = time.monotonic() - begun
        slowest = max(slowest, seconds)
        named = re.search(r"rank 1\b.*backward|backward.*rank 1\b", output)
        count.add(
            status != 0 and bool(named) and seconds <= timeout + 35, f"{launcher} {seconds}: {output[-3000:]}"
        )
    count.note = f"{slowest:.0f} s at most, with a timeout of {timeout} s"
    return count


def told_soon(case: Case, seconds: float = 10) -> Count:
    """Settings that differ between ranks, and a port that is taken: seconds from the launch to the line."""
    count, slowest = Count(), 0.0
    for launcher in ("torchrun", "deepspeed"):
        case.forget("differs")
        os.environ["DORA_DIST_RANK_1"] = "train.lr=0.03"
        line = r"error: train\.lr: 0\.02 on rank 0, 0\.03 on rank 1; every rank needs the same configuration"
        slowest = max(slowest, _seconds_to(case, line, count, seconds, launcher=launcher))
        del os.environ["DORA_DIST_RANK_1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = rf"error: port {port} is already in use"
        slowest = max(slowest, _seconds_to(case, line, count, seconds, launcher="deepspeed", port=port))
    count.note = f"{slowest:.0f} s at most, of which most is importing torch"
    return count


def _seconds_to(case: Case, line: str, count: Count, limit: float, **options) -> float:
    begun = time.monotonic()
    with case.launch("differs", 2, **options) as launch:
        while not re.search(line, launch.printed()) and launch.launcher.poll() is None:
            time.sleep(0.1)
        taken = time.monotonic() - begun
        status, output = launch.end(600)
    told = len(re.findall(line, output)) == 1 and status != 0
    count.add(told and taken <= limit, f"{taken:.0f} s: {output[-2000:]}")
    return taken


def every_step(case: Case, steps: int = 30) -> Count:
    """Resumed from each step's checkpoint, in one process: accumulation, dropout, packing, shuffling."""
    count = Count()
    settings = [f"train.steps={steps}", "checkpoint.every=1", f"checkpoint.keep={steps}"]
    whole = case.scratch / "every-step"
    case.forget("every-step")
    assert _quietly(case, "every-step", *settings) == 0
    expected = case.curve("every-step")
    for step in range(1, steps):
        name = "resumed"
        case.forget(name)
        shutil.copytree(whole, case.scratch / name)
        for path in (case.scratch / name / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        status = _quietly(case, name, *settings)
        count.add(status == 0 and case.curve(name) == expected, f"step {step}")
    status = _quietly(case, "every-step", *settings)  # the last one: nothing is left to train
    count.add(status == 0 and case.curve("every-step") == expected, "the last step")
    return count


def _quietly(case: Case, name: str, *overrides: str) -> int:
    words = ["train", "--config", str(case.config), f"output_dir={case.scratch / name}", *overrides]
    with contextlib.redirect_stdout(io.StringIO()):
        return main(words)


def moved(case: Case, chains: tuple = ("4 2 1 4", "fsdp zero3 single zero2 fsdp")) -> Count:
    """One run that goes from one number of ranks or strategy to the next: the same rows in the same order."""
    count, worst = Count(), 0.0
    same = ["dora.dropout=0", "train.steps=20", "train.micro_batch_size=1"]
    expected = reference(case, 1, *same, "train.accumulation=4", "data.packing=false")
    for places in chains:
        case.forget("moved")
        stages = places.split()
        for n, place in enumerate(stages):
            ranks = int(place) if place.isdigit() else 1 if place == "single" else 2
            strategy = ("single" if ranks == 1 else "fsdp") if place.isdigit() else place
            words = [
                *same,
                "data.packing=false",
                f"train.accumulation={4 // ranks}",
                f"parallel.strategy={strategy}",
            ]
            last = n == len(stages) - 1
            fault = "" if last else f"rank=0 step={4 * n + 3} point=forward kind=term"
            ended = case.run("moved", ranks, *words, faults=fault, launcher="none")
            told = ended.status == 0 if last else "stopped by" in ended.output
            curve = case.curve("moved")
            pairs = list(zip(curve, expected, strict=False))
            error = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in pairs)
            worst = max(worst, error)
            in_order = [line[0] for line in curve] == list(range(1, len(curve) + 1))
            count.add(told and error < 1e-5 and in_order, f"{places} at {place}, {error}: {ended.output[-2000:]}")
    count.note = f"losses to {worst:.1g}"
    return count


def mistakes(case: Case) -> Count:
    from tests.refusals.refusals import run_all

    count = Count()
    kinds = run_all()
    for refused, tried in kinds.values():
        count.held, count.tried = count.held + refused, count.tried + tried
    count.note = ", ".join(f"{name} {refused}/{tried}" for name, (refused, tried) in kinds.items())
    return count
