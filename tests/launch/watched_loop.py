"""Run under a launcher: all-reduces under the watchdog, and one mishap of rank 1 in the run's first life.

usage: watched_loop.py DIR TIMEOUT_S STEPS [MISHAP at step 20: kill, leave, fail, dawdle or save]

DIR gets rank 0's step. save is no mishap: rank 0 takes long at an unwatched place, for which the other waits.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from dora_dist.cli import leave
from dora_dist.parallel import watchdog
from dora_dist.parallel.orphans import end_with_launcher
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.parallel.watchdog import Watchdog


class Failed(Exception):
    """Of which this machine's launcher hears nothing, as if the rank were on another."""


def fail() -> None:
    raise Failed


MISHAPS = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda: os._exit(0),
    "fail": fail,
    "dawdle": lambda: time.sleep(600),
}


def main(directory: str, timeout_s: str, steps: str, mishap: str = "none") -> None:
    processes = Processes()
    watchdog._QUIET_S = 3.0
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with Watchdog(processes, float(timeout_s)) as watch:
        processes.start(60, needed=processes.world_size > 1)
        for step in range(int(steps)):
            watch.at(step, Phase.DATA)
            time.sleep(0.01)
            if mishap == "save" and step == 20:
                watch.at(step, Phase.CHECKPOINT, watched=False)
                if processes.is_main:
                    (Path(directory) / f"life-{life}").write_text("1000")
                    time.sleep(600)
                processes.from_main(None)
            elif (processes.rank, step, life) == (1, 20, "0"):
                MISHAPS[mishap]()
            watch.at(step, Phase.LOG)
            assert processes.sum_(torch.ones(1000)).eq(processes.world_size).all()
            if processes.is_main:
                (Path(directory) / f"life-{life}").write_text(str(step))
    processes.stop()


if __name__ == "__main__":
    end_with_launcher()
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # deepspeed's
    with suppress(Failed):
        main(*arguments)
    leave(0)
