"""Each format's text, and which of its tokens are supervised."""

import pytest

from dora_dist.data.formats import Labels
from dora_dist.errors import UserError
from tests.support.data import learnt, load, make_tokenizer, whole, write_jsonl

COMPLETIONS = [" paris", "paris", "  two  spaces ", "é 日本 🦊", "\n\nnew\n", " ", ""]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("trim", [True, False])
def test_supervised_tokens_are_the_completion(tmp_path, bos, end, trim):
    tokenizer = make_tokenizer(bos, end, trim)
    # The prompts end in a full stop and a line, so that no token holds characters of both.
    rows = [{"prompt": "the capital of\nfrance é:\n", "completion": text} for text in COMPLETIONS]
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    for i, row in enumerate(rows):
        if not row["completion"].startswith("\n"):
            assert learnt(examples, i, tokenizer) == row["completion"] + "</s>"
        assert whole(examples, i, tokenizer) == f"{'<s>' if bos else ''}{row['prompt']}{row['completion']}</s>"
    assert examples.supervised_counts.tolist() == [int(e.supervised[1:].sum()) for e in examples]
    assert examples.report.supervised_tokens == examples.supervised_counts.sum()


def test_token_across_the_boundary_is_supervised(tmp_path):
    tokenizer = make_tokenizer()
    assert len(tokenizer("the").input_ids) == 2  # <s> and one token
    examples = load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "t", "completion": "he"}]), tokenizer)
    assert learnt(examples, 0, tokenizer) == "the</s>"


def test_end_of_sequence_is_not_doubled(tmp_path):
    tokenizer = make_tokenizer()
    examples = load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a:", "completion": "b</s>"}]), tokenizer)
    assert whole(examples, 0, tokenizer) == "<s>a:b</s>"
    assert learnt(examples, 0, tokenizer) == "b</s>"


def test_loss_on_all(tmp_path):
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the fox", "completion": " jumps"}])
    assert learnt(load(path, tokenizer, loss_on="all"), 0, tokenizer) == "<s>the fox jumps</s>"


def test_alpaca(tmp_path):
    tokenizer = make_tokenizer()
    rows = [
        {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say hi.", "input": None, "output": "hi"},
        {"instruction": "Say hi.", "output": "hi"},
    ]
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert [learnt(examples, i, tokenizer) for i in range(4)] == ["3</s>", "hi</s>", "hi</s>", "hi</s>"]
    assert whole(examples, 0, tokenizer) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    )
    assert "### Input" not in whole(examples, 1, tokenizer)


CHAT = [
    {"role": "system", "content": "speak"},
    {"role": "user", "content": "what is the capital?"},
    {"role": "assistant", "content": "paris"},
    {"role": "user", "content": "and the fox?"},
    {"role": "assistant", "content": "lazy"},
]


def test_chat_supervises_assistant_turns(tmp_path):
    tokenizer = make_tokenizer()
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"conversations": sharegpt}])
    examples = load(path, tokenizer)
    assert learnt(examples, 0, tokenizer) == "paris</s>\nlazy</s>\n"
    assert whole(examples, 0, tokenizer) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole(examples, 0, tokenizer).startswith("<s><|system|>")  # the template's own, not doubled
    assert examples[0].ids.tolist() == examples[1].ids.tolist()
    everything = load(path, tokenizer, loss_on="all")
    assert learnt(everything, 0, tokenizer) == whole(examples, 0, tokenizer)


def test_chat_template_that_cannot_be_used(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"a.jsonl:1: .* \(message 3 changes the rendering .* valid would be"):
        load(path, tokenizer)
    with pytest.raises(UserError, match="all 1 rows are bad"):
        load(path, tokenizer, on_bad_row="skip")
    assert learnt(load(path, tokenizer, loss_on="all"), 0, tokenizer).startswith("5speak")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"a.jsonl:1: the chat template refuses .*: roles must alternate"):
        load(path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data.format: chat needs a tokenizer with a chat template"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "the field 'messages' is an empty list; valid would be a list of"),
        ({"messages": "hi"}, "the field 'messages' is a string"),
        ({"messages": ["hi"]}, "item 1 of 'messages' is a string"),
        ({"messages": CHAT[:2]}, "there is no assistant turn to learn"),
        ({"messages": [{"role": "user"}]}, "the field 'content' is missing in item 1 of 'messages'"),
        ({"messages": [{"role": "user", "content": []}]}, "the field 'content' in item 1 of .* is a list"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            "'from' is 'bot' in item 1 .* valid would be human",
        ),
        ({"text": "a"}, "the field 'messages' is missing"),
    ],
)
def test_bad_chat_rows(tmp_path, row, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, row])
    with pytest.raises(UserError, match=rf"a.jsonl:2: {message}"):
        load(path)


