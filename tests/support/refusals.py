"""What a mistake must meet: a UserError of one line that names what is wrong; no code run, no read outside."""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dora_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CANARY = "CODE-WAS-RUN"  # the directory, beside the case's own, that the code in hostile files makes
_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
_OWN = tuple(
    os.path.realpath(place) + os.sep
    for place in {
        ROOT / "dora_dist", ROOT / "tests", sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"), "/proc", "/sys", "/usr/share", "/usr/lib", "/etc",
        Path.home() / ".cache" / "huggingface",  # where `datasets` puts locks
    }
)  # fmt: skip


class Case(NamedTuple):
    """A mistake: `run` makes it in an empty directory of its own."""

    name: str
    run: Callable[[Path], object]
    names: tuple[str, ...]  # what the message must hold; {d} is the directory


class _Watch:
    """Python's audit events while a case runs; a hook cannot be taken off again, so it is put on once."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        self.allowed: tuple[str, ...] = ()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self.seen is None:
            return
        if event in _CODE:
            self.seen.append(f"{event}{arguments}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and "r" in (arguments[1] or "r"):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed) and not os.path.isdir(path) and path != "/dev/null":
                self.seen.append(f"open {path}")

    @contextmanager
    def over(self, directory: Path) -> Iterator[list[str]]:
        self.seen, self.allowed = [], (*_OWN, str(directory.resolve()) + os.sep)
        try:
            yield self.seen
        finally:
            self.seen = None


_watch: _Watch | None = None


def failing(case: Case, directory: Path) -> str:
    """Why the case is not refused as it must be; "" where it is. `directory` must be new; around it is outside."""
    global _watch
    _watch = _watch or _Watch()
    directory.mkdir(parents=True)
    message = None
    with _watch.over(directory) as seen:
        try:
            case.run(directory)
        except UserError as error:
            message = str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    canary = directory.parent / CANARY
    if canary.exists():
        canary.rmdir()
        return "code was run"
    if message is None:
        return "not refused"
    if seen:
        return f"what it did: {seen}"
    if "\n" in message or len(message) > 1500:
        return f"not one line: {message[:300]!r}"
    lacking = [name for name in case.names if name.format(d=directory) not in message]
    return f"{lacking} not in {message!r}" if lacking else ""


def run_cases(cases: list[Case], directory: Path) -> tuple[int, dict[str, str]]:
    """How many are refused, and what is wrong with the others."""
    wrong = {}
    for number, case in enumerate(cases):
        problem = failing(case, directory / str(number))
        if problem:
            wrong[case.name] = problem
    return len(cases) - len(wrong), wrong
