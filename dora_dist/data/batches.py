"""Examples to batches: the same global batches whatever the number of ranks and accumulation that form them.

A global batch is `micro_batch_size * accumulation * world_size` units (rows, or packs of rows) of an endless
stream of shuffled epochs. Every rank computes the same stream from the seed and takes its part, so that all
know the number of targets of the whole global batch without communication.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from dora_dist.data.encode import Example
from dora_dist.data.examples import Examples
from dora_dist.data.packing import pack
from dora_dist.errors import UserError

IGNORED = -100  # a target that no loss counts
MicroBatch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's data."""

    micro_batches: list[MicroBatch]  # this rank's
    targets: int  # of the whole global batch, over all ranks: predicted supervised tokens, labelled rows, or pairs
    tokens: int  # not counting padding, over all ranks


@dataclass(frozen=True)
class Split:
    """How a global batch is shared out: micro-batch `a` of rank `r` holds units [(a * world_size + r) * size
    : + size] for `size = micro_batch_size`."""

    micro_batch_size: int
    accumulation: int
    rank: int
    world_size: int

    @property
    def global_size(self) -> int:
        return self.micro_batch_size * self.accumulation * self.world_size

    def mine(self) -> Iterator[slice]:
        """The units of each of this rank's micro-batches."""
        for a in range(self.accumulation):
            start = (a * self.world_size + self.rank) * self.micro_batch_size
            yield slice(start, start + self.micro_batch_size)

    def owners(self, first: int, count: int) -> np.ndarray:
        """[count] the ranks that train on units first, first + 1, ... of the endless stream of units."""
        return np.arange(first, first + count) // self.micro_batch_size % self.world_size


