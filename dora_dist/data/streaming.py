"""The same global batches from a stream too large to hold: read, encoded, shuffled and packed on the fly.

Windows of rows are shuffled within themselves. Of each, a rank encodes the share that it will train on, in a
thread, while the window before is trained on; then the ranks tell each other the lengths of all examples, from
which each computes the same order of units. Rows may turn out to be bad, several examples, or packed together:
then a rank lacks some of its examples, and the thread encodes those, too.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from dora_dist.data.batches import Collate, GlobalBatch, Split
from dora_dist.data.encode import Encoder
from dora_dist.data.examples import nothing_left
from dora_dist.data.rows import Report
from dora_dist.data.sources import Source
from dora_dist.data.windows import (
    Exchange,
    OwnExamples,
    Told,
    Unit,
    Window,
    WindowReader,
    units_of,
    window_generator,
)

WINDOW_ROWS = 10_000  # shuffled together
WINDOW_TEXT = 32_000_000  # characters of a window, after which it ends with fewer rows
_END_S = 10  # that a job has to notice that it is no longer wanted
Result = TypeVar("Result")


class StreamPlan:
    """Global batches in order of steps, the same whatever the number of ranks.

    The data starts over at its end, so the caller decides the number of steps; `rows` and `steps_per_epoch`
    of `BatchPlan` are unknown here. `report` counts the rows of the first pass so far. All ranks ask for the same
    steps, in the same order: every few of them exchange something.

    Args:
        encoder: for this plan's thread alone, as is its tokenizer.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        split: Split,
        collate: Collate,
        seed: int,
        exchange: Exchange = lambda data: [data],
        shuffle_rows: int = WINDOW_ROWS,
    ) -> None:
        self._on_bad_row = encoder.config.on_bad_row
        self.report = Report(self._on_bad_row)
        self._source, self._split, self._collate = source, split, collate
        self._seed, self._exchange = seed, exchange
        self._worker = Worker()
        order = None if collate.packing else seed
        self._reader = WindowReader(source, encoder, split, order, shuffle_rows, WINDOW_TEXT, self._worker.ended)
        self._next_step = 0
        self._units: deque[tuple[Unit, OwnExamples]] = deque()
        self._made = 0  # units of all windows so far
        self._enough = 0  # units: with fewer of them, the next window's are asked for
        self._first_pass, self._pass_examples = True, 0
        self._told_unused: set[str] = set()
        self._news: list[str] = []
        self._coming: Any = None  # the next window

    def start(self) -> None:
        """Begin to read. From here on the chat template belongs to this plan's thread: rendering one with marks in
        two threads at once mixes them up."""
        if self._coming is None:
            self._coming = self._worker.do(partial(self._reader.next, self._made))

    def global_batch(self, step: int) -> GlobalBatch:
        """The data of optimizer step `step` (from 0). Skipping ahead reads what lies between, to resume a
        run.

        Raises:
            ValueError: `step` was handed out or passed before.
        """
        if step < self._next_step:
            raise ValueError(f"a stream only goes forward: step {step} was asked for after {self._next_step - 1}")
        size = self._split.global_size
        skipped = (step - self._next_step) * size
        while len(self._units) < skipped + max(2 * size, self._enough):
            skipped = self._add_window(skipped)
        for _ in range(skipped):
            self._units.popleft()
        self._next_step = step + 1
        taken = [self._units.popleft() for _ in range(size)]
        micro_batches = [
            self._collate([[examples[part] for part in unit.parts] for unit, examples in taken[mine]])
            for mine in self._split.mine()
        ]
        units = [unit for unit, _ in taken]
        return GlobalBatch(micro_batches, sum(unit.targets for unit in units), sum(unit.tokens for unit in units))

    def news(self, last: bool = False) -> list[str]:
        """What to tell the user of the rows since this was asked: fields that nothing reads, and the counts of the
        first pass once it is over, or when nothing more is asked for (`last`)."""
        news, self._news = self._news, []
        if last and self._first_pass:
            news.append(f"data, as far as it was read: {self.report}")
        return news

    def _add_window(self, skipped: int) -> int:
        """Queue a window's units but those that are skipped; how many are still to be skipped."""
        self.start()
        window: Window = self._coming.result()
        self._coming = None
        told, unused = window.tell(self._exchange)
        self._count(window, told, unused)
        generator = window_generator(self._seed, window.number)
        pack_to = self._collate.seq_len if self._collate.packing else None
        units = units_of(told, generator, pack_to, self._collate.pairs)
        dropped = min(max(skipped - len(self._units), 0), len(units))
        owners = self._split.owners(self._made, len(units))
        own = [units[place] for place in range(dropped, len(units)) if owners[place] == self._split.rank]
        rows = {row for unit in own for row, _ in unit.parts}
        missing = sorted(rows - window.encoded.keys())
        coming = self._worker.do(partial(self._reader.encode, window.rows, missing)) if missing else None
        examples = OwnExamples({row: made for row, made in window.encoded.items() if row in rows}, coming)
        self._units.extend((unit, examples) for unit in units[dropped:])
        self._made += len(units)
        self._enough = len(units) // 2
        self.start()
        return skipped - dropped

    def _count(self, window: Window, told: list[Told], unused: set[str]) -> None:
        """Count a window's rows. UserError, on every rank: one is bad, or a whole pass holds no good one."""
        report = self.report if self._first_pass else Report(self._on_bad_row)  # the same rows again
        for row, about in zip(window.rows, told, strict=True):
            report.add(row.place, about.problem, about.truncated, about.split_into_turns)
            report.supervised_tokens += sum(about.targets)
            self._pass_examples += len(about.lengths)
        self.report.unused |= unused
        if new := self.report.unused - self._told_unused:
            self._news.append(f"data: not used: {', '.join(sorted(new))}")
            self._told_unused |= new
        if window.ends_pass:
            if not self._pass_examples:
                raise nothing_left(self._source, report)
            if self._first_pass:
                self._news.append(f"data, read once: {self.report}")
            self._first_pass, self._pass_examples = False, 0


class Worker:
    """A thread that prepares what is asked for next while the main thread trains: jobs one after the other, in the
    order in which they are given.

    It ends with this object or with the program: a thread that is still in a tokenizer's code while the
    interpreter goes away can abort the whole process. Jobs that take long ask `ended` now and then.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._jobs: SimpleQueue = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs, self.ended), name="data", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._jobs, self.ended, thread)

    def do(self, job: Callable[[], Result]) -> "Future[Result]":
        """Begin a job, or queue it; its result or its exception comes with the future. A job holds no reference to
        this object."""
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future


def _work(jobs: SimpleQueue, ended: threading.Event) -> None:
    while True:
        future, job = jobs.get()
        if job is None:
            return
        if ended.is_set():
            future.cancel()
            continue
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        del future, job  # so that nothing outlives its use while the thread waits


def _end(jobs: SimpleQueue, ended: threading.Event, thread: threading.Thread) -> None:
    ended.set()
    jobs.put((None, None))
    thread.join(_END_S)
