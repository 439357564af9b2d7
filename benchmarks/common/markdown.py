"""Tables of README and docs/."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def measured_by(record: dict[str, Any], case: str, **names: str) -> str:
    """Of a row: device, case, and in brackets the versions of packages (`names` as shown) and the date."""
    versions = [f"{shown} {record['versions'][key]}" for key, shown in names.items() if key in record["versions"]]
    return f"{record['device']}, {case} ({', '.join([*versions, record['date']])})"


def any_gpu(records: Iterable[dict[str, Any]], columns: int) -> list[list[str]]:
    """The row that says that no GPU was measured, where none was."""
    if any("CPU" not in record["device"] for record in records):
        return []
    return [["any GPU", *["not measured"] * columns]]
