"""Where rows come from, and that what is wrong with one is told with its place."""

import json
import sys
import types

import pytest

from dora_dist.data.encode import check_vocabulary
from dora_dist.data.sources import is_hub_id
from dora_dist.errors import UserError
from tests.support.data import learnt, load, make_tokenizer, write_jsonl

GOOD = {"prompt": "the capital of france is", "completion": " paris"}
MISSING_LINE_2 = r"train.jsonl:2: the field 'completion' is missing \(found: 'prompt'\); valid would be a string"

BAD_LINES = {
    "broken": (
        '{"prompt": "a", ',
        r":2: broken JSON: Expecting .* at column 16; valid would be one JSON object",
    ),
    "list": ("[1]", r":2: the row is a list; valid would be an object such as"),
    "number": ("7", r":2: the row is the number 7; valid"),
    "missing": ('{"prompt": "a"}', MISSING_LINE_2),
    "null": (
        '{"prompt": "a", "completion": null}',
        r":2: the field 'completion' is null; valid would be a string",
    ),
    "type": ('{"prompt": 3, "completion": "b"}', r":2: the field 'prompt' is the number 3; valid"),
    "nan": ('{"prompt": "a", "completion": "b", "x": NaN}', r":2: NaN is not JSON; valid"),
    "infinity": ('{"prompt": "a", "completion": "b", "x": -Infinity}', r":2: -Infinity is not JSON"),
    "surrogate": (
        r'{"prompt": "\ud800", "completion": "b"}',
        r":2: the field 'prompt' holds half a surrogate",
    ),
    "deep": ("[" * 200_000, r":2: broken JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_an_error_with_its_place(tmp_path, name):
    line, message = BAD_LINES[name]
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, line, GOOD])
    with pytest.raises(UserError, match=message) as error:
        load(path, format="prompt_completion")
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


def test_skip_counts_bad_lines_and_names_the_first(tmp_path):
    lines = [line for line, _ in BAD_LINES.values()]
    path = write_jsonl(tmp_path / "train.jsonl", [*lines, "", GOOD, GOOD])
    examples = load(path, on_bad_row="skip", format="prompt_completion")
    report = examples.report
    assert len(examples) == 2
    assert (report.rows_read, report.rows_skipped) == (len(lines) + 2, len(lines))
    assert len(report.problems) == 5
    assert report.problems[1].startswith(f"{path}:2: ")
    assert f"{len(lines) + 2} rows read, {len(lines)} skipped" in str(report)
    assert "and 5 more" in str(report)


def test_the_first_bad_row_is_the_one_told(tmp_path):
    no_room = {
        "prompt": "the fox:" * 9,
        "completion": "dog",
    }  # found later than what is wrong with the next row
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, no_room, {"prompt": "a"}])
    with pytest.raises(UserError, match=r"train.jsonl:2: the prompt's \d+ tokens fill data.seq_len = 16"):
        load(path, seq_len=16)
    problems = load(path, seq_len=16, on_bad_row="skip").report.problems
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:2", f"{path}:3"]


