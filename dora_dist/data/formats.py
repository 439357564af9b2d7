"""The formats of a row: what each one's fields must be, its whole text, and which characters are to be
learnt.

One function per format makes a `Draft` of a row, or raises `BadRow` with what is wrong and what would be
valid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from dora_dist.config import DataConfig
from dora_dist.data.rows import Row, describe, is_unicode, one_line
from dora_dist.errors import UserError

FORMATS = {  # in the order in which `auto` tries them, with the keys each one needs
    "chat": '{"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}',
    "prompt_completion": '{"prompt", "completion"}',
    "alpaca": '{"instruction", "input", "output"}',
    "text": '{"text"}',
    "labels": '{"text", "text_pair"?, "label"}',
}
# The prompts of https://github.com/tatsu-lab/stanford_alpaca
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
Render = Callable[[list[dict], bool], str]  # (messages, add_generation_prompt) -> text


class BadRow(ValueError):
    """A row that does not fit its format; the message lacks the place."""


class Draft(NamedTuple):
    text: str
    spans: list[tuple[int, int]] | None  # characters to learn, [start, end); None: all
    pair: str | None = None  # labels: the second text
    label: int = -1


@dataclass(frozen=True)
class Labels:
    """How a row's label becomes a number in range(num_labels)."""

    num_labels: int
    label2id: Mapping[str, int]

    def __call__(self, value: Any) -> int:
        if isinstance(value, str):
            if value in self.label2id:
                return self.label2id[value]
            if value.isascii() and value.isdigit():  # CSV has only strings
                value = int(value)
        if type(value) is int and 0 <= value < self.num_labels:
            return value
        found = repr(value) if isinstance(value, str) else describe(value)
        names = ", ".join(map(repr, list(self.label2id)[:10]))
        valid = f"0 to {self.num_labels - 1}" + (f", or one of {names}" if names else "")
        raise BadRow(f"the field 'label' is {found}; valid would be {valid}")


def detect_format(row: Row, config: DataConfig, *, classify: bool) -> str:
    """The format of all rows: the configured one, or for `auto` the one that the first row's keys fit."""
    if classify:
        if config.format not in ("auto", "labels"):
            raise UserError(
                f"data.format: {config.format} does not fit model.task: sequence_classification; "
                "valid would be labels or auto"
            )
        return "labels"
    if config.format == "labels":
        raise UserError("data.format: labels needs model.task: sequence_classification, not causal_lm")
    if config.format != "auto":
        return config.format
    keys = row.fields.keys()
    if "messages" in keys or "conversations" in keys:
        return "chat"
    for name, needed in (
        ("prompt_completion", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {"text"}),
    ):
        if needed <= keys:
            return name
    found = ", ".join(map(repr, keys)) or "none"
    shapes = ", ".join(f"{name} {shape}" for name, shape in FORMATS.items() if name != "labels")
    raise UserError(f"{row.place}: the keys found ({found}) fit no format; valid would be {shapes}")


def drafter(form: str, config: DataConfig, tokenizer: Any, labels: Labels | None) -> Callable[[Row], Draft]:
    """The function that drafts the rows of a format.

    Raises:
        UserError: the format is chat and the tokenizer has no chat template.
    """
    if form == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                "data.format: chat needs a tokenizer with a chat template, and this one has none; valid "
                "would be an instruction-tuned model's tokenizer, or the format prompt_completion"
            )
        return partial(_draft_chat, render=partial(_render, tokenizer), everything=config.loss_on == "all")
    if form == "labels":
        assert labels is not None
        return partial(_draft_labels, to_label=labels)
    draft = {"prompt_completion": _draft_prompt_completion, "alpaca": _draft_alpaca, "text": _draft_text}[form]
    if config.loss_on == "all":
        return lambda row: draft(row)._replace(spans=None)
    return draft


def _draft_prompt_completion(row: Row) -> Draft:
    return _completion(_text(row, "prompt"), _text(row, "completion"))


