"""Conversations: every field that has a meaning is honoured or refused by name, from any kind of file, and what is
learned is what the model would write."""

import json

import pytest

from dora_dist.data.formats import Labels
from dora_dist.errors import UserError
from tests.support.data import CHAT_TEMPLATE, learnt, load, make_tokenizer, whole, write_jsonl

TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
# Thinking is shown of the turns after the last question alone, and the last turn always has a thought.
THINKING_TEMPLATE = (
    LAST_QUESTION + "{% for m in messages %}<|{{ m.role }}|>\n{% set text = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>{{ text[0].replace('<think>', '') if text | length > 1 else '' }}</think>{% endif %}"
    "{{ text[-1] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The prompt opens a thought that a finished turn does not show.
STRIPPING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
SYSTEM_LAST_TEMPLATE = (  # the system text stands before the last question
    LAST_QUESTION + "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 == ns.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}{{ messages | length }}"
)
ASKED = {"role": "user", "content": "what is the capital?"}
ANSWERED = {"role": "assistant", "content": "paris"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"of": "france", "in": None}}}
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": {"properties": {"of": {"type": "string"}}}}}
]
LONG = [
    {"role": "system", "content": "speak"},
    ASKED,
    {"role": "assistant", "content": "<think>france?</think>paris"},
    {"role": "user", "content": "and the fox?"},
    {"role": "assistant", "content": "<think>brown</think>lazy"},
]


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def read(directory, row, tokenizer, **settings):
    """(the text, what is learned of it) of each example of a row."""
    examples = load(write_jsonl(directory / "a.jsonl", [row]), tokenizer, **settings)
    return [(whole(examples, i, tokenizer), learnt(examples, i, tokenizer)) for i in range(len(examples))]


def chat(*messages, **fields):
    return {"messages": list(messages), **fields}


