"""A function in a process of its own that begins as a copy of this one, with all that it has imported and made."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from dora_dist.parallel.orphans import end_with_parent


class Forked:
    """`make(argument)` in a process forked from this one, which ends with it."""

    def __init__(self, make: Callable[[Any], Any], argument: Any):
        context = get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(make, argument, sender))
        self._process.start()
        sender.close()

    def result(self, killed: Any) -> Any:
        """What it returned; `killed` where it was. To be called once."""
        try:
            return self._receiver.recv()
        except EOFError:
            return killed
        finally:
            self._receiver.close()
            self._process.join()


def _run(make: Callable[[Any], Any], argument: Any, sender: Connection) -> None:
    end_with_parent()
    sender.send(make(argument))
