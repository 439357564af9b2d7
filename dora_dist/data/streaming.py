"""The same global batches from a stream too large to hold: read, encoded, shuffled and packed on the fly."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from dora_dist.config import DataConfig
from dora_dist.data.batches import Collate, GlobalBatch, Split
from dora_dist.data.encode import Encoder, Example, Task
from dora_dist.data.examples import nothing_left
from dora_dist.data.packing import pack
from dora_dist.data.report import Report
from dora_dist.data.sources import find_source

SHUFFLE_ROWS = 10_000  # rows held for shuffling
PACK_ROWS = 1_000  # rows packed together


class StreamPlan:
    """Global batches in order of steps. Every rank reads the whole stream and takes its part.

    The data starts over at its end, so the caller decides the number of steps; `rows` and `steps_per_epoch`
    of `BatchPlan` are unknown here. `report` counts the rows of the first pass so far.
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
        task: Task = "causal_lm",
        label2id: dict[str, int] | None = None,
        num_labels: int | None = None,
        vocab_size: int | None = None,
        shuffle_rows: int = SHUFFLE_ROWS,
    ) -> None:
        causal = task == "causal_lm"
        self.report = Report(config.on_bad_row)
        self._config = config
        self._source = find_source(path, streaming=True)
        self._encoder = Encoder(config, tokenizer, task, label2id, num_labels, vocab_size)
        self._split = Split(micro_batch_size, accumulation, rank, world_size)
        self._collate = Collate(config.seq_len, pad_id, config.packing and causal, causal)
        self._order = np.random.Generator(np.random.PCG64(seed))
        self._shuffle_rows = shuffle_rows
        self._next_step = 0
        self._units = self._packs() if self._collate.packing else ([example] for example in self._shuffled())

    @property
    def fingerprint(self) -> str:
        """Identifies the source; the rows are not read for it."""
        return self._source.fingerprint

    def global_batch(self, step: int) -> GlobalBatch:
        """The data of optimizer step `step` (from 0). Skipping ahead reads what lies between, to resume a
        run.

        Raises:
            ValueError: `step` was handed out or passed before.
        """
        if step < self._next_step:
            raise ValueError(f"a stream only goes forward: step {step} was asked for after {self._next_step - 1}")
        for _ in range((step - self._next_step) * self._split.global_size):
            next(self._units)
        self._next_step = step + 1
        units = list(islice(self._units, self._split.global_size))
        examples = [example for unit in units for example in unit]
        return GlobalBatch(
            [self._collate(units[part]) for part in self._split.mine()],
            targets=sum(example.targets for example in examples),
            tokens=sum(len(example.ids) for example in examples),
        )

    def _shuffled(self) -> Iterator[Example]:
        """Endless. A row leaves the buffer when a later one takes its place; a pass ends with emptying the
        buffer, so that each pass holds every row once."""
        report = self.report
        while True:
            buffer: list[Example] = []
            seen = 0
            for example in self._encoder.encode(self._source, report):
                seen += 1
                if report is self.report:
                    report.supervised_tokens += example.targets
                if len(buffer) < self._shuffle_rows:
                    buffer.append(example)
                else:
                    place = int(self._order.integers(len(buffer)))
                    yield buffer[place]
                    buffer[place] = example
            if not seen:
                raise nothing_left(self._source, report)
            for place in self._order.permutation(len(buffer)).tolist():
                yield buffer[place]
            report = Report(self._config.on_bad_row)  # later passes meet the same rows again

    def _packs(self) -> Iterator[list[Example]]:
        """Endless."""
        stream = self._shuffled()
        while True:
            window = list(islice(stream, PACK_ROWS))
            packs = pack([len(example.ids) for example in window], self._config.seq_len)
            for number in self._order.permutation(len(packs)).tolist():  # `pack` puts the fullest first
                yield [window[row] for row in packs[number]]
