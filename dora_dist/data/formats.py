"""The formats of a row: what each one's fields must be, its whole text, and which characters are to be
learnt.

One function per format makes `Draft`s of a row, or raises `BadRow` with what is wrong and what would be valid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from dora_dist.config import DataConfig
from dora_dist.data.chats import read_chat, read_prompt_chat
from dora_dist.data.fields import PREFERENCE, BadRow, check_fields, json_field, missing, optional_text, text_field
from dora_dist.data.preferences import draft_labelled, draft_pair
from dora_dist.data.rows import Row, describe
from dora_dist.data.templates import ChatTemplate, Draft
from dora_dist.errors import UserError

FORMATS = {  # in the order in which `auto` tries them, with the keys each one needs
    "chat": '{"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}',
    "prompt_completion": '{"prompt", "completion"}',
    "alpaca": '{"instruction", "input", "output"}',
    "text": '{"text"}',
    "labels": '{"text", "text_pair"?, "label"}',
    "preference": '{"prompt", "chosen", "rejected"}',
    "unpaired_preference": '{"prompt", "completion", "label"}',
}
TASKS = {  # what a format that no language model learns token by token is for
    "labels": "model.task: sequence_classification",
    "preference": "model.task: preference or reward_model",
    "unpaired_preference": "train.objective: kto",
}
# The prompts of https://github.com/tatsu-lab/stanford_alpaca
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


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


def detect_format(row: Row, config: DataConfig, needed: str | None) -> str:
    """The format of all rows: the one that the task needs, if any; else the configured one, or for `auto` the one
    that the first row's keys fit."""
    if needed is not None:
        if config.format not in ("auto", needed):
            raise UserError(
                f"data.format: {config.format} does not fit {TASKS[needed]}; valid would be {needed} or auto"
            )
        return needed
    if config.format in TASKS:
        raise UserError(f"data.format: {config.format} needs {TASKS[config.format]}, not model.task: causal_lm")
    if config.format != "auto":
        return config.format
    keys = row.fields.keys()
    if "messages" in keys or "conversations" in keys:
        return "chat"
    for name, wanted_keys in (
        ("prompt_completion", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {"text"}),
    ):
        if wanted_keys <= keys:
            return name
    if wanted := [key for key in keys if key in PREFERENCE]:
        raise UserError(
            f"{row.place}: the field {wanted[0]!r} belongs to preference training, which this is not; valid would "
            'be model.task: preference, or rows such as {"prompt", "completion"}'
        )
    found = ", ".join(map(repr, keys)) or "none"
    shapes = ", ".join(f"{name} {shape}" for name, shape in FORMATS.items() if name not in TASKS)
    raise UserError(f"{row.place}: the keys found ({found}) fit no format; valid would be {shapes}")


def drafter(
    form: str, config: DataConfig, tokenizer: Any, labels: Labels | None, unused: set[str]
) -> Callable[[Row], list[Draft]]:
    """What makes the drafts of a format's rows: one, but of a conversation whose turns cannot be shown in one
    text. Adds the names of the fields that nothing reads to `unused`.

    Raises:
        UserError: the format is chat and the tokenizer has no chat template.
    """
    everything = config.loss_on == "all"
    template = cache(lambda: ChatTemplate(tokenizer, everything, unused))
    if form == "chat":
        template()

    def prompt_completion(row: Row) -> list[Draft]:
        if not isinstance(row.fields.get("prompt"), list) and not isinstance(row.fields.get("completion"), list):
            prompt, completion = text_field(row, "prompt"), text_field(row, "completion")
            return [Draft(prompt + completion, [(len(prompt), len(prompt) + len(completion))])]
        chat = read_prompt_chat(row)
        return template()(chat)

    make: dict[str, Callable[[Row], list[Draft]]] = {
        "chat": lambda row: template()(read_chat(row)),
        "prompt_completion": prompt_completion,
        "alpaca": partial(_draft_alpaca, end=tokenizer.eos_token),
        "text": _draft_text,
        "labels": partial(_draft_labels, to_label=labels),
        "preference": partial(draft_pair, template=template),
        "unpaired_preference": partial(draft_labelled, template=template),
    }

    def draft(row: Row) -> list[Draft]:
        unused.update(check_fields(row, form))
        drafts = make[form](row)
        if everything and form in ("prompt_completion", "alpaca") and not drafts[0].chat:
            return [one._replace(spans=None) for one in drafts]
        return drafts

    return draft


def _draft_alpaca(row: Row, end: str) -> list[Draft]:
    """The answers of the row's history are learned like its own, as LLaMA-Factory does."""
    instruction, output = text_field(row, "instruction"), text_field(row, "output")
    given = optional_text(row, "input")
    usual = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    text, spans = (optional_text(row, "system") or usual) + "\n\n", []
    for asked, answer in _history(row):
        text += f"### Instruction:\n{asked}\n\n### Response:\n"
        spans.append((len(text), len(text) + len(answer + end)))
        text += f"{answer}{end}\n\n"
    text += f"### Instruction:\n{instruction}\n\n"
    text += f"### Input:\n{given}\n\n### Response:\n" if given.strip() else "### Response:\n"
    return [Draft(text + output, [*spans, (len(text), len(text) + len(output))])]


def _history(row: Row) -> list[tuple[str, str]]:
    """An alpaca row's earlier (instruction, answer) pairs."""
    pairs = json_field(row.fields, "history") or []
    if not isinstance(pairs, list):
        raise BadRow(f"the field 'history' is {describe(pairs)}; valid would be a list of [instruction, answer]")
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"item {number} of 'history' is {describe(pair)}; valid would be [instruction, answer]")
    return [(asked, answer) for asked, answer in pairs]


def _draft_text(row: Row) -> list[Draft]:
    text = text_field(row, "text")
    if not text:
        raise BadRow("the field 'text' is empty; valid would be some text")
    return [Draft(text, None)]


def _draft_labels(row: Row, to_label: Labels | None) -> list[Draft]:
    assert to_label is not None
    if "label" not in row.fields:
        raise missing(row, "label", "a label's number or name")
    pair = text_field(row, "text_pair") if row.fields.get("text_pair") is not None else None
    return [Draft(text_field(row, "text"), [], pair, to_label(row.fields["label"]))]
