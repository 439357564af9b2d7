"""Files of JSON, CSV and plain text to raw rows that know their place, "file:line"; and the report on them.

Read with the standard library, so that an error names the line. A row that cannot be read is still yielded,
with its `problem` set: whether it ends the run is the caller's decision (`data.on_bad_row`).
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dora_dist.errors import UserError
from dora_dist.io.headers import StrictDecoder

SHOWN = 5  # places of bad rows that a report names


class Row(NamedTuple):
    place: str  # "file:line"; of parquet and the hub, the number of the row
    fields: dict[str, Any]
    problem: str = ""  # why the row could not be read; "" where it could


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


def characters(value: Any) -> int:
    """About how much text a value of JSON holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 1


def describe(value: Any) -> str:
    """What a JSON value is, for an error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), f"of type {type(value).__name__}")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _decoded_row(place: str, value: Any, decoder: StrictDecoder) -> Row:
    problem = decoder.problem()
    return Row(place, {}, problem) if problem else as_row(place, value)


def as_row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        example = '{"prompt": "...", "completion": "..."}'
        return Row(place, {}, f"the row is {describe(value)}; valid would be an object such as {example}")
    return Row(place, value)


def _jsonl_rows(name: str) -> Iterator[Row]:
    decoder = StrictDecoder()
    with Path(name).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{name}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield _decoded_row(place, decoder.decode(line), decoder)
            except UnicodeDecodeError as error:
                yield Row(place, {}, _not_utf8(error))
            except (ValueError, RecursionError) as error:
                decoder.problem()  # of the row that is told already
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                yield Row(place, {}, f"broken JSON: {what}; valid would be one JSON object in a line")


def _json_rows(name: str) -> Iterator[Row]:
    """The rows of a JSON list. Past broken JSON no row can be found again, so that ends the reading."""
    decoder, text = StrictDecoder(), _read_text(name)
    position = _skip_space(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise UserError(
            f"{name}: the file does not hold a list; valid would be [{{...}}, {{...}}], "
            "or one object in a line in a file named .jsonl"
        )
    position, line, counted = _skip_space(text, position + 1), 1, 0
    mark = "]" if text[position : position + 1] == "]" else ","  # what stands between rows, or ends them
    while mark == ",":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken_json(name, text, error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _broken_json(name, text, position, str(error)) from None
        yield _decoded_row(f"{name}:{line}", value, decoder)
        position = _skip_space(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            raise _broken_json(name, text, position, "expected ',' or ']' after a row")
        position = _skip_space(text, position + 1) if mark == "," else position
    end = _skip_space(text, position + 1)
    if end != len(text):
        raise _broken_json(name, text, end, "there is more after the list's closing ']'")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken_json(name: str, text: str, position: int, problem: str) -> UserError:
    line = text.count("\n", 0, position) + 1
    return UserError(f"{name}:{line}: broken JSON: {problem}; valid would be a list of objects")


def _csv_rows(name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents longer than 128 KiB
    # Bytes that are not UTF-8 become lone surrogates, so that they spoil their own row only.
    with Path(name).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Without strict, an unclosed quote swallows the rest of the file.
        reader = csv.reader(file, strict=True)
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header) or "" in header:
            raise UserError(f"{name}:1: the header's names must be distinct and not empty, found {header}")
        while True:
            place = f"{name}:{reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(place, {}, f"broken CSV: {error}")
                continue
            if values:
                yield _csv_row(place, header, values)


def _csv_row(place: str, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        return Row(place, {}, f"the row has {len(values)} fields; valid would be the header's {len(header)}")
    if not all(map(is_unicode, values)):
        return Row(place, {}, "not valid UTF-8; valid would be a file saved as UTF-8")
    return Row(place, dict(zip(header, values, strict=True)))


def is_unicode(text: str) -> bool:
    """Whether the string holds no lone surrogate (JSON's "\\ud800"), which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text_rows(name: str) -> Iterator[Row]:
    """A file is one document; a file of nothing but white space holds none."""
    data = Path(name).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Row(f"{name}:{_line_of(error)}", {}, _not_utf8(error))
        return
    if text.strip():
        yield Row(f"{name}:1", {"text": text})


def _read_text(name: str) -> str:
    try:
        return Path(name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{_line_of(error)}: {_not_utf8(error)}") from None


def _line_of(error: UnicodeDecodeError) -> int:
    return error.object.count(b"\n", 0, error.start) + 1


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}); valid would be a file saved as UTF-8"


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows, "text": _text_rows,
}  # fmt: skip
