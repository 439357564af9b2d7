"""Raw rows to token ids with the mask of tokens to learn.

The text of a row is tokenized once as a whole, because tokens made from separately tokenized halves are not
those that a user's prompt meets. A token is supervised where its characters overlap a span to be learnt.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dora_dist.config import DataConfig
from dora_dist.data.fields import BadRow
from dora_dist.data.formats import Drafter, Labels, detect_format
from dora_dist.data.report import Report
from dora_dist.data.rows import Row, characters
from dora_dist.data.templates import Draft
from dora_dist.errors import UserError

Task = Literal["causal_lm", "sequence_classification"]
CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 4_000_000  # tokenized at once: a fast tokenizer runs in parallel


class Example(NamedTuple):
    ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool; the first token is never predicted, whatever its mark
    label: int = -1  # sequence_classification
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


def begins_with_bos(tokenizer: Any, text: str) -> bool:
    """Whether a text has the begin-of-sequence token already, so that the tokenizer must add none."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


class Encoder:
    """Rows to examples, by one tokenizer and one configuration.

    Raises:
        UserError: the tokenizer is slow, has no end-of-sequence token, or more tokens than the model.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        task: Task,
        label2id: dict[str, int] | None,
        num_labels: int | None,
        vocab_size: int | None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.classify = task == "sequence_classification"
        self.labels: Labels | None = None
        if self.classify:
            if num_labels is None and not label2id:
                raise UserError("model.num_labels: sequence_classification needs the number of labels")
            self.labels = Labels(num_labels or len(label2id or {}), label2id or {})
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"model.path: {type(tokenizer).__name__} is a slow tokenizer, which does not say where its "
                "tokens stand in the text; valid would be a model with a tokenizer.json"
            )
        if vocab_size is not None:
            check_vocabulary(tokenizer, vocab_size)
        self._form = ""
        self._drafter: Drafter | None = None

    def encode(self, rows: Iterable[Row], report: Report) -> Iterator[Example]:
        """The examples of the rows in order; lazily, a chunk at a time."""
        chunk: list[Row] = []
        size = 0
        for row in rows:
            if not self.begin(row):
                report.add(row.place, row.problem)
                continue
            chunk.append(row)
            size += characters(row.fields)
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
                yield from self._encode_and_tell(chunk, report)
                chunk, size = [], 0
        yield from self._encode_and_tell(chunk, report)

    def _encode_and_tell(self, chunk: list[Row], report: Report) -> Iterator[Example]:
        encoded = self.encode_chunk(chunk)
        report.unused |= self.unused
        for row, made in zip(chunk, encoded, strict=True):
            report.add(row.place, made.problem, made.truncated, made.split_into_turns)
            yield from made.examples

    def begin(self, row: Row) -> bool:
        """Let the first row that can be read decide the format. False: none has come yet."""
        if self._drafter is None and not row.problem:
            self._form = detect_format(row, self.config, classify=self.classify)
            self._check_end(self._form)
            self._drafter = Drafter(self._form, self.config, self.tokenizer, self.labels)
        return self._drafter is not None

    @property
    def unused(self) -> set[str]:
        """The names of the fields met so far that nothing reads."""
        return set() if self._drafter is None else self._drafter.unused

    def encode_chunk(self, rows: Sequence[Row]) -> list[Encoded]:
        """What each row becomes, once `begin` has met a good one."""
        drafts = [self._draft(row) for row in rows]
        tokens = iter(self._tokenize([draft for row in drafts if isinstance(row, list) for draft in row]))
        return [
            Encoded([], str(row)) if isinstance(row, BadRow) else self._finish([(d, next(tokens)) for d in row])
            for row in drafts
        ]

    def _check_end(self, form: str) -> None:
        if form not in ("chat", "labels") and self.tokenizer.eos_token_id is None:
            raise UserError(
                f"data.format: {form} ends each row with the tokenizer's end-of-sequence token, and this "
                "tokenizer has none; valid would be a tokenizer with an eos_token"
            )

    def _draft(self, row: Row) -> list[Draft] | BadRow:
        if row.problem:
            return BadRow(row.problem)
        assert self._drafter is not None
        try:
            return self._drafter(row)
        except BadRow as bad:
            return bad

    def _finish(self, drafts: list[tuple[Draft, _Tokens]]) -> Encoded:
        """A row's examples; bad where none of its drafts leaves a token to learn."""
        examples: list[Example] = []
        problem, truncated = "", False
        for draft, tokens in drafts:
            try:
                if self._form == "text":
                    examples += self._document(tokens)
                    continue
                if self._form == "labels":
                    example, cut = self._labelled(draft, tokens)
                else:
                    example, cut = self._completion(draft, tokens)
                examples.append(example)
                truncated |= cut
            except BadRow as bad:
                problem = problem or str(bad)
        if not examples:
            return Encoded([], problem)
        return Encoded(examples, "", truncated or bool(problem), len(drafts) > 1)

    def _tokenize(self, drafts: list[Draft]) -> list[_Tokens]:
        """The tokens of the drafts in order."""
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

    def _labelled(self, draft: Draft, tokens: _Tokens) -> tuple[Example, bool]:
        """(the example, whether it is cut off)"""
        ids = np.array(tokens.ids, dtype=np.int32)
        if not len(ids):
            raise BadRow("the text has no tokens; valid would be some text")
        types = None
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = np.array(tokens.types, dtype=np.uint8)
        return Example(ids, np.zeros(len(ids), dtype=bool), draft.label, types), tokens.cut

    def _document(self, tokens: _Tokens) -> list[Example]:
        """Consecutive rows of at most seq_len tokens. A row begins with the last token of the one before, so
        that every token but the document's first is predicted exactly once."""
        ids = self._with_end(tokens)
        if len(ids) < 2:
            raise BadRow("the text leaves no token to predict; valid would be more text")
        step = self.config.seq_len - 1
        parts = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        return [Example(part, np.ones(len(part), dtype=bool)) for part in parts]

    def _completion(self, draft: Draft, tokens: _Tokens) -> tuple[Example, bool]:
        """(the example, whether it is cut off)"""
        ids = np.array(tokens.ids, dtype=np.int32) if draft.chat else self._with_end(tokens)
        supervised = np.ones(len(ids), dtype=bool)
        if draft.spans is not None:
            body = min(len(ids), len(tokens.offsets))
            supervised[:body] &= overlaps(tokens.offsets[:body], draft.spans)
            if not draft.chat:
                supervised[-1] = True  # the end of sequence, appended or written in the completion
        limit = self.config.seq_len
        example = Example(ids[:limit], supervised[:limit])
        if not example.targets:
            raise BadRow(_nothing_to_learn(supervised, limit))
        return example, len(ids) > limit

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