def text_of(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def test_tools_and_calls_reach_the_template(tmp_path, tokenizer):
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = chat(ASKED, calling, {"role": "tool", "name": "find", "content": "paris"}, ANSWERED, tools=TOOLS)
    ((text, learned),) = read(tmp_path, row, tokenizer)
    assert text == text_of(tokenizer, row["messages"], tools=TOOLS)
    assert '<call>find {"of": "france", "in": null}</call>' in text
    assert learned == '<call>find {"of": "france", "in": null}</call></s>\nparis</s>\n'
    as_text = {**CALL, "function": {"name": "find", "arguments": json.dumps(CALL["function"]["arguments"])}}
    function = TOOLS[0]["function"]
    old = {"role": "assistant", "function_call": as_text["function"]}
    sharegpt = [
        {"from": "human", "value": ASKED["content"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "paris"},
        {"from": "gpt", "value": "paris"},
    ]
    result = {"role": "function", "name": "find", "content": "paris"}
    same = [
        {**row, "tools": json.dumps(TOOLS)},
        {**row, "tools": [function]},
        chat(ASKED, {**calling, "tool_calls": [as_text]}, row["messages"][2], ANSWERED, tools=TOOLS, system=None),
        chat(ASKED, old, result, ANSWERED, functions=[function]),
        {"conversations": sharegpt, "tools": json.dumps([function])},
        {"messages": json.dumps(row["messages"]), "tools": json.dumps(TOOLS)},
        {"prompt": [ASKED, calling, row["messages"][2]], "completion": [ANSWERED], "tools": TOOLS},
    ]
    for other in same:
        ((told, parts),) = read(tmp_path, other, tokenizer)
        assert told == text, other
        assert parts == ("paris</s>\n" if "prompt" in other else learned)


def test_templates_that_add_arguments_to_strings(tmp_path, tokenizer):
    calls = "{% for c in m.tool_calls or [] %}{{ '[' + c.function.arguments + ']' }}{% endfor %}"
    tokenizer.chat_template = "{% for m in messages %}" + calls + "{{ '' + m.content }};{% endfor %}"
    row = chat(ASKED, {"role": "assistant", "tool_calls": [CALL]}, ANSWERED)
    ((text, learned),) = read(tmp_path, row, tokenizer)
    assert text == 'what is the capital?;[{"of": "france", "in": null}];paris;'
    assert learned == '[{"of": "france", "in": null}];paris;'


def test_the_system_text_of_a_row(tmp_path, tokenizer):
    expected = read(tmp_path, chat({"role": "system", "content": "speak"}, ASKED, ANSWERED), tokenizer)
    assert read(tmp_path, chat(ASKED, ANSWERED, system="speak"), tokenizer) == expected
    conversation = [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": "paris"}]
    assert read(tmp_path, {"conversations": conversation, "system": "speak"}, tokenizer) == expected
    prompt = {"prompt": [ASKED], "completion": [ANSWERED], "system": "speak"}
    assert read(tmp_path, prompt, tokenizer) == expected


def test_alpaca_with_system_and_history(tmp_path, tokenizer):
    row = {"instruction": "and?", "input": "", "output": "lazy", "system": "speak", "history": [["who?", "a fox"]]}
    ((text, learned),) = read(tmp_path, row, tokenizer)
    turns = (
        "### Instruction:\nwho?\n\n### Response:\na fox</s>\n\n### Instruction:\nand?\n\n### Response:\nlazy</s>"
    )
    assert text == f"<s>speak\n\n{turns}"
    assert learned == "a fox</s>lazy</s>"


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"weight": 0, "train": True}]
)
def test_turns_that_are_not_to_be_learned(tmp_path, tokenizer, flag):
    first = {"role": "assistant", "content": "a fox", **flag}
    row = chat(ASKED, first, ASKED, {**ANSWERED, "weight": 1})
    ((text, learned),) = read(tmp_path, row, tokenizer)
    assert learned == "paris</s>\n"
    assert text == text_of(tokenizer, [ASKED, {**first, "weight": None}, ASKED, ANSWERED])
    ((_, everything),) = read(tmp_path, row, tokenizer, loss_on="all")
    assert everything == text.replace("a fox</s>\n", "")
    with pytest.raises(UserError, match=r"a.jsonl:1: none of the 1 assistant turns is to be learned"):
        read(tmp_path, chat(ASKED, first), tokenizer)


def test_content_in_parts_and_reasoning(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "the capital?"}]
    row = chat({"role": "user", "content": parts}, {**ANSWERED, "thinking": "france"})
    ((text, learned),) = read(tmp_path, row, tokenizer)
    assert text == text_of(tokenizer, [ASKED, {**ANSWERED, "reasoning_content": "france"}])
    assert learned == "(france)paris</s>\n"
    row = chat({"role": "user", "content": parts}, {**ANSWERED, "thinking": "", "reasoning_content": None})
    assert read(tmp_path, row, make_tokenizer()) == read(tmp_path, chat(ASKED, ANSWERED), make_tokenizer())


def test_options_of_the_template(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ 'short ' if brief else 'long ' }}" + CHAT_TEMPLATE
    ((text, learned),) = read(tmp_path, chat(ASKED, ANSWERED, chat_template_kwargs={"brief": True}), tokenizer)
    assert text.startswith("short ")
    assert learned == "paris</s>\n"


