"""The launcher that started this process, torchrun or deepspeed: where it dies, this process ends.

The faults (docs/reliability.md): a launcher is killed ("Launchers that die"); torchrun hangs as the host of its
store is lost ("Hung collectives"). No launcher takes its processes along when it is killed, and `deepspeed` not
even when it is told to end: what remains would hold the GPUs, and wait for each other or train on unseen. A plain
process has no launcher: a shell that ends must not end a run.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LOOK_S = 1.0
_GRACE_S = 3  # for torchrun to end after its processes
stopping = False
"""Whether this process is ending by itself. Then the command `deepspeed` may end, which it does at the first
Ctrl-C: its process of this node gives ours 30 s."""


def end_with_launcher() -> None:
    """Watch the launcher from a thread of this process, where there is one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parents = [os.getppid]
    elif "CROSS_RANK" in os.environ:  # set by deepspeed's process of this node, whose own parent is the command
        node = os.getppid()
        parents = [os.getppid] + ([lambda: _parent(node)] if _is_deepspeed(_parent(node)) else [])
    else:
        return
    told = os.environ.get("LOCAL_RANK", "0") == "0"
    threading.Thread(target=_watch, args=(parents, told), name="launcher", daemon=True).start()


def end_with_parent() -> None:
    """The same for a process of a pool, which would wait for work forever."""
    threading.Thread(target=_watch, args=([os.getppid], False), name="parent", daemon=True).start()


def free_from_lost_host() -> None:
    """To be called before this process ends because the host of torchrun's store is gone. torchrun then waits for
    an answer of that store for minutes, deaf to signals: it is killed unless it ends, or has restarts left and has
    seen this process end."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    most, used = (int(os.environ[f"TORCHELASTIC_{name}"]) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    parent = os.getppid()
    try:
        # They stand for these processes and no later ones with the same numbers.
        torchrun, this = os.pidfd_open(parent), os.pidfd_open(os.getpid())
        if "torch" not in _command(parent) or os.getppid() != parent:
            return  # it has ended, and whoever takes in orphans is not to be harmed
    except OSError:
        return
    subprocess.Popen(
        [sys.executable, "-I", "-c", _FREE, *map(str, (torchrun, this, _GRACE_S, most - used))],
        pass_fds=(torchrun, this),
        start_new_session=True,  # torchrun signals the group of each of its processes
    )


_FREE = """
import select, signal, sys
torchrun, this, seconds, restarts = map(int, sys.argv[1:])
ended = select.poll()
ended.register(torchrun)
if not ended.poll(seconds * 1000):
    try:
        if restarts > 0:
            signal.pidfd_send_signal(this, 0)  # it is there until torchrun has seen its end
        signal.pidfd_send_signal(torchrun, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def _watch(parents: list[Callable[[], int]], told: bool) -> None:
    first = [parent() for parent in parents]
    while (now := [parent() for parent in parents]) == first or (now[0] == first[0] and stopping):
        time.sleep(_LOOK_S)
    if told:
        with suppress(OSError):  # it may have been the launcher that read this
            print("error: the launcher has ended, and its processes end with it", file=sys.stderr, flush=True)
    os._exit(1)


def children() -> list[int]:
    """The processes that this one has started and that live."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == os.getpid()]


def _parent(process: int) -> int:
    """0 where the process has ended."""
    try:
        # After the name, which is in parentheses and may have spaces: the state, the parent (man 5 proc).
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _command(process: int) -> str:
    """Its command line, the words parted by null characters; "" where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _is_deepspeed(process: int) -> bool:
    """Whether it is the command; in a remote shell there is none, and sshd's end is not for us to judge."""
    words = _command(process).split("\0")
    ends = ("/deepspeed", "/deepspeed/launcher/runner.py", "deepspeed.launcher.runner")
    return any(f"/{word}".endswith(ends) for word in words)
