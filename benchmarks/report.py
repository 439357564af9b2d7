"""Writes the tables of README.md and docs/ and draws the figures, from benchmarks/results/.
What nobody measured is called so.

    python -m benchmarks.report
"""

from collections.abc import Callable

from benchmarks.common.results import RESULTS, ROOT
from benchmarks.planning import tables as planning
from benchmarks.step import tables as step

PAGES = (
    "README.md", "docs/strategies.md", "docs/quantization.md", "docs/performance.md", "docs/scaling.md",
    "docs/integrations.md",
)  # fmt: skip
BEGIN = "<!-- {name}: made by benchmarks/report.py -->"
TABLES: tuple[Callable[[], str], ...] = (
    step.performance, step.folded, step.profiles, step.kept, step.norms, step.refresh, step.experts,
    step.published, step.trainers, planning.memory, planning.account, planning.simulated, planning.planned,
    planning.predicted,
)  # fmt: skip


def updated(page: str) -> str:
    """`page` with each table that it has marks for made anew."""
    for make in TABLES:
        begin, end = BEGIN.format(name=make.__name__), f"<!-- /{make.__name__} -->"
        if begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return page


def draw() -> None:
    from benchmarks.planning.figure import draw_simulated
    from benchmarks.scaling.curves import draw_all
    from benchmarks.step.figure import draw_device

    for path in sorted(RESULTS.glob("*.json")):
        draw_device(path)
    draw_all(RESULTS / "scaling")
    draw_simulated()


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(updated(path.read_text()))
    draw()