PAIR = {"prompt": "a", "completion": "b"}
REFUSED = [
    (chat(ASKED, ANSWERED, images=["a.png"]), "the field 'images' cannot be used: rows are text alone"),
    ({"text": "a", "image": "a.png"}, "the field 'image' cannot be used"),
    (chat({**ASKED, "audio": {"id": 1}}, ANSWERED), "the field 'audio' in item 1 of 'messages' cannot be used"),
    (
        chat({**ASKED, "content": [{"type": "image_url", "image_url": "x"}]}, ANSWERED),
        "the field 'content' in item 1 of 'messages' holds a part of type 'image_url'",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the field 'chosen' belongs to preference training"),
    ({**PAIR, "rejected": "c"}, "the field 'rejected' belongs to preference training"),
    ({**PAIR, "label": True}, "the field 'label' is a boolean, as in preference training"),
    ({**PAIR, "tools": TOOLS}, "the field 'tools' has no place in data.format: prompt_completion"),
    ({**PAIR, "system": "speak"}, "the field 'system' has no place in data.format: prompt_completion"),
    (
        {"instruction": "a", "output": "b", "tools": "[{}]"},
        "the field 'tools' has no place in data.format: alpaca",
    ),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "item 1 of 'history' is a list"),
    ({"prompt": [ASKED], "completion": "b"}, "the field 'prompt' is a list, the field 'completion' is a string"),
    (chat(ASKED, {**ANSWERED, "weight": 0.5}), "the field 'weight' in item 2 of 'messages' is the number 0.5"),
    (
        chat({**ASKED, "train": True}, ANSWERED),
        "the field 'train' in item 1 of 'messages' asks to learn a turn of",
    ),
    (chat(ASKED, {**ANSWERED, "train_detail": [{}]}), "the field 'train_detail' in item 2 of 'messages' asks for"),
    (chat(ASKED, {"role": "assistant", "refusal": "no"}), "the field 'refusal' in item 2 of 'messages' asks for"),
    (chat(ASKED, ANSWERED, tools="nothing"), "the field 'tools' is a string that is no JSON"),
    (chat(ASKED, ANSWERED, tools=["find"]), "the field 'tools' is a list; valid would be a list of objects"),
    (chat(ASKED, ANSWERED, tools=TOOLS, functions=[{}]), "the fields 'tools' and 'functions' are both given"),
    (chat(ASKED, {"role": "assistant", "tool_calls": [{}]}), "the field 'tool_calls' in item 2 .* without a name"),
    (chat(ASKED, {"role": "assistant", "content": None}), "the field 'content' in item 2 of 'messages' is null"),
    (chat({"role": "system", "content": "b"}, ASKED, ANSWERED, system="a"), "the field 'system' contradicts the"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "find it"}]},
        "the field 'value' in item 2 of 'conversations' is a string that is no JSON",
    ),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_cannot_be_honoured_is_named(tmp_path, tokenizer, row, message):
    with pytest.raises(UserError, match=f"a.jsonl:1: {message}"):
        read(tmp_path, row, tokenizer)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (chat(ASKED, ANSWERED, tools=TOOLS), "tools"),
        (chat(ASKED, {**ANSWERED, "tool_calls": [CALL]}), "tool_calls"),
        (chat(ASKED, {**ANSWERED, "thinking": "a"}), "reasoning_content"),
    ],
)
def test_what_the_template_does_not_read_is_named(tmp_path, row, name):
    with pytest.raises(
        UserError, match=rf"the field '{name}' is given, and the tokenizer's chat template does not"
    ):
        read(tmp_path, row, make_tokenizer())


def test_unused_columns_are_listed_once(tmp_path):
    rows = [chat({**ASKED, "name": "bob"}, ANSWERED, id=i, source="web", empty=None, images=[]) for i in range(3)]
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert str(examples.report).count("not used: id, messages[].name, source") == 1


