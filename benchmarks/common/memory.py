"""What torch's allocator holds over time, from its profiler: temporaries inside operators count too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

MARK = "memory_profile: "


def memory_profile(work: Callable[[Callable[[str], Any]], object], file: Path) -> tuple[int, dict[str, int]]:
    """Runs `work(mark)` and returns its peak over what was held at its start, and what was held at each
    `mark(name)`, in bytes of CPU memory. `file` holds the trace."""
    marks = []

    def mark(name: str) -> None:
        with record_function(MARK + name):
            marks.append(name)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work(mark)
    profiled.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    assert changes, "the profiler saw no allocation"
    at = {e["name"].removeprefix(MARK): e["ts"] for e in events if e["name"].startswith(MARK)}
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, {name: sum(change for ts, change in changes if ts <= at[name]) for name in marks}
