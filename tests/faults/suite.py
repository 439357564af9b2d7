"""The fault suite: `make faults`. Every row of docs/reliability.md's table, run and counted.

usage: suite.py [--write docs/reliability.md] [ROW ...]
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.case import Case
from tests.faults.saves import damaged_checkpoints, full_disks, killed_saves
from tests.faults.whole_runs import (
    Count,
    asked_to_stop,
    asked_to_stop_while_saving,
    every_step,
    killed_launcher,
    killed_rank,
    mistakes,
    moved,
    not_finite,
    stopped_rank,
    told_soon,
)

MARKS = ("<!-- faults -->", "<!-- /faults -->")


ROWS: dict[str, tuple[str, str, Callable[[Case], Count]]] = {
    "killed_rank": (
        "SIGKILL of a random rank mid-step, under torchrun's restarts",
        "resumes by itself; losses bit-equal to the uninterrupted run",
        killed_rank,
    ),
    "killed_launcher": ("SIGKILL of the launcher", "no process left; rerun bit-equal", killed_launcher),
    "killed_saves": (
        "SIGKILL during a checkpoint: before every file-system operation, and at 50 random moments",
        "loadable; at most one interval lost; no orphans after a restart",
        lambda case: Count(*killed_saves(case)),
    ),
    "damaged": (
        "every file truncated or deleted; 200 random bit flips",
        "named, and the checkpoint before it used",
        lambda case: Count(*damaged_checkpoints(case)),
    ),
    "full": ("disk full", "the old checkpoint intact; the run goes on", lambda case: Count(*full_disks(case))),
    "stopped_rank": (
        "SIGSTOP of a rank, under torchrun and deepspeed",
        "ends within the timeout + 35 s; rank and operation named",
        stopped_rank,
    ),
    "signals": (
        "SIGTERM and SIGUSR1 to a rank, SIGTERM to torchrun, at random steps",
        "saved; resumed bit-equal",
        asked_to_stop,
    ),
    "signals_alone": (
        "the same of one process",
        "saved; exit status 75; resumed bit-equal",
        lambda case: asked_to_stop(case, 5, "python"),
    ),
    "signals_saving": (
        "SIGTERM and SIGUSR1 while saving and evaluating",
        "saved; resumed bit-equal",
        asked_to_stop_while_saving,
    ),
    "not_finite": (
        "NaN and Inf in one rank's gradient: ddp, fsdp, zero1, zero2, zero3",
        "the step skipped; state hash equal before and after, and on all ranks",
        not_finite,
    ),
    "every_step": ("resume at each of 30 steps: accumulation, dropout, packing", "bit-equal", every_step),
    "moved": (
        "4 -> 2 -> 1 -> 4 ranks; fsdp -> zero3 -> single -> zero2 -> fsdp",
        "the same rows; losses to 1e-5",
        moved,
    ),
    "mistakes": (
        "mistakes in YAML, data and adapters; pickle bomb, traversal, header bomb",
        "refused in one line; no code run; nothing outside read",
        mistakes,
    ),
    "told_soon": (
        "settings that differ between ranks; a port that is taken",
        "one clear line within 10 s of the launch",
        told_soon,
    ),
}


def run(names: list[str], scratch: Path) -> dict[str, Count]:
    case, found = Case(scratch), {}
    for name in names:
        begun = time.monotonic()
        found[name] = ROWS[name][2](case)
        print(f"{name}: {found[name]}  ({time.monotonic() - begun:.0f} s)", flush=True)
    return found


def table(found: dict[str, Count]) -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, gloo"
    lines = [f"Run on {datetime.date.today()}: {versions}.", "", "| Fault | Must | Held |", "|---|---|---|"]
    for name, count in found.items():
        fault, must, _ = ROWS[name]
        lines.append(f"| {fault} | {must} | {count} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = run(options.rows or list(ROWS), Path(directory))
    print(table(counts))
    if options.write:
        write(options.write, table(counts))
    sys.exit(any(count.held != count.tried for count in counts.values()))
