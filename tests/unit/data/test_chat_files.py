"""The same conversations give the same tokens from every kind of file, nulls and padding included."""

import csv
import json
import sys
import types
from copy import deepcopy

import pytest

from dora_dist.data.sources import without_padding
from tests.support.data import load, make_tokenizer, write_jsonl
from tests.unit.data.test_chats import ANSWERED, ASKED, CALL, TOOL_TEMPLATE, TOOLS, chat


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def tool_rows():
    other = {"name": "add", "arguments": {"x": 1, "y": [None, 2]}}
    return [
        chat(ASKED, {"role": "assistant", "content": None, "tool_calls": [deepcopy(CALL)]}, tools=TOOLS),
        chat(
            {"role": "system", "content": "speak"},
            ASKED,
            {
                "role": "assistant",
                "content": "let me see",
                "tool_calls": [{"type": "function", "function": other}],
            },
            tools=[
                {
                    "type": "function",
                    "function": {"name": "add", "parameters": {"properties": {"x": {"type": "int"}}}},
                }
            ],
        ),
        chat(ASKED, ANSWERED),
    ]


def same_tokens(one, other):
    assert one.ids.tolist() == other.ids.tolist()
    assert one.supervised.tolist() == other.supervised.tolist()


def test_rows_are_the_same_from_every_kind_of_file(tmp_path, tokenizer, monkeypatch):
    """A null that an author wrote into arguments is kept wherever they are JSON; elsewhere a table has lost it."""
    datasets = pytest.importorskip("datasets")
    rows = tool_rows()
    for row in rows[:1]:
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
    rows[1]["messages"][2]["tool_calls"][0]["function"]["arguments"] = json.dumps({"x": 1, "y": [None, 2]})
    expected = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    same_tokens(load(str(tmp_path / "a.json"), tokenizer), expected)
    table = datasets.Dataset.from_list([{"tools": None, **row} for row in rows])
    assert "'tool_calls': None" in str(table[0])  # there is padding to take away
    table.to_parquet(tmp_path / "a.parquet")
    same_tokens(load(str(tmp_path / "a.parquet"), tokenizer), expected)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["messages", "tools"])
        writer.writeheader()
        writer.writerows([{key: json.dumps(value) for key, value in row.items()} for row in rows])
    same_tokens(load(str(tmp_path / "a.csv"), tokenizer), expected)
    for hub in (table, table.to_iterable_dataset()):
        fake = types.SimpleNamespace(load_dataset=lambda *_, hub=hub, **__: hub)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        same_tokens(load("org/name", tokenizer), expected)


def test_json_columns_keep_their_nulls(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no JSON columns")
    rows = [{"tools": None, **row} for row in tool_rows()]
    expected = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    message = {
        "role": datasets.Value("string"),
        "content": datasets.Value("string"),
        "tool_calls": datasets.Json(),
    }
    features = datasets.Features({"messages": datasets.List(message), "tools": datasets.Json()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    same_tokens(load(str(tmp_path / "a.parquet"), tokenizer), expected)


def test_padding():
    class List:
        def __init__(self, feature):
            self.feature = feature

    json_column = object()
    value = [{"a": None, "b": {"c": None, "d": [None, {"e": None}]}, "f": {"g": None}}]
    feature = List({"a": "string", "b": {"c": "int", "d": List({"e": "int"})}, "f": json_column})
    cleaned = [{"b": {"d": [None, {}]}, "f": {"g": None}}]
    assert without_padding(value, feature) == cleaned
    assert without_padding(value, None) == [{"b": {"d": [None, {}]}, "f": {}}]  # of unknown type, all are objects
