"""Rows of preference training to drafts: two completions of one prompt, or a completion and whether it is wanted.

A row without a prompt has the one that its completions share: the turns, or of texts the characters, before the
first difference.
"""

from collections.abc import Callable

from dora_dist.data.chats import Chat, read_pair, read_prompt_chat
from dora_dist.data.fields import BadRow, is_given, missing, text_field
from dora_dist.data.rows import Row, describe
from dora_dist.data.templates import ChatTemplate, Draft, common_length

PAIR = ("chosen", "rejected")
_PARTS = ("content", "tool_calls", "reasoning")  # of a message
_WANTED = {True: 1, False: 0, "true": 1, "false": 0, "1": 1, "0": 0}  # the strings are a CSV file's
Template = Callable[[], ChatTemplate]


def draft_pair(row: Row, template: Template) -> list[Draft]:
    """[chosen, rejected]"""
    for key in PAIR:
        if key not in row.fields:
            labelled = "; rows with a 'label' need train.objective: kto" if "label" in row.fields else ""
            raise missing(row, key, f"a string, or a list of messages{labelled}")
    kinds = [isinstance(row.fields[key], list) for key in PAIR]
    if any(kinds):
        if not all(kinds):
            told = " and ".join(f"the field {key!r} is {describe(row.fields[key])}" for key in PAIR)
            raise BadRow(f"{told}; valid would be two strings, or two lists of messages")
        return [_one(template, chat, key) for chat, key in zip(read_pair(row, *PAIR), PAIR, strict=True)]
    texts = [_completion(row, key) for key in PAIR]
    if texts[0] == texts[1]:
        raise BadRow("the fields 'chosen' and 'rejected' are equal; valid would be two texts that differ")
    if row.fields.get("prompt") is not None:
        prompt = text_field(row, "prompt")
        return [_after(prompt, text) for text in texts]
    shared = len(texts[0][: common_length(*texts)].rstrip(" "))  # a blank is the next word's
    return [_after(text[:shared], text[shared:]) for text in texts]


def draft_labelled(row: Row, template: Template) -> list[Draft]:
    """The row's one completion, labelled 1 where it is wanted, else 0."""
    if "label" not in row.fields:
        paired = "; rows of 'chosen' and 'rejected' need another train.objective" if "chosen" in row.fields else ""
        raise missing(row, "label", f"true or false{paired}")
    label = row.fields["label"]
    known = isinstance(label, str | bool | int)
    wanted = _WANTED.get(label.lower() if isinstance(label, str) else label) if known else None
    if wanted is None:
        found = repr(label) if isinstance(label, str) else describe(label)
        raise BadRow(f"the field 'label' is {found}; valid would be true or false")
    if isinstance(row.fields.get("prompt"), list) or isinstance(row.fields.get("completion"), list):
        draft = _one(template, read_prompt_chat(row), "completion")
    else:
        draft = _after(text_field(row, "prompt"), _completion(row, "completion"))
    return [draft._replace(label=wanted)]


def _completion(row: Row, key: str) -> str:
    text = text_field(row, key)
    if not text:
        raise BadRow(f"the field {key!r} is empty; valid would be some text")
    return text


def _after(prompt: str, completion: str) -> Draft:
    return Draft(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


def _one(template: Template, chat: Chat, key: str) -> Draft:
    if chat.learned and not any(is_given(chat.messages[n], part) for n in chat.learned for part in _PARTS):
        raise BadRow(f"the messages of the field {key!r} are empty; valid would be some text")
    drafts = template()(chat)
    if len(drafts) > 1:
        raise BadRow(
            f"the chat template shows the assistant's turns of the field {key!r} in {len(drafts)} texts; valid "
            "would be one turn after the prompt"
        )
    return drafts[0]
