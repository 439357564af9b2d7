"""The same global batches from a stream too large to hold: read, encoded, shuffled and packed on the fly.

Windows of rows are shuffled within themselves. Of each, a rank encodes the share that it will train on, in a
thread, while the window before is trained on; then the ranks tell each other the lengths of all examples, from
which each computes the same order of units. Rows may turn out to be bad, several examples, or packed together:
then a rank lacks some of its examples, and the thread encodes those, too.
"""

import copy
from collections import deque
from functools import partial
from typing import Any

import numpy as np

from dora_dist.config import DataConfig
from dora_dist.data.batches import Collate, GlobalBatch, Split
from dora_dist.data.encode import Encoder, Task
from dora_dist.data.examples import nothing_left
from dora_dist.data.report import Report
from dora_dist.data.sources import find_source
from dora_dist.data.windows import Exchange, OwnExamples, Told, Unit, Window, WindowReader, units_of
from dora_dist.data.worker import Worker

WINDOW_ROWS = 10_000  # shuffled together
WINDOW_TEXT = 32_000_000  # characters of a window, after which it ends with fewer rows


class StreamPlan:
    """Global batches in order of steps, the same whatever the number of ranks.

    The data starts over at its end, so the caller decides the number of steps; `rows` and `steps_per_epoch`
    of `BatchPlan` are unknown here. `report` counts the rows of the first pass so far. All ranks ask for the same
    steps, in the same order: every few of them exchange something.
    """

    def __init__(
        self,
        path: str,
        config: DataConfig,
        tokenizer: Any,
        *,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_id: int,
        exchange: Exchange = lambda data: [data],
        task: Task = "causal_lm",
        label2id: dict[str, int] | None = None,
        num_labels: int | None = None,
        vocab_size: int | None = None,
        shuffle_rows: int = WINDOW_ROWS,
    ) -> None:
        causal = task == "causal_lm"
        self.report = Report(config.on_bad_row)
        self._config, self._exchange, self._seed = config, exchange, seed
        self._source = find_source(path, streaming=True)
        self._split = Split(micro_batch_size, accumulation, rank, world_size)
        self._collate = Collate(config.seq_len, pad_id, config.packing and causal, causal)
        own = copy.deepcopy(tokenizer)  # none can be used by two threads at once
        encoder = Encoder(config, own, task, label2id, num_labels, vocab_size)
        self._worker = Worker()
        self._reader = WindowReader(
            self._source, encoder, self._split, shuffle_rows, WINDOW_TEXT, self._worker.ended
        )
        self._next_step = 0
        self._units: deque[tuple[Unit, OwnExamples]] = deque()
        self._made = 0  # units of all windows so far
        self._enough = 0  # units: with fewer of them, the next window's are asked for
        self._first_pass, self._pass_examples = True, 0
        self._told_unused: set[str] = set()
        self._news: list[str] = []
        self._coming: Any = None  # the next window

    @property
    def fingerprint(self) -> str:
        """Identifies the source; the rows are not read for it."""
        return self._source.fingerprint

    def start(self) -> None:
        """Begin to read. From here on the chat template belongs to this plan's thread: rendering one with marks in
        two threads at once mixes them up."""
        if self._coming is None:
            order = None if self._collate.packing else partial(_order, self._seed)
            self._coming = self._worker.do(partial(self._reader.next, order, self._made))

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
        generator = _generator(self._seed, window.number)
        order = generator.permutation(len(told))
        units = units_of(told, order, generator, self._config.seq_len if self._collate.packing else None)
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
        report = self.report if self._first_pass else Report(self._config.on_bad_row)  # the same rows again
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


def _generator(seed: int, window: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, window]))


def _order(seed: int, window: int, rows: int) -> np.ndarray:
    """[rows] the shuffled rows of a window."""
    return _generator(seed, window).permutation(rows)
