"""All encoded rows of a source, kept in a few flat arrays."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dora_dist.data.encode import Encoder, Example
from dora_dist.data.rows import Report
from dora_dist.data.sources import Source, find_source
from dora_dist.errors import UserError


@dataclass(frozen=True, eq=False)
class Examples:
    """A sequence of `Example`s in flat arrays, so that 100,000 rows cost no more than their tokens."""

    ids: np.ndarray  # [tokens] int32
    supervised: np.ndarray  # [tokens] bool
    offsets: np.ndarray  # [rows + 1] int64: row i is ids[offsets[i]:offsets[i + 1]]
    labels: np.ndarray  # [rows] int64, -1 for causal_lm
    token_types: np.ndarray | None  # [tokens] uint8
    report: Report

    @staticmethod
    def gather(examples: Iterable[Example], report: Report) -> "Examples":
        rows = list(examples)
        lengths = [len(row.ids) for row in rows]
        types = [row.token_types for row in rows if row.token_types is not None]
        gathered = Examples(
            np.concatenate([row.ids for row in rows]),
            np.concatenate([row.supervised for row in rows]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.array([row.label for row in rows], dtype=np.int64),
            np.concatenate(types) if types else None,
            report,
        )
        report.supervised_tokens = int(gathered.supervised_counts.sum())
        return gathered

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies all that the rows are encoded as."""
        digest = hashlib.sha256()
        for array in (self.ids, self.supervised, self.offsets, self.labels, self.token_types):
            if array is None:
                digest.update(b"none")
            else:
                digest.update(f"{array.dtype.str} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.offsets[index], self.offsets[index + 1])
        types = None if self.token_types is None else self.token_types[part]
        return Example(self.ids[part], self.supervised[part], int(self.labels[index]), types)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] int64: tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """[rows] int64: predicted supervised tokens of each row (its first token is never predicted); 1 for a
        labelled row."""
        before = np.concatenate([[0], np.cumsum(self.supervised)])
        first = self.supervised[self.offsets[:-1]]
        counts = before[self.offsets[1:]] - before[self.offsets[:-1]] - first
        return np.where(self.labels >= 0, 1, counts)


def load_examples(path: str, encoder: Encoder, key: str = "data.train") -> Examples:
    """Read and encode all rows of `path`.

    Args:
        path: a file, a directory of files of one kind, or a hub id.
        encoder: has met no other rows.
        key: the setting that names `path`, for errors; `data.eval` takes the hub's validation split.

    Raises:
        UserError: what `path` names cannot be read, a row is bad and `data.on_bad_row` is error, or no row is
            left.
    """
    report = Report(encoder.config.on_bad_row)
    source = find_source(path, key)
    rows = list(encoder.encode(source, report))
    if not rows:
        raise nothing_left(source, report)
    return Examples.gather(rows, report)


def nothing_left(source: Source, report: Report) -> UserError:
    named = f"{source.key}: {source.path!r}"
    if not report.rows_read:
        return UserError(f"{named} holds no rows")
    first = f"; the first: {report.problems[0]}" if report.problems else ""
    return UserError(f"{named}: all {report.rows_read} rows are bad{first}")
