"""A row's conversation in the terms of chat templates: messages, tools, and which turns to learn.

Understood are OpenAI's and Mistral's messages (`tool_calls`, `function_call`, `weight`), ShareGPT's conversations
with LLaMA-Factory's roles, axolotl's flags of turns (`train`), and TRL's prompts and completions of messages.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_dist.data.fields import BadRow, check_unicode, is_given, json_field, missing, refuse_media, text_field
from dora_dist.data.rows import Row, describe

Message = dict[str, Any]
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
_OTHER_NAMES = {**SHAREGPT_ROLES, "function": "tool"}
_FLAGS = ("weight", "train", "training", "train_on_turn", "loss")  # of a turn: whether it is learned
_REFUSED = {"refusal": "a refusal", "train_detail": "a part of a turn", "training_detail": "a part of a turn"}
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass
class Chat:
    messages: list[Message]  # arguments of tool calls as they were given; a message without content has none
    learned: list[int]  # numbers of the assistant's messages to learn
    tools: list[dict] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further variables of the template

    @property
    def variants(self) -> list[list[Message]]:
        """The same messages in the shapes that templates expect, the usual one first: some add strings up where
        others write JSON, and some want a content beside tool calls."""
        shapes = [[_with_arguments(m, shape) for m in self.messages] for shape in (_as_object, _as_text)]
        if all("content" in message for message in self.messages):
            return shapes
        return [*shapes, *([{"content": "", **message} for message in shape] for shape in shapes)]


def read_chat(row: Row) -> Chat:
    """The conversation of a row of the format chat. BadRow: something in it cannot be honoured."""
    fields = row.fields
    key = "messages" if fields.get("messages") is not None or "conversations" not in fields else "conversations"
    if key not in fields:
        raise missing(row, "messages", 'a list of {"role": "...", "content": "..."}')
    return _chat(row, [key], set())


def read_prompt_chat(row: Row) -> Chat:
    """A row of the format prompt_completion whose fields are lists of messages; the completion's are learned."""
    prompt, completion = row.fields.get("prompt"), row.fields.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow(
            f"the field 'prompt' is {describe(prompt)}, the field 'completion' is {describe(completion)}; "
            "valid would be two strings, or two lists of messages"
        )
    return _chat(row, ["prompt", "completion"], {"prompt"})


def read_pair(row: Row, *keys: str) -> list[Chat]:
    """The conversations of a preference row, which has its completions in `keys`. They alone are learned: what
    comes after the messages of the field prompt or, without these, after those that the conversations share."""
    prompt = row.fields.get("prompt")
    if isinstance(prompt, list):
        chats, shared = [_chat(row, ["prompt", key], {"prompt"}) for key in keys], 0
    else:
        chats = [_chat(row, [key], set()) for key in keys]
        steps = zip(*(chat.messages for chat in chats), strict=False)
        shortest = min(len(chat.messages) for chat in chats)
        shared = next((n for n, (one, other) in enumerate(steps) if one != other), shortest)
    if chats[0].messages == chats[1].messages:
        raise BadRow(f"the fields {keys[0]!r} and {keys[1]!r} are equal; valid would be two that differ")
    if isinstance(prompt, str) and not any(m.get("content") == prompt for m in chats[0].messages[:shared]):
        raise BadRow(
            f"the field 'prompt' is a string, and none of the messages which {keys[0]!r} and {keys[1]!r} share; "
            "valid would be a list of messages"
        )
    for chat in chats:
        chat.learned = [number for number in chat.learned if number >= shared]
    return chats


def _chat(row: Row, keys: list[str], unlearned: set[str]) -> Chat:
    tools, options = _tools(row.fields), json_field(row.fields, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRow(f"the field 'chat_template_kwargs' is {describe(options)}; valid would be an object")
    messages: list[Message] = []
    learned: list[int] = []
    for key in keys:
        for message, flag in _turns(row, key):
            if message["role"] == "assistant" and flag and key not in unlearned:
                learned.append(len(messages))
            messages.append(message)
    return Chat(_with_system(row, messages, learned), learned, tools, options)


def _with_system(row: Row, messages: list[Message], learned: list[int]) -> list[Message]:
    """The messages behind the row's system text; moves the numbers of the learned ones."""
    if not is_given(row.fields, "system"):
        return messages
    system = text_field(row, "system")
    if messages[0]["role"] in ("system", "developer"):
        if messages[0].get("content") != system:
            raise BadRow(
                "the field 'system' contradicts the first message, a system text; valid would be one of them"
            )
        return messages
    learned[:] = [number + 1 for number in learned]
    return [{"role": "system", "content": system}, *messages]


def _turns(row: Row, key: str) -> list[tuple[Message, bool]]:
    """(message, whether it may be learned) of each turn."""
    sharegpt = key == "conversations"
    turns = json_field(row.fields, key)
    first: Mapping = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if first.keys() & {"from", "value", "role", "content"}:  # either list is found with either's keys
        sharegpt = bool(first.keys() & {"from", "value"})
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    valid = f'a list of {{"{role_key}": "...", "{content_key}": "..."}}'
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if row.fields[key] == [] else describe(row.fields[key])
        raise BadRow(f"the field {key!r} is {found}; valid would be {valid}")
    read = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"item {number} of {key!r} is {describe(turn)}; valid would be {valid}")
        read.append(_turn(Row(row.place, turn), f" in item {number} of {key!r}", role_key, content_key))
    return read