def test_thinking_that_later_turns_drop(tmp_path, tokenizer):
    tokenizer.chat_template = THINKING_TEMPLATE
    made = read(tmp_path, chat(*LONG), tokenizer)
    assert [learned for _, learned in made] == ["<think>france?</think>paris</s>", "<think>brown</think>lazy</s>"]
    assert made[0][0] == text_of(tokenizer, LONG[:3])
    assert made[1][0] == text_of(tokenizer, LONG)
    assert "france?" not in made[1][0]
    ((_, learned),) = read(tmp_path, chat(*LONG[:2], {**LONG[2], "weight": 0}, *LONG[3:]), tokenizer)
    assert learned == "<think>brown</think>lazy</s>"
    called = chat(
        *LONG, {"role": "tool", "content": "dog"}, {"role": "assistant", "content": "<think>?</think>no"}
    )
    assert [learned for _, learned in read(tmp_path, called, tokenizer)] == [
        "<think>france?</think>paris</s>",
        "<think>brown</think>lazy</s><think>?</think>no</s>",  # one text shows both
    ]
    left_open = read(
        tmp_path, chat(*LONG, ASKED), tokenizer
    )  # a last question hides the last turn's thinking, too
    assert left_open == made
    report = load(write_jsonl(tmp_path / "a.jsonl", [chat(*LONG)]), tokenizer).report
    assert "1 conversations became one example a turn" in str(report)


def test_a_prompt_that_opens_a_thought(tmp_path, tokenizer):
    tokenizer.chat_template = STRIPPING_TEMPLATE
    ((text, learned),) = read(tmp_path, chat(*LONG), tokenizer)
    assert text == text_of(tokenizer, LONG)
    assert learned == "paris</s>lazy</s>"


def test_a_system_text_that_moves(tmp_path, tokenizer):
    tokenizer.chat_template = SYSTEM_LAST_TEMPLATE
    plain = [LONG[0], ASKED, ANSWERED, LONG[3], {"role": "assistant", "content": "lazy"}]
    made = read(tmp_path, chat(*plain), tokenizer)
    assert made == [(text_of(tokenizer, plain[:3]), " paris</s>"), (text_of(tokenizer, plain), " lazy</s>")]
    (only,) = read(tmp_path, {"prompt": plain[:4], "completion": plain[4:]}, tokenizer)
    assert only == made[1]


def test_marks_decide(tmp_path, tokenizer):
    tokenizer.chat_template = MARKED_TEMPLATE  # whose end would make it impossible to split
    row = chat(ASKED, ANSWERED, LONG[3], {"role": "assistant", "content": "lazy"})
    ((text, learned),) = read(tmp_path, row, tokenizer)
    assert text == text_of(tokenizer, row["messages"])
    assert learned == "parislazy"
    row["messages"][1] = {**ANSWERED, "weight": 0}
    assert read(tmp_path, row, tokenizer) == [(text, "lazy")]


def test_a_part_that_does_not_fit_leaves_the_others(tmp_path, tokenizer):
    tokenizer.chat_template = THINKING_TEMPLATE
    first = len(tokenizer(text_of(tokenizer, LONG[:3]), add_special_tokens=False).input_ids)
    path = write_jsonl(tmp_path / "a.jsonl", [chat(*LONG)])
    examples = load(path, tokenizer, seq_len=first)
    assert (len(examples), examples.report.rows_truncated, examples.report.rows_skipped) == (1, 1, 0)


def test_the_begin_of_sequence_is_not_doubled(tmp_path):
    tokenizer = make_tokenizer(end=True)
    expected = [whole(load(write_jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer), 0, tokenizer)] * 2
    assert expected[0] == "<s>ab</s>"
    rows = {
        "pairs": [{**PAIR, "prompt": "<s>a"}, {"prompt": "", "completion": "<s>ab"}],
        "texts": [{"text": "<s>ab"}, {"text": "ab"}],
    }
    for name, some in rows.items():
        examples = load(write_jsonl(tmp_path / f"{name}.jsonl", some), tokenizer)
        assert [whole(examples, i, tokenizer) for i in range(2)] == expected
    labelled = [{"text": "<s>ab", "label": 0}, {"text": "ab", "label": 1}]
    path = write_jsonl(tmp_path / "labels.jsonl", labelled)
    examples = load(path, tokenizer, Labels(2, {}))
    assert [whole(examples, i, tokenizer) for i in range(2)] == expected
    assert learnt(load(str(tmp_path / "pairs.jsonl"), tokenizer), 0, tokenizer) == "b</s>"