def test_text_is_split_and_nothing_is_lost(tmp_path):
    tokenizer = make_tokenizer()
    document = "the quick brown fox jumps over the lazy dog. " * 20
    ids = [*tokenizer(document).input_ids, tokenizer.eos_token_id]
    for extra in range(3):  # the last row may not be left with one token, which nothing would predict
        seq_len = (len(ids) - extra) // 3
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": document}, {"text": "dog"}])
        examples = load(path, tokenizer, seq_len=seq_len)
        *rows, last = [list(example.ids) for example in examples]
        assert [rows[0][0], *(token for row in rows for token in row[1:])] == ids
        assert last == [*tokenizer("dog").input_ids, tokenizer.eos_token_id]
        assert all(len(row) <= seq_len for row in rows)
        assert examples.report.rows_truncated == 0
        assert examples.report.supervised_tokens == len(ids) - 1 + len(last) - 1
    with pytest.raises(UserError, match=r"a.jsonl:1: the field 'text' is empty"):
        load(write_jsonl(tmp_path / "a.jsonl", [{"text": ""}]))


def test_truncation(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    rows = [
        {"prompt": "the fox:", "completion": " dog" * 40},
        {"prompt": "the dog:" * 8, "completion": "fox"},
    ]
    prompt = len(tokenizer(rows[1]["prompt"]).input_ids)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=rf"a.jsonl:2: the prompt's {prompt} tokens fill data.seq_len = 8, and"):
        load(path, tokenizer, seq_len=8)
    examples = load(path, tokenizer, seq_len=8, on_bad_row="skip")
    assert examples.lengths.tolist() == [8]
    assert (examples.report.rows_truncated, examples.report.rows_skipped) == (1, 1)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "a", "completion": "b", "id": 1}, "prompt_completion"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca"),
        ({"text": "a", "label": 1}, "text"),
    ],
)
def test_auto(tmp_path, row, form):
    path = write_jsonl(tmp_path / "a.jsonl", ["{", row])
    chosen, given = load(path, on_bad_row="skip"), load(path, on_bad_row="skip", format=form)
    assert chosen.ids.tolist() == given.ids.tolist()
    assert chosen.supervised.tolist() == given.supervised.tolist()


def test_auto_with_unknown_keys(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    message = r"a.jsonl:1: the keys found \('question', 'answer'\) fit no format; valid would be chat .*, prompt_"
    with pytest.raises(UserError, match=message):
        load(path)


def load_labels(path, tokenizer=None, **settings):
    labels = Labels(3, {"bad": 0, "good": 2})
    return load(path, tokenizer or make_tokenizer(end=True), labels, **settings)


def test_labels(tmp_path):
    tokenizer = make_tokenizer(end=True)
    rows = [{"text": "fox", "label": 1}, {"text": "dog", "text_pair": "the fox", "label": "good"}]
    examples = load_labels(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert examples.labels.tolist() == [1, 2]
    assert examples.supervised_counts.tolist() == [1, 1]
    assert [whole(examples, i, tokenizer) for i in range(2)] == ["<s>fox</s>", "<s>dog</s>the fox</s>"]
    (tmp_path / "a.csv").write_text("text,label\nfox,2\ndog,bad\n")
    assert load_labels(str(tmp_path / "a.csv")).labels.tolist() == [2, 0]


def test_labels_are_truncated_longest_first(tmp_path):
    tokenizer = make_tokenizer(end=True)
    rows = [{"text": "a b c", "text_pair": "the fox " * 20, "label": 0}]
    examples = load_labels(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, seq_len=12)
    assert len(examples[0].ids) == 12
    assert examples.report.rows_truncated == 1
    assert whole(examples, 0, tokenizer).startswith("<s>a b c</s>the fox")
    assert whole(examples, 0, tokenizer).endswith("</s>")


def test_token_types_of_pairs(tmp_path):
    tokenizer = make_tokenizer(end=True)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [{"text": "fox", "text_pair": "dog", "label": 0}, {"text": "fox", "label": 0}]
    examples = load_labels(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    for example, row in zip(examples, rows, strict=True):
        expected = tokenizer(row["text"], row.get("text_pair")).token_type_ids
        assert example.token_types.tolist() == expected
        assert len(set(expected)) == len(row) - 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": 3},
            "the field 'label' is the number 3; valid would be 0 to 2, or one of 'bad'",
        ),
        ({"text": "a", "label": -1}, "the field 'label' is the number -1"),
        ({"text": "a", "label": 1.0}, "the field 'label' is the number 1.0"),
        ({"text": "a", "label": True}, "the field 'label' is the boolean true"),
        ({"text": "a", "label": "so-so"}, "the field 'label' is 'so-so'"),
        ({"text": "a", "label": None}, "the field 'label' is null"),
        ({"text": "a"}, "the field 'label' is missing"),
        ({"label": 1}, "the field 'text' is missing"),
        ({"text": "a", "text_pair": 1, "label": 1}, "the field 'text_pair' is the number 1"),
    ],
)
def test_bad_labels(tmp_path, row, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, row])
    with pytest.raises(UserError, match=rf"a.jsonl:2: {message}"):
        load_labels(path)


def test_format_and_task_must_agree(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"data.format: chat does not fit model.task: sequence_classification"):
        load_labels(path, format="chat")
    with pytest.raises(UserError, match=r"data.format: labels needs model.task: sequence_classification"):
        load(path, format="labels")
