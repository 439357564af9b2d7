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
    rows_split: int = 0  # conversations whose turns became examples of their own
    problems: list[str] = field(default_factory=list)  # of the first skipped rows, each with its place
    unused: set[str] = field(default_factory=set)  # names of fields that nothing reads

    def add(self, place: str, problem: str, truncated: bool = False, split_into_turns: bool = False) -> None:
        """Note a row that was read.

        Raises:
            UserError: it has a problem, and `data.on_bad_row` is error.
        """
        self.rows_read += 1
        self.rows_truncated += truncated
        self.rows_split += split_into_turns
        if not problem:
            return
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
        if self.rows_split:
            head += (
                f"; {self.rows_split:,} conversations became one example a turn, because the chat template "
                "renders earlier turns anew"
            )
        more = self.rows_skipped - len(self.problems)
        lines = [f"  skipped {problem}" for problem in self.problems]
        if more:
            lines.append(f"  and {more:,} more")
        if self.unused:
            lines.append(f"  not used: {', '.join(sorted(self.unused))}")
        return "\n".join([head, *lines])
