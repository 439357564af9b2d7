"""A stream's rows by windows: each rank encodes its share of one, and all learn the lengths of all examples."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from dora_dist.data.batches import Split
from dora_dist.data.encode import Encoded, Encoder, Example, chunks
from dora_dist.data.packing import pack
from dora_dist.data.rows import Row, characters
from dora_dist.data.sources import Source
from dora_dist.errors import RunFailed, UserError

Exchange = Callable[[bytes], list[bytes]]  # every rank's bytes, in the order of the ranks


class Told(NamedTuple):
    """What all ranks know of a row."""

    lengths: list[int]  # of each of its examples, in tokens
    targets: list[int]  # of each of its examples
    problem: str = ""
    truncated: bool = False
    split_into_turns: bool = False

    @staticmethod
    def of(made: Encoded) -> "Told":
        lengths, targets = [len(e.ids) for e in made.examples], [e.targets for e in made.examples]
        return Told(lengths, targets, made.problem, made.truncated, made.split_into_turns)


class Unit(NamedTuple):
    """What one row of a batch holds: an example, or several where they are packed."""

    parts: list[tuple[int, int]]  # (row of the window, example of the row)
    tokens: int
    targets: int


@dataclass
class Window:
    """Consecutive rows of one pass over the data."""

    number: int  # over all passes
    rows: list[Row]
    ends_pass: bool
    encoded: dict[int, Encoded]  # of this rank's share
    unused: list[str]  # fields that nothing reads, met so far
    error: Exception | None = None  # that ended the reading

    def tell(self, exchange: Exchange) -> tuple[list[Told], set[str]]:
        """(what all ranks know of each row, the unused fields), by one exchange.

        Raises:
            UserError, RunFailed: on all ranks alike, where one cannot go on.
        """
        share = {str(row): Told.of(made) for row, made in self.encoded.items()}
        user = isinstance(self.error, UserError)
        error = self.error and [user, str(self.error) if user else f"{type(self.error).__name__}: {self.error}"]
        parts = [json.loads(data) for data in exchange(json.dumps([share, self.unused, error]).encode())]
        for rank, (_, _, problem) in enumerate(parts):
            if problem:
                users, text = problem
                lost = self.error or RunFailed(f"rank {rank} cannot read the data: {text}")
                raise UserError(text) if users else lost
        told = {int(row): Told(*about) for share, _, _ in parts for row, about in share.items()}
        return [told[row] for row in range(len(self.rows))], {name for _, names, _ in parts for name in names}


class WindowReader:
    """Reads windows and encodes a rank's share of them; for one thread at a time.

    Endless: the rows start over at their end.
    """

    def __init__(
        self, source: Source, encoder: Encoder, split: Split, seed: int | None, rows: int, text: int, ended: Event
    ) -> None:
        """`seed`: of the order of windows' rows; None: it is not known yet, since rows are packed. `rows`, `text`
        (in characters): of a window at most; `ended`: set where none is wanted any more."""
        self._source, self._encoder, self._split, self._seed = source, encoder, split, seed
        self._rows, self._text, self._ended = rows, text, ended
        self._iterator: Iterator[Row] | None = None
        self._ahead: Row | None = None
        self._number = 0

    def next(self, first: int) -> Window:
        """The next window. `first`: how many units the windows before it had. As long as each row makes one unit,
        this rank's share is what it will train on; else `encode` brings what it lacks."""
        rows: list[Row] = []
        encoded: dict[int, Encoded] = {}
        ends_pass, error = False, None
        try:
            rows, ends_pass = self._read()
            encoded = self.encode(rows, self._share(len(rows), first))
        except Exception as problem:  # all ranks shall hear of it
            error = problem
        window = Window(self._number, rows, ends_pass, encoded, sorted(self._encoder.unused), error)
        self._number += 1
        return window

    def _share(self, rows: int, first: int) -> Sequence[int]:
        """The rows that this rank encodes first: together, the ranks encode each once."""
        if self._seed is None:
            return range(self._split.rank, rows, self._split.world_size)
        mine = self._split.owners(first, rows) == self._split.rank
        order = window_generator(self._seed, self._number).permutation(rows)
        return np.sort(order[mine]).tolist()

    def _read(self) -> tuple[list[Row], bool]:
        """(rows, whether the pass ends with them)"""
        if self._iterator is None:
            self._iterator = iter(self._source)
            self._ahead = next(self._iterator, None)
        rows: list[Row] = []
        size = 0
        while self._ahead is not None and len(rows) < self._rows and size < self._text:
            rows.append(self._ahead)
            size += characters(self._ahead.fields)
            self._ahead = None if self._ended.is_set() else next(self._iterator, None)
        ends_pass = self._ahead is None
        if ends_pass:
            self._iterator = None
        return rows, ends_pass

    def encode(self, rows: list[Row], some: Sequence[int]) -> dict[int, Encoded]:
        """Some of a window's rows, by their numbers."""
        if not any(self._encoder.begin(row) for row in rows):
            return {number: Encoded([], rows[number].problem) for number in some}
        encoded: dict[int, Encoded] = {}
        for chunk in chunks(some, rows.__getitem__):
            if self._ended.is_set():
                break
            encoded |= zip(chunk, self._encoder.encode_chunk([rows[n] for n in chunk]), strict=True)
        return encoded


def window_generator(seed: int, window: int) -> np.random.Generator:
    """Its first permutation is the order of the window's rows."""
    return np.random.Generator(np.random.PCG64([seed, window]))


def units_of(
    told: list[Told], generator: np.random.Generator, pack_to: int | None, pairs: bool = False
) -> list[Unit]:
    """A window's units, in an order that depends on no rank.

    Args:
        generator: of the window; shuffles its rows and the parts of long ones, and packs.
        pack_to: tokens of a pack; None: no packing.
        pairs: a row's two examples are one unit, and one target.
    """
    order = generator.permutation(len(told))
    if pairs:
        good = [(int(row), told[row]) for row in order if told[row].lengths]
        return [Unit([(row, 0), (row, 1)], sum(about.lengths), 1) for row, about in good]
    parts = [(int(row), part) for row in order for part in range(len(told[row].lengths))]
    if any(len(row.lengths) > 1 for row in told):
        parts = [parts[place] for place in generator.permutation(len(parts))]
    groups = [[part] for part in parts]
    if pack_to is not None:
        packs = pack([told[row].lengths[part] for row, part in parts], pack_to)  # the fullest first
        groups = [[parts[place] for place in packs[number]] for number in generator.permutation(len(packs))]
    return [
        Unit(group, sum(told[r].lengths[p] for r, p in group), sum(told[r].targets[p] for r, p in group))
        for group in groups
    ]


class OwnExamples:
    """A window's examples that this rank trains on: those of its share, and those that a job encodes."""

    def __init__(self, encoded: dict[int, Encoded], coming: Any = None) -> None:
        self._encoded, self._coming = encoded, coming

    def __getitem__(self, part: tuple[int, int]) -> Example:
        row, number = part
        if row not in self._encoded:
            self._encoded |= self._coming.result()
        return self._encoded[row].examples[number]
