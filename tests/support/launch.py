"""Runs of a launcher that leave no process behind."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.support import ROOT

SECONDS = 300  # after which something hangs; nothing here takes nearly as long, also on a busy machine


class Launch:
    """One run of a launcher. Where the `with` block ends, all its processes must have ended; the others are killed
    then."""

    def __init__(self, command: list[str], output_dir: Path):
        self.output_dir = output_dir
        environment = {**child_environment(), "DORA_DIST_RUN": str(output_dir)}  # inherited by all that it starts
        self._printed = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.launcher = subprocess.Popen(
            command, stdout=self._printed, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def press_ctrl_c(self) -> None:
        """What a terminal does: it signals the launcher and all that has stayed in its process group."""
        os.killpg(self.launcher.pid, signal.SIGINT)

    def end(self, seconds: float = SECONDS) -> tuple[int, str]:
        """Wait for the launcher's end: its exit status, and what it and the ranks printed."""
        status = self.launcher.wait(seconds)
        wait_until(lambda: not self.processes(), 60)  # what outlives the launcher may print, too
        return status, self.printed()

    def printed(self) -> str:
        """Until now."""
        return Path(self._printed.name).read_text(errors="replace")

    def rank(self, rank: int) -> int:
        """The process of a rank."""
        (pid,) = [pid for pid, environment in self.processes().items() if environment.get("RANK") == str(rank)]
        return pid

    def processes(self) -> dict[int, dict[str, str]]:
        """Those that live: pid -> environment."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it ended just now, or is another user's
                words = path.read_bytes().decode(errors="replace").split("\0")
                found[int(path.parent.name)] = dict(word.split("=", 1) for word in words if "=" in word)
        return {pid: e for pid, e in found.items() if e.get("DORA_DIST_RUN") == str(self.output_dir)}

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception: object) -> None:
        ended = self.launcher.poll() is not None and wait_until(lambda: not self.processes(), 60)
        for pid in () if ended else self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        self._printed.close()
        assert ended, f"processes of {self.output_dir} outlived their launcher"


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def child_environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