def _draft_alpaca(row: Row) -> Draft:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    given = _text(row, "input") if row.fields.get("input") is not None else ""
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    return _completion(template.format(instruction=instruction, input=given), output)


def _completion(prompt: str, completion: str) -> Draft:
    return Draft(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


def _draft_text(row: Row) -> Draft:
    text = _text(row, "text")
    if not text:
        raise BadRow("the field 'text' is empty; valid would be some text")
    return Draft(text, None)


def _draft_labels(row: Row, to_label: Labels) -> Draft:
    if "label" not in row.fields:
        raise _missing(row, "label", "a label's number or name")
    pair = _text(row, "text_pair") if row.fields.get("text_pair") is not None else None
    return Draft(_text(row, "text"), [], pair, to_label(row.fields["label"]))


def _draft_chat(row: Row, render: Render, everything: bool) -> Draft:
    messages = _messages(row)
    try:
        full = render(messages, False)
    except ImportError:
        raise  # transformers says which package templates need
    except Exception as error:  # a template raises what it likes
        raise BadRow(f"the chat template refuses the messages: {one_line(error)}") from None
    if everything:
        return Draft(full, None)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRow("there is no assistant turn to learn; valid would be a message with the role 'assistant'")
    return Draft(full, [_turn_span(row, messages, turn, full, render) for turn in turns])


def _turn_span(row: Row, messages: list[dict], turn: int, full: str, render: Render) -> tuple[int, int]:
    """The characters that the model would write for a turn: what it adds to the prompt for generating it."""
    try:
        before, through = render(messages[:turn], True), render(messages[: turn + 1], False)
    except Exception:  # such as a template that insists on a user turn first
        before, through = "", "\0"
    if not (through.startswith(before) and full.startswith(through)):
        raise UserError(
            f"{row.place}: the tokenizer's chat template cannot be split into turns (the rendering up to "
            f"message {turn + 1} does not begin the whole's), so the assistant's tokens are unknown; "
            "valid would be data.loss_on: all"
        )
    return len(before), len(through)


def _render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _messages(row: Row) -> list[dict]:
    """The messages in the template's terms, {"role", "content"}."""
    sharegpt = "messages" not in row.fields
    key = "conversations" if sharegpt else "messages"
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    valid = f'a list of {{"{role_key}": "...", "{content_key}": "..."}}'
    if key not in row.fields:
        raise _missing(row, "messages", valid)
    turns = row.fields[key]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else describe(turns)
        raise BadRow(f"the field {key!r} is {found}; valid would be {valid}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"item {number} of {key!r} is {describe(turn)}; valid would be {valid}")
        item = Row(row.place, turn)
        where = f" in item {number} of {key!r}"
        role, content = _text(item, role_key, where), _text(item, content_key, where)
        if sharegpt and role not in SHAREGPT_ROLES:
            raise BadRow(f"{role_key!r} is {role!r}{where}; valid would be {', '.join(SHAREGPT_ROLES)}")
        # A message's further keys (tool calls, a name) are the template's business.
        extra = {} if sharegpt else turn
        messages.append({**extra, "role": SHAREGPT_ROLES[role] if sharegpt else role, "content": content})
    return messages


def _text(row: Row, key: str, where: str = "") -> str:
    if key not in row.fields:
        raise _missing(row, key, "a string", where)
    value = row.fields[key]
    if not isinstance(value, str):
        raise BadRow(f"the field {key!r}{where} is {describe(value)}; valid would be a string")
    if not is_unicode(value):
        raise BadRow(f"the field {key!r}{where} holds half a surrogate pair; valid would be Unicode text")
    return value


def _missing(row: Row, key: str, valid: str, where: str = "") -> BadRow:
    found = ", ".join(map(repr, list(row.fields)[:10])) or "none"
    return BadRow(f"the field {key!r} is missing{where} (found: {found}); valid would be {valid}")