def _turn(turn: Row, where: str, role_key: str, content_key: str) -> tuple[Message, bool]:
    name = text_field(turn, role_key, where)
    if role_key == "from" and name not in SHAREGPT_ROLES:
        raise BadRow(f"{role_key!r} is {name!r}{where}; valid would be {', '.join(SHAREGPT_ROLES)}")
    role = _OTHER_NAMES.get(name, name)
    refuse_media(turn.fields, where)
    for key, what in _REFUSED.items():
        if is_given(turn.fields, key):
            raise BadRow(f"the field {key!r}{where} asks for {what}, which is not supported; valid would be none")
    known = {role_key, content_key, "role", "tool_calls", "function_call", *_FLAGS, *_REFUSED}
    message = {"role": role, **{k: v for k, v in turn.fields.items() if k not in known and v is not None}}
    reasoning = next((message[key] for key in REASONING if is_given(message, key)), None)
    message = {key: value for key, value in message.items() if key not in REASONING}
    if reasoning is not None:  # under whichever of the names the template reads it
        message |= dict.fromkeys(REASONING, reasoning)
    calls = _calls(turn, where, content_key if name == "function_call" else "")
    if calls:
        message["tool_calls"] = calls
    if name != "function_call" and not (calls and turn.fields.get(content_key) is None):
        message["content"] = _content(turn, content_key, where)
    return message, _flag(turn.fields, role, where)


def _content(turn: Row, key: str, where: str) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    parts = turn.fields.get(key)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return text_field(turn, key, where)
    texts = []
    for part in parts:
        kind = part.get("type", "text")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                f"the field {key!r}{where} holds a part of type {kind!r}; valid would be text parts alone"
            )
        texts.append(check_unicode(part["text"], key, where))
    return "".join(texts)


def _flag(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a turn may be learned, by what its row says of it."""
    learned = True
    for key in _FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            found = repr(value) if isinstance(value, str) else describe(value)
            raise BadRow(f"the field {key!r}{where} is {found}; valid would be 0 or 1 (false or true)")
        if value and role != "assistant":
            raise BadRow(
                f"the field {key!r}{where} asks to learn a turn of {role!r}; valid would be the assistant's"
            )
        learned = learned and bool(value)
    return learned


def _calls(turn: Row, where: str, written_in: str) -> list[dict]:
    """The tool calls of a message, as [{"type": "function", "function": {"name", "arguments"}}].

    `written_in`: the field whose text is the call, in JSON, of ShareGPT's role function_call; or "".
    """
    if written_in:
        text_field(turn, written_in, where)
    given = [key for key in ("tool_calls", "function_call") if is_given(turn.fields, key)]
    key = written_in or next(iter(given), "")
    if not key:
        return []
    calls = json_field(turn.fields, key, where)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"the field {key!r}{where} is {describe(calls)}; valid would be a list of calls")
    return [_call(call, key, where) for call in calls]


def _call(call: dict, key: str, where: str) -> dict:
    call = {name: value for name, value in call.items() if value is not None}
    function = call.pop("function", None)
    if function is None:
        function = {name: call.pop(name) for name in ("name", "arguments", "parameters") if name in call}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f'the field {key!r}{where} has a call without a name; valid would be {{"name", "arguments"}}')
    function = {name: value for name, value in function.items() if value is not None}
    given = function.pop("arguments", function.pop("parameters", {}))
    return {"type": "function", **call, "function": {**function, "arguments": given}}


def _with_arguments(message: Message, shape: Callable[[Any], Any]) -> Message:
    """The message with the arguments of its calls in a shape."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = {**call["function"], "arguments": shape(call["function"]["arguments"])}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _tools(fields: Mapping[str, Any]) -> list[dict] | None:
    """The tools that the assistant may call, each as {"type": "function", "function": ...}."""
    given = [key for key in ("tools", "functions") if is_given(fields, key)]
    if len(given) > 1:
        raise BadRow("the fields 'tools' and 'functions' are both given; valid would be one of them")
    tools = json_field(fields, given[0]) if given else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"the field {given[0]!r} is {describe(tools)}; valid would be a list of objects, or its JSON")
    bare = [{k: v for k, v in tool.items() if v is not None} for tool in tools]
    return [
        tool
        if "function" in tool
        else {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in bare
    ]
