"""A row's fields: strings, lists, JSON in a string; which ones a format uses, and which none can."""

from collections.abc import Iterator, Mapping
from typing import Any

from dora_dist.data.rows import Row, describe, is_unicode
from dora_dist.io.headers import parse_json

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
PREFERENCE = ("chosen", "rejected", "kto_tag", "preferred_output", "non_preferred_output")
_CHAT = {"system", "tools", "functions", "chat_template_kwargs"}
USED = {  # by format: the fields that it reads
    "chat": {"messages", "conversations", *_CHAT},
    "prompt_completion": {"prompt", "completion", *_CHAT},
    "alpaca": {"instruction", "input", "output", "system", "history"},
    "text": {"text"},
    "labels": {"text", "text_pair", "label"},
    "preference": {"prompt", "chosen", "rejected", *_CHAT},
    "unpaired_preference": {"prompt", "completion", "label", *_CHAT},
}


class BadRow(ValueError):
    """A row that does not fit its format; the message lacks the place."""


def is_given(fields: Mapping[str, Any], key: str) -> bool:
    """Whether a field holds anything: columns of a table are there in every row, empty where a row has none."""
    return fields.get(key) not in (None, "", [], {})


def refuse_media(fields: Mapping[str, Any], where: str = "") -> None:
    for key in _MEDIA:
        if is_given(fields, key):
            raise BadRow(f"the field {key!r}{where} cannot be used: rows are text alone; valid would be none")


def check_fields(row: Row, form: str) -> Iterator[str]:
    """The names of the given fields that the format does not read.

    Raises:
        BadRow: a field has a meaning that no format here can honour.
    """
    fields = row.fields
    refuse_media(fields)
    if form != "labels":
        for key in PREFERENCE:
            if is_given(fields, key) and key not in USED[form]:
                valid = "none" if "preference" in form else "model.task: preference"
                raise BadRow(
                    f"the field {key!r} belongs to preference training, in which data.format: {form} has no place "
                    f"for it; valid would be {valid}"
                )
    if form in ("chat", "prompt_completion") and isinstance(fields.get("label"), bool):
        raise BadRow(
            "the field 'label' is a boolean, as in preference training; valid would be none, or train.objective: "
            "kto"
        )
    if form in ("alpaca", "prompt_completion", "preference", "unpaired_preference"):
        # Plain text has no place for tools, nor a prompt that is written as a whole for a system text.
        conversation = any(isinstance(fields.get(key), list) for key in ("prompt", "chosen"))
        for key in sorted(_CHAT | {"history"}):
            honoured = key in USED[form] and (form == "alpaca" or conversation)
            if is_given(fields, key) and not honoured:
                raise BadRow(
                    f"the field {key!r} has no place in data.format: {form}; valid would be the format chat"
                )
    return (key for key in fields.keys() - USED[form] if is_given(fields, key))


def text_field(row: Row, key: str, where: str = "") -> str:
    if key not in row.fields:
        raise missing(row, key, "a string", where)
    value = row.fields[key]
    if not isinstance(value, str):
        raise BadRow(f"the field {key!r}{where} is {describe(value)}; valid would be a string")
    return check_unicode(value, key, where)


def check_unicode(text: str, key: str, where: str) -> str:
    if not is_unicode(text):
        raise BadRow(f"the field {key!r}{where} holds half a surrogate pair; valid would be Unicode text")
    return text


def optional_text(row: Row, key: str) -> str:
    """A string field, or "" where it is missing or null."""
    return text_field(row, key) if row.fields.get(key) is not None else ""


def json_field(fields: Mapping[str, Any], key: str, where: str = "") -> Any:
    """A field that is a list or an object, or a string of JSON that holds one: all that a CSV file can say, and
    how tables keep objects whose keys differ between rows."""
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_json(value)
    except ValueError as error:
        raise BadRow(f"the field {key!r}{where} is a string that is no JSON ({error})") from None


def missing(row: Row, key: str, valid: str, where: str = "") -> BadRow:
    found = ", ".join(map(repr, list(row.fields)[:10])) or "none"
    return BadRow(f"the field {key!r} is missing{where} (found: {found}); valid would be {valid}")
