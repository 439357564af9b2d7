"""Raw rows to token ids with the mask of tokens to learn.

The text of a row is tokenized once as a whole, because tokens made from separately tokenized halves are not
those that a user's prompt meets. A token is supervised where its characters overlap a span to be learnt.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dora_dist.config import DataConfig
from dora_dist.data.fields import BadRow
from dora_dist.data.formats import Labels, detect_format, drafter
from dora_dist.data.rows import Report, Row, characters
from dora_dist.data.templates import Draft
from dora_dist.errors import UserError

_CHUNK_ROWS, _CHUNK_CHARACTERS = 250, 1_000_000
T = TypeVar("T")


class Example(NamedTuple):
    ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool; the first token is never predicted, whatever its mark
    label: int = -1  # of sequence_classification; in unpaired preferences 1: wanted, 0: not
    token_types: np.ndarray | None = None  # [T] uint8: which of a pair's texts, where the tokenizer says so

    @property
    def targets(self) -> int:
        """Predicted supervised tokens; 1 for a labelled row."""
        return 1 if self.label >= 0 else int(np.count_nonzero(self.supervised[1:]))


class Encoded(NamedTuple):
    """What a row became."""

    examples: list[Example]  # several of a long text, and of a conversation that one text cannot show
    problem: str = ""  # why there are none
    truncated: bool = False  # to data.seq_len
    split_into_turns: bool = False  # a conversation whose turns became examples of their own


class _Tokens(NamedTuple):
    """A tokenized text, with one token at its begin where both the text and the tokenizer have put it there."""

    ids: list[int]
    added: list[int]  # 1: by the tokenizer, not in the text
    offsets: list[tuple[int, int]]
    types: list[int]
    cut: bool

    @staticmethod
    def of(encoding: Any) -> "_Tokens":
        ids, added = encoding.ids, encoding.special_tokens_mask
        first = int(len(ids) > 1 and bool(added[0]) and not added[1] and ids[0] == ids[1])
        parts = (ids[first:], added[first:], encoding.offsets[first:], encoding.type_ids[first:])
        return _Tokens(*parts, bool(encoding.overflowing))


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError where the tokenizer can make ids that the model's embedding has no row for."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > vocab_size:
        raise UserError(
            f"model.path: the tokenizer has {size} tokens, but the model's vocabulary is {vocab_size}; "
            "valid would be the tokenizer that the model was trained with, or a model with rows for the new ones: "
            f"model.resize_token_embeddings({-(-size // 64) * 64}), then save_pretrained(DIRECTORY) of model and "
            "tokenizer; to train these rows, name the embedding in dora.modules_to_save"
        )


def chunks(items: Iterable[T], row_of: Callable[[T], Row]) -> Iterator[list[T]]:
    """The items in lists of bounded text, to be tokenized at once: a fast tokenizer runs in parallel."""
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += characters(row_of(item).fields)
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Encoder:
    """The rows of one source to examples. The first row that can be read decides the format of all.

    Args:
        tokenizer: a fast one of transformers.
        labels: of a classifier.
        vocab_size: rows of the model's embedding; None skips that check.
        needed: the format that the task needs; None: any of which a language model learns the tokens.

    Raises:
        UserError: the tokenizer is slow, has no end-of-sequence token, or more tokens than the model.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        labels: Labels | None = None,
        vocab_size: int | None = None,
        needed: str | None = None,
    ) -> None:
        self.config, self.tokenizer, self.labels = config, tokenizer, labels
        self.needed = needed or (None if labels is None else "labels")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"model.path: {type(tokenizer).__name__} is a slow tokenizer, which does not say where its "
                "tokens stand in the text; valid would be a model with a tokenizer.json"
            )
        if vocab_size is not None:
            check_vocabulary(tokenizer, vocab_size)
        self.unused: set[str] = set()  # names of the fields met so far that nothing reads
        self._form = ""
        self._drafter: Callable[[Row], list[Draft]] | None = None

    def encode(self, rows: Iterable[Row], report: Report) -> Iterator[Example]:
        """The examples of the rows in order; lazily, a chunk at a time."""
        for chunk in chunks(self._after_bad_ones(rows, report), lambda row: row):
            for row, made in zip(chunk, self.encode_chunk(chunk), strict=True):
                report.add(row.place, made.problem, made.truncated, made.split_into_turns)
                yield from made.examples
            report.unused |= self.unused

    def _after_bad_ones(self, rows: Iterable[Row], report: Report) -> Iterator[Row]:
        for row in rows:
            if self.begin(row):
                yield row
            else:
                report.add(row.place, row.problem)

    def begin(self, row: Row) -> bool:
        """Let the first row that can be read decide the format. False: none has come yet."""
        if self._drafter is None and not row.problem:
            self._form = detect_format(row, self.config, self.needed)
            if self._form not in ("chat", "labels") and self.tokenizer.eos_token_id is None:
                raise UserError(
                    f"data.format: {self._form} ends each row with the tokenizer's end-of-sequence token, and "
                    "this tokenizer has none; valid would be a tokenizer with an eos_token"
                )
            self._drafter = drafter(self._form, self.config, self.tokenizer, self.labels, self.unused)
        return self._drafter is not None

    def encode_chunk(self, rows: Sequence[Row]) -> list[Encoded]:
        """What each row becomes, once `begin` has met a good one."""
        drafts = [self._draft(row) for row in rows]
        tokens = iter(self._tokenize([draft for row in drafts if isinstance(row, list) for draft in row]))
        return [
            Encoded([], str(row)) if isinstance(row, BadRow) else self._finish([(d, next(tokens)) for d in row])
            for row in drafts
        ]

    def _draft(self, row: Row) -> list[Draft] | BadRow:
        if row.problem:
            return BadRow(row.problem)
        assert self._drafter is not None
        try:
            return self._drafter(row)
        except BadRow as bad:
            return bad

    def _finish(self, drafts: list[tuple[Draft, _Tokens]]) -> Encoded:
        """A row's examples; bad where none of its drafts leaves a token to learn, or one of a pair does not."""
        if self._form == "preference":
            return self._pair(drafts)
        make = {"text": self._document, "labels": self._labelled}.get(self._form, self._completion)
        examples: list[Example] = []
        problem, truncated = "", False
        for draft, tokens in drafts:
            try:
                made, cut = make(draft, tokens)
                examples += made
                truncated |= cut
            except BadRow as bad:
                problem = problem or str(bad)
        if not examples:
            return Encoded([], problem)
        return Encoded(examples, "", truncated or bool(problem), len(drafts) > 1)

    def _pair(self, drafts: list[tuple[Draft, _Tokens]]) -> Encoded:
        try:
            (chosen, cut), (rejected, too) = (self._completion(*draft) for draft in drafts)
        except BadRow as bad:
            return Encoded([], str(bad))
        if np.array_equal(chosen[0].ids, rejected[0].ids):
            where = f" up to data.seq_len = {self.config.seq_len}" if cut or too else ""
            return Encoded([], f"chosen and rejected have the same tokens{where}; valid would be two that differ")
        return Encoded([*chosen, *rejected], "", cut or too)

    def _tokenize(self, drafts: list[Draft]) -> list[_Tokens]:
        # verbose would warn of texts longer than the model's window, which are cut or split later.
        options: dict[str, Any] = {"verbose": False}
        if self._form == "labels":
            options |= {"truncation": "longest_first", "max_length": self.config.seq_len}
        encodings: list[Any] = [None] * len(drafts)
        # A batch holds either single texts or pairs. A chat template writes the special tokens itself.
        for kind in ((False, False), (False, True), (True, False)):
            places = [i for i, draft in enumerate(drafts) if (draft.pair is not None, draft.chat) == kind]
            if not places:
                continue
            texts = [drafts[i].text for i in places]
            pairs = [drafts[i].pair for i in places] if kind[0] else None
            batch = self.tokenizer(texts, pairs, add_special_tokens=not kind[1], **options)
            for i, encoding in zip(places, batch.encodings, strict=True):
                encodings[i] = encoding
        return [_Tokens.of(encoding) for encoding in encodings]

    def _labelled(self, draft: Draft, tokens: _Tokens) -> tuple[list[Example], bool]:
        """(the example, whether it is cut off)"""
        ids = np.array(tokens.ids, dtype=np.int32)
        if not len(ids):
            raise BadRow("the text has no tokens; valid would be some text")
        types = None
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = np.array(tokens.types, dtype=np.uint8)
        return [Example(ids, np.zeros(len(ids), dtype=bool), draft.label, types)], tokens.cut

    def _document(self, draft: Draft, tokens: _Tokens) -> tuple[list[Example], bool]:
        """Consecutive rows of at most seq_len tokens. A row begins with the last token of the one before, so
        that every token but the document's first is predicted exactly once."""
        ids = self._with_end(tokens)
        if len(ids) < 2:
            raise BadRow("the text leaves no token to predict; valid would be more text")
        step = self.config.seq_len - 1
        parts = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        return [Example(part, np.ones(len(part), dtype=bool)) for part in parts], False

    def _completion(self, draft: Draft, tokens: _Tokens) -> tuple[list[Example], bool]:
        """(the example, whether it is cut off)"""
        ids = np.array(tokens.ids, dtype=np.int32) if draft.chat else self._with_end(tokens)
        supervised = np.ones(len(ids), dtype=bool)
        if draft.spans is not None:
            body = min(len(ids), len(tokens.offsets))
            supervised[:body] &= overlaps(tokens.offsets[:body], draft.spans)
            if not draft.chat:
                supervised[-1] = True  # the end of sequence, appended or written in the completion
        limit = self.config.seq_len
        example = Example(ids[:limit], supervised[:limit], draft.label)
        if not example.supervised[1:].any():
            raise BadRow(_nothing_to_learn(supervised, limit))
        return [example], len(ids) > limit

    def _with_end(self, tokens: _Tokens) -> np.ndarray:
        """[T] int32: the ids, with exactly the end-of-sequence token after the text."""
        ids, added = tokens.ids, tokens.added
        count = len(ids)
        while count and added[count - 1]:  # such as BERT's [SEP]
            count -= 1
        end = self.tokenizer.eos_token_id
        missing = not count or ids[count - 1] != end
        return np.array([*ids[:count], end] if missing else ids[:count], dtype=np.int32)


def overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[T] bool: the tokens whose characters [start, end) overlap any of the spans.

    A byte-level tokenizer that trims offsets gives a token of spaces the empty range at its end; it counts as
    the character before. The special tokens that a tokenizer adds at the start, (0, 0), then overlap nothing.
    """
    if not offsets:
        return np.zeros(0, dtype=bool)
    starts, ends = np.array(offsets, dtype=np.int64).T
    starts = np.minimum(starts, ends - 1)
    marked = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        marked |= (ends > start) & (starts < end)
    return marked


def _nothing_to_learn(supervised: np.ndarray, limit: int) -> str:
    first = int(supervised.argmax())
    if len(supervised) > limit and first >= limit:
        return (
            f"the prompt's {first} tokens fill data.seq_len = {limit}, and none of the completion is left; "
            "valid would be a shorter prompt or a larger data.seq_len"
        )
    return "no token is left to predict; valid would be a longer text"