def test_all_rows_bad(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", ["{", "{"])
    with pytest.raises(UserError, match=r"all 2 rows are bad; the first: .*train.jsonl:1: broken JSON"):
        load(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", "[]"),
        ("a.json", " "),
        ("a.txt", "\n"),
        ("a.csv", ""),
        ("a.csv", "prompt,completion\n"),
    ],
)
def test_no_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^data.train: '{path}' holds no rows$"):
        load(str(path))


def test_json_list_knows_lines(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[\n  {"prompt": "a",\n   "completion": "b"},\n  {"prompt": "c"}\n]')
    with pytest.raises(UserError, match=r"train.json:4: the field 'completion' is missing"):
        load(str(path))
    path.write_text('\n[{"prompt": "a", "completion": "b"},\n 5, {"prompt": "a", "completion": NaN}]\n')
    assert load(str(path), on_bad_row="skip").report.rows_skipped == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"a": 1}\n{"a": 2}]', "json:3: broken JSON: expected ',' or ']'"),
        ('[\n{"a": 1},\n{"a": ]', "json:3: broken JSON: Expecting value"),
        ('[{"a": 1},]', "json:1: broken JSON: Expecting value"),
        ('[{"a": 1}', "json:1: broken JSON: expected ',' or ']'"),
        ("[", "json:1: broken JSON: Expecting value"),
        ('[{"a": 1}]\n[]', "json:2: broken JSON: there is more"),
        ('{"a": 1}\n{"a": 2}', "does not hold a list; .* named .jsonl"),
    ],
)
def test_broken_json_list_is_an_error_even_when_skipping(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_text(content)
    rows_are_bad = {"on_bad_row": "skip", "format": "prompt_completion"}
    with pytest.raises(UserError, match=message):
        load(str(path), **rows_are_bad)


def test_utf8_errors_name_the_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b'\n{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"train.jsonl:2: not valid UTF-8 \(byte 0xff\)"):
        load(str(path))
    assert len(load(str(path), on_bad_row="skip")) == 1  # and the byte order mark is no part of the first row
    text = tmp_path / "a.txt"
    text.write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(UserError, match=r"a.txt:2: not valid UTF-8"):
        load(str(text))


def test_csv(tmp_path):
    tokenizer = make_tokenizer()
    path = tmp_path / "train.csv"
    path.write_text('prompt,completion,x\r\n"a,:","two\nlines",1\r\n\r\nc,d\r\n', newline="")
    with pytest.raises(UserError, match=r"train.csv:5: the row has 2 fields; valid would be the header's 3"):
        load(str(path))
    examples = load(str(path), tokenizer, on_bad_row="skip")
    assert learnt(examples, 0, tokenizer) == "two\nlines</s>"
    path.write_bytes(b"prompt,completion\na,b\nc,\xff\n")
    with pytest.raises(UserError, match=r"train.csv:3: not valid UTF-8"):
        load(str(path))
    path.write_text('prompt,completion\na,b\nc,"d\n')
    with pytest.raises(UserError, match=r"train.csv:3: broken CSV"):
        load(str(path))
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(UserError, match=r"train.csv:1: the header's names must be distinct"):
        load(str(path))


def test_directory(tmp_path):
    tokenizer = make_tokenizer()
    for name, word in (
        ("b.txt", "fox"),
        ("a.md", "dog"),
        ("sub/c.py", "paris"),
        ("d.txt", ""),
        (".hidden", "x"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(word)
    examples = load(str(tmp_path), tokenizer)
    assert [learnt(examples, i, tokenizer) for i in range(3)] == [f"<s>{w}</s>" for w in ("dog", "fox", "paris")]
    write_jsonl(tmp_path / "e.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"data.train: the files in .* are not all of one kind: .*a.md, .*e.jsonl"):
        load(str(tmp_path))
    (tmp_path / "e.bin").write_text("x")
    with pytest.raises(UserError, match=r"e.bin' is of no known kind; valid would be .json, .jsonl"):
        load(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no files"):
        load(str(tmp_path / "empty"))


@pytest.mark.parametrize("path", ["no/train.jsonl", "/no/where", "./no/where", "train", "a/b/c", "../no"])
def test_path_that_is_nothing(path):
    with pytest.raises(UserError, match=rf"^data.train: there is no file or directory '{path}'"):
        load(path)


def test_hub_ids():
    assert is_hub_id("org/name")
    assert is_hub_id("org/data-1.5")
    assert not is_hub_id("org/name.csv")


def _fake_datasets(monkeypatch, load_dataset):
    def splits(_name):
        return ["train", "test"]

    fake = types.SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=splits)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_hub(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return [GOOD, {**GOOD, "completion": None}]

    _fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"^org/name:2: the field 'completion' is null"):
        load("org/name")
    assert len(load("org/name", on_bad_row="skip", key="data.eval")) == 1
    assert asked == [("org/name", "train", False), ("org/name", "test", False)]


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*_args, **_settings):
        raise ConnectionError("no\nnetwork")

    _fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"^data.train: there is no local file 'org/name', and .*: no network$"):
        load("org/name")


def test_datasets_is_needed_for_parquet_and_hub_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data.train: parquet files and hub datasets need `pip install datasets`"):
        load("org/name")
    assert len(load(write_jsonl(tmp_path / "train.jsonl", [GOOD]))) == 1


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list([GOOD, {**GOOD, "completion": None}]).to_parquet(path)
    tokenizer = make_tokenizer()
    examples = load(str(path), tokenizer, on_bad_row="skip")
    assert learnt(examples, 0, tokenizer) == " paris</s>"
    assert examples.report.problems == [f"{path}:2: the field 'completion' is null; valid would be a string"]
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"train.parquet: not readable as parquet"):
        load(str(path))


def test_tokenizers_that_cannot_be_used(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD])
    tokenizer = make_tokenizer()
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=r"the tokenizer has 340 tokens, but the model's vocabulary is 339"):
        load(path, tokenizer, vocab_size=339)
    with pytest.raises(UserError, match=r"SimpleNamespace is a slow tokenizer"):
        load(path, types.SimpleNamespace(is_fast=False))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"prompt_completion ends each row with .* this tokenizer has none"):
        load(path, tokenizer)
