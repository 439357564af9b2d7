"""The exceptions that the command line turns into one line and an exit status of their own."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a configuration, a file or a call: says which key or file, what is wrong, what is valid."""


class RunFailed(RuntimeError):
    """The run cannot go on, by no mistake in what was asked: says what happened; exit status 1."""


class Stopped(Exception):
    """A signal ended the run after a step, with a checkpoint: not an error, but not the end of training either."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """A hint naming the closest of `valid`: "did you mean 'rank'?", or all of them when none is close."""
    valid = sorted(set(valid))
    close = difflib.get_close_matches(name, valid, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(valid[:20]) + (", ..." if len(valid) > 20 else "")
    return f"valid: {shown}" if valid else "there is none"
