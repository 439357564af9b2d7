"""Attributes replaced for a while. Each must be there, and what must be called is called: a name that another
version has moved would be replaced in vain."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock


class Patches:
    """Replaces attributes until it is left, and counts the calls of each."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()  # by the name of what was replaced
        self._needed: dict[str, None] = {}
        self._around = ExitStack()

    def __enter__(self) -> "Patches":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._around.close()

    def replace(self, owner: Any, name: str, make: Callable[[Any], Callable], needed: bool = False) -> None:
        """Put what `make` makes of `owner.name` in its place. `needed`: `check` asserts that it was called."""
        full = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
        if not hasattr(owner, name):
            raise LookupError(f"{full} is to be replaced in a rehearsal, and is not there")
        stand_in = make(getattr(owner, name))
        self.calls[full] += 0

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[full] += 1
            return stand_in(*arguments, **options)

        self._around.enter_context(mock.patch.object(owner, name, counted))
        if needed:
            self._needed[full] = None

    def check(self) -> None:
        """
        Raises:
            LookupError: something was replaced in vain.
        """
        for full in self._needed:
            if not self.calls[full]:
                raise LookupError(f"{full} was replaced in a rehearsal, and nothing called it")
