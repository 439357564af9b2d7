"""Conversations to text by the tokenizer's chat template, with the characters that the assistant wrote.

A `{% generation %}` mark in the template decides where there is one. Elsewhere a turn is what the template adds to
the prompt for generating it. Templates that render earlier turns anew once others follow (Qwen3 and R1 drop their
thinking, Mistral moves the system text) show a turn as the model wrote it only while it is the last; such a row
becomes several examples, each with the conversation as it stood at that turn, as when the model is used.
"""

import re
from functools import cached_property
from typing import Any, NamedTuple

from dora_dist.data.chats import REASONING, Chat, Message
from dora_dist.data.fields import BadRow
from dora_dist.data.rows import one_line
from dora_dist.errors import UserError

Span = tuple[int, int]  # characters [start, end)


class Draft(NamedTuple):
    text: str
    spans: list[Span] | None  # characters to learn; None: all
    pair: str | None = None  # labels: the second text
    label: int = -1
    chat: bool = False  # rendered by a chat template, which writes the special tokens itself


class ChatTemplate:
    """Makes drafts of chats.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, everything: bool, unused: set[str]) -> None:
        """`everything`: learn the whole text; `unused`: takes the names of what the template does not read."""
        if not tokenizer.chat_template:
            raise UserError(
                "data.format: chat needs a tokenizer with a chat template, and this one has none; valid "
                "would be an instruction-tuned model's tokenizer, or the format prompt_completion"
            )
        self._tokenizer, self._everything, self._unused = tokenizer, everything, unused

    def __call__(self, chat: Chat) -> list[Draft]:
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not chat.learned and not (self._everything and not turns):
            flagged = f"none of the {len(turns)} assistant turns is to be learned" if turns else ""
            problem = flagged or "there is no assistant turn to learn"
            raise BadRow(f"{problem}; valid would be a message with the role 'assistant'")
        drawn = _Drawing(self._tokenizer, chat, self._unused)
        left_out = [turn for turn in turns if turn not in chat.learned]
        if self._everything:
            return [
                Draft(
                    drawn.whole,
                    _outside(drawn.spans(left_out, turns), drawn.whole) if left_out else None,
                    chat=True,
                )
            ]
        if drawn.marks is not None:
            return [Draft(drawn.whole, drawn.spans(chat.learned, turns), chat=True)]
        return drawn.examples(chat.learned)


class _Drawing:
    """One chat, rendered whole and up to its turns."""

    def __init__(self, tokenizer: Any, chat: Chat, unused: set[str]) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        try:
            self._source: str = tokenizer.get_chat_template(tools=chat.tools)
            self._check_names(unused)
            self._messages, self.whole = self._first_that_renders()
        except ImportError:
            raise  # transformers says which package templates need
        except BadRow:
            raise
        except Exception as error:  # a template raises what it likes
            raise BadRow(f"the chat template refuses the messages: {one_line(error)}") from None

    def _check_names(self, unused: set[str]) -> None:
        """That the template reads what changes the text to learn; notes what else it does not read."""
        given = {name for message in self._chat.messages for name in message}
        needed = {"tools"} if self._chat.tools else set()
        needed |= {"tool_calls"} & given
        if given.intersection(REASONING) and not any(name in self._source for name in REASONING):
            needed.add("reasoning_content")
        for name in sorted(needed):
            if name not in self._source:
                raise BadRow(
                    f"the field {name!r} is given, and the tokenizer's chat template does not read it; valid "
                    "would be rows without it, or the tokenizer of a model that was trained with it"
                )
        unused |= {f"messages[].{name}" for name in given - set(REASONING) if name not in self._source}
        unused |= {f"chat_template_kwargs.{name}" for name in self._chat.options if name not in self._source}

    def _first_that_renders(self) -> tuple[list[Message], str]:
        first: Exception | None = None
        for messages in self._chat.variants:
            try:
                return messages, self._render(messages)
            except Exception as error:
                first = first or error
        assert first is not None
        raise first

    def _render(self, messages: list[Message], generate: bool = False) -> str:
        own = {"tools": self._chat.tools, "tokenize": False, "add_generation_prompt": generate}
        return self._tokenizer.apply_chat_template(messages, **own, **self._chat.options)

    @cached_property
    def marks(self) -> list[Span] | None:
        """The parts of the text that the template marks as generated; None: it marks none."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self._source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        tools: Any = self._chat.tools
        rendered: Any = render_jinja_template(
            conversations=[self._messages],
            tools=tools,
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._chat.options},
        )
        (text,), (marks,) = rendered
        assert text == self.whole
        return list(marks)

    def spans(self, some: list[int], turns: list[int]) -> list[Span]:
        """The characters of some of the assistant's turns, in the whole text."""
        if self.marks is None:
            spans = [self._turn(turn) for turn in some]
            if not all(self.whole.startswith(through) for _, through in spans):
                raise _untold("the rendering up to a turn does not begin the whole's")
            return [(start, len(through)) for start, through in spans]
        if len(some) == len(turns):
            return self.marks
        if len(self.marks) != len(turns):
            raise _untold(
                f"it marks {len(self.marks)} parts for {len(turns)} assistant turns, some not to be learned"
            )
        return [self.marks[turns.index(turn)] for turn in some]

    def examples(self, learned: list[int]) -> list[Draft]:
        """As few texts as show each of the turns as the model would write it: the whole, where it shows all."""
        bounds = {turn: self._turn(turn) for turn in learned}
        text, drafts = self.whole, []
        while bounds:
            shown = [turn for turn, (_, through) in bounds.items() if text.startswith(through)]
            if shown:
                spans = [(start, len(through)) for start, through in map(bounds.pop, shown)]
                drafts.append(Draft(text, spans, chat=True))
            if bounds:
                text = bounds[max(bounds)][1]
        return drafts[::-1]

    def _turn(self, turn: int) -> tuple[int, str]:
        """(where a turn begins, the text up to its end): what the model adds to the prompt for generating it."""
        before = self._messages[:turn]
        try:
            prompt, through = self._render(before, generate=True), self._render(self._messages[: turn + 1])
            if through.startswith(prompt):
                return len(prompt), through
            history = self._render(before)
        except Exception as error:  # such as a template that insists on a user turn first
            raise _untold(f"it refuses the messages before turn {turn + 1}: {one_line(error)}") from None
        if not through.startswith(history):
            raise _untold(f"message {turn + 1} changes the rendering of those before it")
        # R1's prompt opens a thought, which its rendering of a finished turn leaves out.
        return max(len(history), common_length(prompt, through)), through


def _untold(why: str) -> BadRow:
    return BadRow(
        f"the tokenizer's chat template does not tell the assistant's text from the rest ({why}); valid would be "
        "a template with {% generation %} marks, or data.loss_on: all, which learns the user's text too"
    )


def common_length(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _outside(spans: list[Span], text: str) -> list[Span]:
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
