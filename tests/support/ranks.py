"""Ranks that are forked from a process which has imported what they need: 0.1 s each rather than 6 to 10.

For tests of what ranks compute. Where the launcher itself is tested, see `support.launch`.
The process that they are forked from computes nothing, as a child of a process that has threads can hang.
"""

import functools
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

from tests.support.launch import child_environment, free_port

_GRACE_S = 60  # for the other ranks to end after one that failed
_forks = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """Like subprocess.CompletedProcess, of all ranks: their output one after the other."""

    statuses: list[int]  # negative: killed by that signal
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """0 where all ranks ended well, else that of the first that did not."""
        return next((status for status in self.statuses if status), 0)


def run_ranks(ranks: int, what: Path | Callable, *arguments: object, timeout: float = 300) -> Ended:
    """Run a script, or a function of a module in tests/, in `ranks` processes on the CPU, and wait for their end.

    One alone is like plain python: it is not told that it is a rank.
    """
    with Ranks(ranks, what, *arguments) as started:
        return started.end(timeout)


class Ranks:
    """The same while it runs. No process outlives the `with` block."""

    def __init__(self, ranks: int, what: Path | Callable, *arguments: object):
        _start_server()
        self._folder = tempfile.TemporaryDirectory()
        call, port = pickle.dumps((what, arguments)), free_port()
        self.processes = [
            _forks.Process(
                target=_rank, args=(call, _environment(rank, ranks, port), Path(self._folder.name, str(rank)))
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def end(self, timeout: float = 300) -> Ended:
        """Wait for the end of all. Where one fails the others are ended, as launchers do; what is left `timeout`
        seconds from now, or a while after that, is killed."""
        deadline, failed = time.monotonic() + timeout, False
        while (living := self.living()) and time.monotonic() < deadline:
            if not failed and any(process.exitcode for process in self.processes):
                failed, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
                for process in living:
                    process.terminate()
            time.sleep(0.02)
        self._kill()
        names = ["out", "err"]
        printed = ["".join(path.read_text() for path in sorted(self._files(name))) for name in names]
        return Ended([process.exitcode for process in self.processes], *printed)

    def living(self) -> list:
        return [process for process in self.processes if process.exitcode is None]

    def _files(self, end: str) -> Iterator[Path]:
        return Path(self._folder.name).glob(f"*.{end}")

    def _kill(self) -> None:
        for process in self.living():
            process.kill()
        for process in self.processes:
            process.join()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        self._folder.cleanup()


@functools.cache
def _start_server() -> None:
    """It ends when this process does."""
    _forks.set_forkserver_preload(["tests.support.imports"])
    given = dict(os.environ)
    try:
        os.environ.update(_environment(0, 1, 0))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(given)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    environment = child_environment()
    environment["DS_ACCELERATOR"] = "cpu"  # deepspeed asks while it is imported
    if ranks > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        environment |= dict(zip(names, map(str, (rank, rank, ranks, ranks, port)), strict=True))
        environment["MASTER_ADDR"] = "127.0.0.1"
    return environment


def _rank(call: bytes, environment: dict[str, str], printed: Path) -> NoReturn:
    """In the child. It ends without Python's own end, which a rank with gloo's threads may not survive."""
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{printed}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    status = 1
    try:
        _call(*pickle.loads(call))  # noqa: S301 - made above
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with_the_tests() -> None:
    """The server stays for as long as one of its children does, so it is not the one to watch."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)


def _call(what: Path | Callable, arguments: tuple) -> None:
    if callable(what):
        what(*arguments)
    else:
        sys.argv = [str(what), *map(str, arguments)]
        sys.path.insert(0, str(what.parent))
        runpy.run_path(str(what), run_name="__main__")
