"""Rows of many lengths, for the tests of batches and of streams, which must make the same of them."""

import pytest

from tests.support.data import SEQ_LEN, load, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows = [{"prompt": f"{i}:", "completion": "fox " * (i % 14)} for i in range(50)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def examples(path):
    return load(path, make_tokenizer(), seq_len=SEQ_LEN)
