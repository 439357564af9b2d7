"""What became of the rows that were read: raised at the first bad one, or counted with their places."""

from dataclasses import dataclass, field
from typing import Literal

from dora_dist.errors import UserError

SHOWN = 5  # places of bad rows that a report names


@dataclass
class Report:
    """Counts of one reading. `str()` is what to print."""

    on_bad_row: Literal["error", "skip"] = "error"
    rows_read: int = 0
    rows_skipped: int = 0
    rows_truncated: int = 0  # to data.seq_len
    supervised_tokens: int = 0  # that are predicted; for classification, rows with a label
    problems: list[str] = field(default_factory=list)  # of the first skipped rows, each with its place

    def bad_row(self, place: str, problem: str) -> None:
        """Note a row that cannot be used.

        Raises:
            UserError: `data.on_bad_row` is error.
        """
        message = f"{place}: {problem}"
        if self.on_bad_row == "error":
            raise UserError(message)
        self.rows_skipped += 1
        if len(self.problems) < SHOWN:
            self.problems.append(message)

    def __str__(self) -> str:
        head = (
            f"{self.rows_read:,} rows read, {self.rows_skipped:,} skipped, "
            f"{self.rows_truncated:,} truncated; {self.supervised_tokens:,} supervised tokens"
        )
        more = self.rows_skipped - len(self.problems)
        lines = [f"  skipped {problem}" for problem in self.problems]
        return "\n".join([head, *lines, *([f"  and {more:,} more"] if more else [])])
