"""Rows of preferences: the texts, what of them is learned, units and batches."""

import numpy as np
import pytest

from dora_dist.config import DataConfig
from dora_dist.data.batches import BatchPlan, Collate, EvaluationBatches, Split
from dora_dist.data.encode import Encoder
from dora_dist.data.sources import find_source
from dora_dist.data.streaming import StreamPlan
from dora_dist.errors import UserError
from tests.support.data import learnt, load, make_tokenizer, whole, write_jsonl

ASKED = {"role": "user", "content": "the capital?"}
GOOD, BAD = {"role": "assistant", "content": "paris"}, {"role": "assistant", "content": "rome"}


def pairs(tmp_path, *rows, **settings):
    return load(write_jsonl(tmp_path / "a.jsonl", list(rows)), needed="preference", **settings)


TEXTS = [
    {"prompt": "the fox:", "chosen": " jumps", "rejected": " sleeps"},
    {"chosen": "the fox: jumps", "rejected": "the fox: sleeps"},
    {"prompt": None, "chosen": "the fox: jumps", "rejected": "the fox: sleeps"},
]
CHATS = [
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "the capital?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "unread": 1},
]


@pytest.mark.parametrize("row", TEXTS)
def test_texts(tmp_path, row):
    tokenizer = make_tokenizer()
    examples = pairs(tmp_path, row)
    assert [whole(examples, i, tokenizer) for i in (0, 1)] == ["<s>the fox: jumps</s>", "<s>the fox: sleeps</s>"]
    assert [learnt(examples, i, tokenizer) for i in (0, 1)] == [" jumps</s>", " sleeps</s>"]
    assert "1 rows read" in str(examples.report)


@pytest.mark.parametrize("row", CHATS)
def test_chats(tmp_path, row):
    tokenizer = make_tokenizer()
    examples = pairs(tmp_path, row)
    assert [learnt(examples, i, tokenizer) for i in (0, 1)] == ["paris</s>\n", "rome</s>\n"]
    assert all(whole(examples, i, tokenizer).startswith("<s><|user|>\nthe capital?") for i in (0, 1))


def test_shared_turns_of_the_assistant_are_the_prompt(tmp_path):
    tokenizer = make_tokenizer()
    shared = [ASKED, GOOD, {"role": "user", "content": "and the fox?"}]
    examples = pairs(tmp_path, {"system": "speak", "chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    assert [learnt(examples, i, tokenizer) for i in (0, 1)] == ["paris</s>\n", "rome</s>\n"]
    assert whole(examples, 0, tokenizer).startswith("<s><|system|>\nspeak")


THINKING = (  # of Qwen3's kind: earlier turns are rendered otherwise
    "{% for m in messages %}{{ m['role'] }}: {{ 'hm ' if loop.last and m['role'] == 'assistant' else '' }}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: hm {% endif %}"
)
REFUSED = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the fields 'chosen' and 'rejected' are equal"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "the fields 'chosen' and 'rejected' are equal"),
    ({"prompt": "a", "chosen": "b", "rejected": "b</s>"}, "chosen and rejected have the same tokens;"),
    (
        {"prompt": "a", "chosen": "b" * 50, "rejected": "b" * 51},
        "chosen and rejected have the same tokens up to data.seq_len = 30",
    ),
    ({"prompt": "x" * 60, "chosen": "b", "rejected": "c"}, "the prompt's 61 tokens fill data.seq_len = 30"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "the field 'chosen' is empty"),
    (
        {"prompt": [ASKED], "chosen": [{**GOOD, "content": ""}], "rejected": [BAD]},
        "messages of the field 'chosen'",
    ),
    ({"chosen": [ASKED, GOOD], "rejected": "rome"}, "'chosen' is a list and the field 'rejected' is a string"),
    ({"prompt": "else", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "the field 'prompt' is a string, and"),
    ({"prompt": "a", "completion": "b", "label": True}, "'chosen' is missing .* need train.objective: kto"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, "none of the 1 assistant turns"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "kto_tag": True},
        "the field 'kto_tag' belongs to preference",
    ),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*{message}"):
        pairs(tmp_path, TEXTS[0], row, seq_len=30)
    skipped = pairs(tmp_path, TEXTS[0], row, seq_len=30, on_bad_row="skip")
    assert len(skipped) == 2 and skipped.report.rows_skipped == 1


def test_a_completion_that_one_text_cannot_show_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    row = {"prompt": [ASKED], "chosen": [GOOD, ASKED, GOOD], "rejected": [BAD]}
    with pytest.raises(UserError, match="shows the assistant's turns of the field 'chosen' in 2 texts"):
        pairs(tmp_path, row, tokenizer=tokenizer)


def test_labels(tmp_path):
    rows = [{"prompt": "a:", "completion": f" fox{i}", "label": label} for i, label in enumerate((True, False))]
    rows.append({"prompt": [ASKED], "completion": [GOOD], "label": True})
    tokenizer = make_tokenizer()
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows), needed="unpaired_preference")
    assert examples.labels.tolist() == [1, 0, 1]
    assert [learnt(examples, i, tokenizer) for i in range(3)] == [" fox0</s>", " fox1</s>", "paris</s>\n"]
    (tmp_path / "a.csv").write_text('prompt,completion,label\na,b,True\na,c,0\n"a",d,false\n')
    assert load(str(tmp_path / "a.csv"), needed="unpaired_preference").labels.tolist() == [1, 0, 0]


