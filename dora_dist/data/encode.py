"""Raw rows to token ids with the mask of tokens to learn.

The text of a row is tokenized once as a whole, because tokens made from separately tokenized halves are not
those that a user's prompt meets. A token is supervised where its characters overlap a span to be learnt.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dora_dist.config import DataConfig
from dora_dist.data.formats import BadRow, Draft, Labels, detect_format, drafter
from dora_dist.data.report import Report
from dora_dist.data.rows import Row
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


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError where the tokenizer can make ids that the model's embedding has no row for."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > vocab_size:
        raise UserError(
            f"model.path: the tokenizer has {size} tokens, but the model's vocabulary is {vocab_size}; "
            "valid would be the tokenizer that the model was trained with"
        )


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

    def encode(self, rows: Iterable[Row], report: Report) -> Iterator[Example]:
        """The examples of the rows in order; lazily, a chunk at a time."""
        form, draft_row = "", None
        chunk: list[tuple[Row, Draft | BadRow]] = []  # bad rows too, so that the first one is told first
        characters = 0
        for row in rows:
            report.rows_read += 1
            if draft_row is None:
                if row.problem:
                    report.bad_row(row.place, row.problem)
                    continue
                form = detect_format(row, self.config, classify=self.classify)
                self._check_end(form)
                draft_row = drafter(form, self.config, self.tokenizer, self.labels)
            draft = _draft(row, draft_row)
            chunk.append((row, draft))
            characters += len(draft.text) if isinstance(draft, Draft) else 0
            if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                yield from self._encode_chunk(form, chunk, report)
                chunk, characters = [], 0
        yield from self._encode_chunk(form, chunk, report)

    def _check_end(self, form: str) -> None:
        if form not in ("chat", "labels") and self.tokenizer.eos_token_id is None:
            raise UserError(
                f"data.format: {form} ends each row with the tokenizer's end-of-sequence token, and this "
                "tokenizer has none; valid would be a tokenizer with an eos_token"
            )

    def _encode_chunk(
        self, form: str, chunk: list[tuple[Row, Draft | BadRow]], report: Report
    ) -> Iterator[Example]:
        encodings = iter(self._tokenize(form, [draft for _, draft in chunk if isinstance(draft, Draft)]))
        for row, draft in chunk:
            made = draft if isinstance(draft, BadRow) else self._finish(form, draft, next(encodings), report)
            if isinstance(made, BadRow):
                report.bad_row(row.place, str(made))
            else:
                yield from made

    def _finish(self, form: str, draft: Draft, tokens: Any, report: Report) -> list[Example] | BadRow:
        try:
            if form == "labels":
                return [self._labelled(draft, tokens, report)]
            if form == "text":
                return self._document(tokens)
            return [self._completion(form, draft, tokens, report)]
        except BadRow as bad:
            return bad

    def _tokenize(self, form: str, drafts: list[Draft]) -> list[Any]:
        """`tokenizers.Encoding`s of the drafts in order."""
        # verbose would warn of texts longer than the model's window, which are cut or split later.
        options: dict[str, Any] = {"verbose": False}
        if form == "labels":
            options |= {"truncation": "longest_first", "max_length": self.config.seq_len}
        encodings: list[Any] = [None] * len(drafts)
        for paired in (False, True):  # a batch holds either single texts or pairs
            places = [i for i, draft in enumerate(drafts) if (draft.pair is not None) == paired]
            if not places:
                continue
            texts = [drafts[i].text for i in places]
            pairs = [drafts[i].pair for i in places] if paired else None
            # A chat template writes the special tokens itself.
            batch = self.tokenizer(texts, pairs, add_special_tokens=form != "chat", **options)
            for i, encoding in zip(places, batch.encodings, strict=True):
                encodings[i] = encoding
        return encodings

    def _labelled(self, draft: Draft, tokens: Any, report: Report) -> Example:
        ids = np.array(tokens.ids, dtype=np.int32)
        if not len(ids):
            raise BadRow("the text has no tokens; valid would be some text")
        report.rows_truncated += bool(tokens.overflowing)
        types = None
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = np.array(tokens.type_ids, dtype=np.uint8)
        return Example(ids, np.zeros(len(ids), dtype=bool), draft.label, types)

    def _document(self, tokens: Any) -> list[Example]:
        """Consecutive rows of at most seq_len tokens. A row begins with the last token of the one before, so
        that every token but the document's first is predicted exactly once."""
        ids = self._with_end(tokens)
        if len(ids) < 2:
            raise BadRow("the text leaves no token to predict; valid would be more text")
        step = self.config.seq_len - 1
        parts = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        return [Example(part, np.ones(len(part), dtype=bool)) for part in parts]

    def _completion(self, form: str, draft: Draft, tokens: Any, report: Report) -> Example:
        ids = np.array(tokens.ids, dtype=np.int32) if form == "chat" else self._with_end(tokens)
        supervised = np.ones(len(ids), dtype=bool)
        if draft.spans is not None:
            body = min(len(ids), len(tokens.offsets))
            supervised[:body] &= overlaps(tokens.offsets[:body], draft.spans)
            if form != "chat":
                supervised[-1] = True  # the end of sequence, appended or written in the completion
        limit = self.config.seq_len
        example = Example(ids[:limit], supervised[:limit])
        if not example.targets:
            raise BadRow(_nothing_to_learn(supervised, limit))
        report.rows_truncated += len(ids) > limit
        return example

    def _with_end(self, tokens: Any) -> np.ndarray:
        """[T] int32: the ids, with exactly the end-of-sequence token after the text."""
        ids, added = tokens.ids, tokens.special_tokens_mask
        count = len(ids)
        while count and added[count - 1]:  # such as BERT's [SEP]
            count -= 1
        end = self.tokenizer.eos_token_id
        missing = not count or ids[count - 1] != end
        return np.array([*ids[:count], end] if missing else ids[:count], dtype=np.int32)


def _draft(row: Row, draft_row: Callable[[Row], Draft]) -> Draft | BadRow:
    if row.problem:
        return BadRow(row.problem)
    try:
        return draft_row(row)
    except BadRow as bad:
        return bad


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
