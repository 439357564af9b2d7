"""The launcher that started this process, torchrun or deepspeed: where it dies, this process ends.

Neither takes its processes along when it is killed, and `deepspeed` not even when it is told to end: what remains
would hold the GPUs, and wait for each other or train on unseen. A plain process has no launcher: a shell that ends
must not end a run.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LOOK_S = 1.0


def end_with_launcher() -> None:
    """Watch the launcher from a thread of this process, where there is one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parents = [os.getppid]
    elif "CROSS_RANK" in os.environ:  # set by deepspeed's process of this node, whose own parent is the command
        node = os.getppid()
        parents = [os.getppid] + ([lambda: _parent(node)] if _is_deepspeed(_parent(node)) else [])
    else:
        return
    threading.Thread(target=_watch, args=(parents,), name="launcher", daemon=True).start()


def _watch(parents: list[Callable[[], int]]) -> None:
    first = [parent() for parent in parents]
    while [parent() for parent in parents] == first:
        time.sleep(_LOOK_S)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # it may have been the launcher that read this
            print("error: the launcher has ended, and its processes end with it", file=sys.stderr, flush=True)
    os._exit(1)


def _parent(process: int) -> int:
    """0 where the process has ended."""
    try:
        # After the name, which is in parentheses and may have spaces: the state, the parent (man 5 proc).
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _is_deepspeed(process: int) -> bool:
    """Whether it is the command; in a remote shell there is none, and sshd's end is not for us to judge."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    ends = ("/deepspeed", "/deepspeed/launcher/runner.py", "deepspeed.launcher.runner")
    return any(f"/{word}".endswith(ends) for word in words)