def rows_of(count):
    return [{"prompt": f"{i}:", "chosen": f" good {i}", "rejected": f" bad {i} {'x' * i}"} for i in range(count)]


def test_the_same_pairs_whatever_the_ranks_also_streamed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(10))
    examples, collate = load(path, needed="preference"), Collate(64, 0, pairs=True)

    def ids(batch):
        return [row[row != 0].tolist() for micro in batch.micro_batches for row in micro["input_ids"]]

    def told(plan_of, size, accumulation, world):
        plans = [plan_of(Split(size, accumulation, rank, world)) for rank in range(world)]
        batches = [plan.global_batch(0) for plan in plans]
        assert {batch.targets for batch in batches} == {size * accumulation * world}
        assert len({batch.tokens for batch in batches}) == 1
        return sorted(row for batch in batches for row in ids(batch)), ids(batches[0])

    def in_memory(split):
        return BatchPlan(examples, split, collate, 3)

    def stream(split):
        encoder = Encoder(DataConfig(train=path, seq_len=64), make_tokenizer(), needed="preference")
        exchange = (lambda data: [data]) if split.world_size == 1 else None
        return StreamPlan(find_source(path, streaming=True), encoder, split, collate, 3, exchange)

    all_rows, first = told(in_memory, 4, 1, 1)
    assert told(in_memory, 1, 2, 2)[0] == told(in_memory, 2, 1, 2)[0] == all_rows
    known = [examples[i].ids.tolist() for i in range(20)]
    for rows in (first, told(stream, 4, 1, 1)[1]):
        places = [known.index(row) for row in rows]
        assert [place % 2 for place in places] == [0, 1] * 4  # chosen and rejected in turn
        assert all(chosen + 1 == rejected for chosen, rejected in zip(places[::2], places[1::2], strict=True))


def test_kto_pairs_each_prompt_with_the_completion_before_it(tmp_path):
    rows = [{"prompt": f"{i}{i}:", "completion": f" it is {i}", "label": i % 2 == 0} for i in range(5)]
    tokenizer = make_tokenizer()
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows), needed="unpaired_preference")
    collate = Collate(64, 0, others=True)
    seen = []
    for rank in range(2):
        (micro,) = BatchPlan(examples, Split(2, 1, rank, 2), collate, 3).global_batch(0).micro_batches
        assert micro["labels"].tolist() == [int(text_of(ids, tokenizer)[0] in "024") for ids in micro["input_ids"]]
        seen += [
            (text_of(own, tokenizer), text_of(other, tokenizer), text_of(targets[targets != -100], tokenizer))
            for own, other, targets in zip(
                micro["input_ids"], micro["other_input_ids"], micro["other_targets"], strict=True
            )
        ]
    for (own, other, learned), (before, _, _) in zip(seen, [seen[-1], *seen], strict=False):
        completion = before[before.index(":") + 1 :]
        assert (other, learned) == (own[: own.index(":") + 1] + completion, completion)
    batches = list(EvaluationBatches(examples, Split(2, 1, 1, 2), collate))
    assert len(batches) == 2 and not np.any(batches[1]["other_targets"].numpy() != -100)  # 5 rows: none is left


def text_of(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