@dataclass(frozen=True)
class Collate:
    """Makes a micro-batch of units, each a list of examples: one, or those of a pack, or what is compared.

    causal: `input_ids` and `targets` [B, T] int64, `targets` being the id that follows each position (-100:
    not supervised); with packing also `position_ids` [B, T] and `document_lengths` [B, D], each row's in their
    order, then zeros. With `pairs` each example of a unit, chosen and rejected, is a row. With `others` a unit is
    a labelled example and another one: the first ones are rows with `labels` [B], and their prompts with the other
    ones' completions are `other_input_ids` and `other_targets`.
    Not causal: `input_ids` and `attention_mask` [B, T], `labels` [B] int64, and `token_type_ids` [B, T] where the
    tokenizer has them. T is the longest row rounded up to a multiple of 8, at most seq_len; padding is at the
    right, where causal attention never looks.
    """

    seq_len: int
    pad_id: int
    packing: bool = False
    causal: bool = True
    pairs: bool = False
    others: bool = False

    def __call__(self, units: Sequence[Sequence[Example]]) -> MicroBatch:
        if self.others:
            own = self._rows([[first] for first, _ in units])
            others = self._rows([[self._with_completion(*unit)] for unit in units])
            labels = torch.tensor([first.label for first, _ in units])
            return {**own, "labels": labels, **{f"other_{name}": tensor for name, tensor in others.items()}}
        return self._rows([[example] for unit in units for example in unit] if self.pairs else units)

    def examples(self, units: Sequence[Sequence[int]]) -> list[list[int]]:
        """The rows that a micro-batch takes of units that follow each other in a circle."""
        before = [*units[-1:], *units[:-1]]
        return [[*unit, *(other if self.others else ())] for unit, other in zip(units, before, strict=True)]

    def _with_completion(self, own: Example, other: Example) -> Example:
        """The prompt of one with the completion of another."""
        start, begin = (int(example.supervised.argmax()) for example in (own, other))
        ids = np.concatenate([own.ids[:start], other.ids[begin:]])[: self.seq_len]
        supervised = np.concatenate([own.supervised[:start], other.supervised[begin:]])[: self.seq_len]
        return Example(ids, supervised)

    def _rows(self, units: Sequence[Sequence[Example]]) -> MicroBatch:
        longest = max(sum(len(example.ids) for example in unit) for unit in units)
        shape = (len(units), min(-(-longest // 8) * 8, self.seq_len))
        return self._causal(units, shape) if self.causal else self._labelled(units, shape)

    def dummy(self) -> MicroBatch:
        """A micro-batch that contributes nothing to a loss, for a rank that has no rows left."""
        nothing = Example(np.full(1, self.pad_id, dtype=np.int32), np.zeros(1, dtype=bool), label=IGNORED)
        return self([[nothing, nothing] if self.pairs or self.others else [nothing]])

    def _causal(self, units: Sequence[Sequence[Example]], shape: tuple[int, int]) -> MicroBatch:
        ids_BT = np.full(shape, self.pad_id, dtype=np.int64)
        targets_BT = np.full(shape, IGNORED, dtype=np.int64)
        positions_BT = np.zeros(shape, dtype=np.int64)
        for b, unit in enumerate(units):
            start = 0
            for example in unit:
                end = start + len(example.ids)
                ids_BT[b, start:end] = example.ids
                targets_BT[b, start : end - 1] = np.where(example.supervised[1:], example.ids[1:], IGNORED)
                positions_BT[b, start:end] = np.arange(end - start)
                start = end
        batch = {"input_ids": torch.from_numpy(ids_BT), "targets": torch.from_numpy(targets_BT)}
        if self.packing:
            batch["position_ids"] = torch.from_numpy(positions_BT)
            lengths_BD = np.zeros((len(units), max(map(len, units))), dtype=np.int64)
            for b, unit in enumerate(units):
                lengths_BD[b, : len(unit)] = [len(example.ids) for example in unit]
            batch["document_lengths"] = torch.from_numpy(lengths_BD)
        return batch

    def _labelled(self, units: Sequence[Sequence[Example]], shape: tuple[int, int]) -> MicroBatch:
        rows = [example for (example,) in units]
        fields = {"input_ids": np.full(shape, self.pad_id, dtype=np.int64)}
        fields["attention_mask"] = np.zeros(shape, dtype=np.int64)
        if rows[0].token_types is not None:
            fields["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows):
            T = len(row.ids)
            fields["input_ids"][b, :T] = row.ids
            fields["attention_mask"][b, :T] = 1
            if row.token_types is not None:
                fields["token_type_ids"][b, :T] = row.token_types
        fields["labels"] = np.array([row.label for row in rows], dtype=np.int64)
        return {name: torch.from_numpy(values) for name, values in fields.items()}


class BatchPlan:
    """The global batches of a training run, by step, in any order: a run resumes by asking for a later step.

    Attributes:
        rows: examples in an epoch (pairs, where these are compared).
        steps_per_epoch: global batches in an epoch; seldom a whole number, batches straddle epochs.

    Raises:
        UserError: there are fewer units than one global batch holds.
    """

    def __init__(self, examples: Examples, split: Split, collate: Collate, seed: int) -> None:
        self._examples, self._split, self._collate, self._seed = examples, split, collate, seed
        self._units = _units(examples, collate)
        self.rows = sum(map(len, self._units)) // (1 + collate.pairs)
        self.steps_per_epoch = len(self._units) / self._split.global_size
        # Each plan its own cache: a batch asks for its epoch, and for the next where it straddles the two.
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)
        if self.steps_per_epoch < 1:
            units = len(self._units)
            have = f"{self.rows} rows make {units} packs" if collate.packing else f"there are {units} rows"
            raise UserError(
                f"data.train: {have}, but one step takes {split.global_size}: train.micro_batch_size "
                f"{split.micro_batch_size} x train.accumulation {split.accumulation} x {split.world_size} "
                "processes; valid would be more data, or smaller ones of these"
            )

    def _make_epoch_order(self, epoch: int) -> np.ndarray:
        """[units] the order of an epoch."""
        # PCG64 by name: numpy may change what `default_rng` is, and a resumed run must see the same order.
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._units))

    def unit_rows(self, step: int) -> list[list[int]]:
        """The rows of each unit of the global batch of `step` (from 0)."""
        size, count = self._split.global_size, len(self._units)
        positions = range(step * size, (step + 1) * size)
        return [self._units[self._epoch_order(p // count)[p % count]] for p in positions]

    def global_batch(self, step: int) -> GlobalBatch:
        """The data of optimizer step `step` (from 0)."""
        units = self.unit_rows(step)
        rows = [row for unit in units for row in unit]
        taken = self._collate.examples(units)
        micro_batches = [
            self._collate([[self._examples[row] for row in unit] for unit in taken[part]])
            for part in self._split.mine()
        ]
        return GlobalBatch(
            micro_batches,
            targets=len(units) if self._collate.pairs else int(self._examples.supervised_counts[rows].sum()),
            tokens=int(self._examples.lengths[rows].sum()),
        )


class EvaluationBatches:
    """One pass over all rows in order, in lockstep: every rank gets the same number of micro-batches, without
    accumulation or packing.

    A rank without rows left gets a micro-batch whose targets are all ignored, because a sharded forward needs
    all ranks. Iterable again and again; `.targets` is the total over all ranks.
    """

    def __init__(self, examples: Examples, split: Split, collate: Collate) -> None:
        self._examples = examples
        self._split, self._collate = replace(split, accumulation=1), replace(collate, packing=False)
        self._units = self._collate.examples(_units(examples, self._collate))
        self.rows = len(self._units)
        self.targets = self.rows if collate.pairs else int(examples.supervised_counts.sum())

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self._split.global_size
        for start in range(0, self.rows, size):
            taken = self._units[start : start + size]
            for part in self._split.mine():
                units = [[self._examples[row] for row in unit] for unit in taken[part]]
                yield self._collate(units) if units else self._collate.dummy()


def _units(examples: Examples, collate: Collate) -> list[list[int]]:
    """The rows of each unit, in order."""
    if collate.packing:
        return pack(examples.lengths, collate.seq_len)
    size = 1 + collate.pairs
    return [list(range(first, first + size)) for first in range(0, len(examples), size)]
