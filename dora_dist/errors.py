"""The one exception that is the user's to mend: the command line prints it as one line and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a configuration, a file or a call: says which key or file, what is wrong, what is valid."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """A hint naming the closest of `valid`: "did you mean 'rank'?", or all of them when none is close."""
    valid = sorted(set(valid))
    close = difflib.get_close_matches(name, valid, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(valid[:20]) + (", ..." if len(valid) > 20 else "")
    return f"valid: {shown}" if valid else "there is none"
