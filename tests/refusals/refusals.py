"""Every mistake of the tables, made: `python -m tests.refusals.refusals` prints how many are refused rightly."""

import sys
import tempfile
from pathlib import Path

from tests.refusals import refusals_adapters, refusals_data, refusals_files, refusals_yaml
from tests.support.refusals import Case, run_cases

TABLES = {
    "YAML": refusals_yaml.cases, "data": refusals_data.cases, "files": refusals_files.cases,
    "adapters": refusals_adapters.cases,
}  # fmt: skip


def run_table(name: str, every: int = 1) -> tuple[int, int, dict[str, str]]:
    """(refused rightly, made, what is wrong with the others), of each `every`-th mistake of a table."""
    cases: list[Case] = list(TABLES[name]())[::every]
    with tempfile.TemporaryDirectory() as directory:
        refused, wrong = run_cases(cases, Path(directory) / "cases")
    return refused, len(cases), wrong


def run_all() -> dict[str, tuple[int, int]]:
    """By table: (refused rightly, made). Says what is wrong with the others on stderr."""
    counts = {}
    for name in TABLES:
        refused, made, wrong = run_table(name)
        counts[name] = refused, made
        for case, problem in wrong.items():
            print(f"{name}: {case}: {problem}", file=sys.stderr)
    return counts


if __name__ == "__main__":
    results = run_all()
    for table, (refused, made) in results.items():
        print(f"{table}: {refused} of {made} mistakes refused")
    sys.exit(any(refused < made for refused, made in results.values()))
