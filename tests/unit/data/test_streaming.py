"""A stream's global batches are the same whatever the number of ranks, each of which encodes about its share."""

import gc
import threading
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from dora_dist.config import DataConfig
from dora_dist.data.batches import Collate, Split
from dora_dist.data.encode import Encoder
from dora_dist.data.sources import find_source
from dora_dist.data.streaming import StreamPlan, Worker
from dora_dist.data.windows import Told, units_of
from dora_dist.errors import RunFailed, UserError
from tests.support.data import SEQ_LEN, make_tokenizer, write_jsonl
from tests.unit.data.test_batches import contents

BAD = {"prompt": "a"}


def stream(
    path, rank=0, *, micro_batch_size=5, accumulation=1, world_size=1, packing=False, seq_len=SEQ_LEN,
    on_bad_row="skip", **own,
):  # fmt: skip
    config = DataConfig(train=path, on_bad_row=on_bad_row, seq_len=seq_len)
    split = Split(micro_batch_size, accumulation, rank, world_size)
    encoder, collate = Encoder(config, make_tokenizer()), Collate(seq_len, 0, packing)
    return StreamPlan(find_source(path, streaming=True), encoder, split, collate, 0, **own)


def test_parts_of_long_rows_are_shuffled_among_the_others():
    told = [Told([7] * 8, [6] * 8) for _ in range(4)]
    units = units_of(told, np.random.default_rng(0), None)
    rows = [row for unit in units for row, _ in unit.parts]
    assert sorted(rows) == sorted([*range(4)] * 8)
    assert sum(a == b for a, b in pairwise(rows)) < 16  # 28 where each row's follow each other, 7 by chance


def together(ranks, work, patience=20):
    """`work(rank, exchange)` on threads that stand for ranks; what each returned or raised."""
    meeting, parts, done = threading.Barrier(ranks, timeout=patience), [b""] * ranks, [None] * ranks

    def run(rank):
        def exchange(data):
            parts[rank] = data
            meeting.wait()
            everyones = list(parts)
            meeting.wait()
            return everyones

        try:
            done[rank] = work(rank, exchange)
        except Exception as error:
            done[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def global_batches(path, steps, world=1, micro=10, accumulation=1, **changes):
    """Of each of the steps, the rows of all ranks in the order of the stream, and what every rank says of them."""

    def work(rank, exchange):
        split = {"micro_batch_size": micro, "accumulation": accumulation, "world_size": world}
        plan = stream(path, rank, exchange=exchange, **split, **changes)
        return [plan.global_batch(step) for step in steps], plan.report, plan.news()

    ranks = together(world, work)
    for problem in ranks:
        if isinstance(problem, Exception):
            raise problem
    assert len({(str(report), tuple(news)) for _, report, news in ranks}) == 1
    batches = []
    for of_ranks in zip(*(made for made, _, _ in ranks), strict=True):
        told = {(batch.targets, batch.tokens) for batch in of_ranks}
        rows = [row for a in range(accumulation) for b in of_ranks for row in contents(b.micro_batches[a])]
        assert told == {(sum(t != -100 for _, ts in rows for t in ts), sum(len(ids) for ids, _ in rows))}
        batches.append(rows)
    return batches, ranks[0][1]


@pytest.mark.parametrize("shuffle_rows", [1, 7, 10_000])
def test_a_pass_of_a_stream_holds_every_row_once(path, examples, shuffle_rows):
    everything = Counter(tuple(example.ids.tolist()) for example in examples)
    batches, report = global_batches(path, range(10), world=2, micro=5, shuffle_rows=shuffle_rows)
    orders = [[ids for batch in some for ids, _ in batch] for some in (batches[:5], batches[5:])]
    assert [Counter(order) for order in orders] == [everything, everything]
    assert shuffle_rows == 1 or orders[0] != orders[1]
    assert orders[0] != [tuple(example.ids.tolist()) for example in examples] or shuffle_rows == 1
    assert (report.rows_read, report.supervised_tokens) == (50, examples.report.supervised_tokens)


def rows_of(kind):
    """Rows that make one example each; also none; also several."""
    good = [{"prompt": f"{i}:", "completion": "fox " * (i % 9)} for i in range(40)]
    if kind == "bad rows":
        return [BAD if i % 6 == 4 else row for i, row in enumerate(good)]
    if kind == "long texts":
        return [{"text": f"{i} " + "the lazy dog " * (i * 7 % 31)} for i in range(40)]
    return good


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["one each", "bad rows", "long texts"])
def test_global_batches_are_the_same_however_they_are_split(tmp_path, kind, packing):
    path = write_jsonl(tmp_path / "train.jsonl", rows_of(kind))
    settings = {"packing": packing, "shuffle_rows": 17}
    alone, report = global_batches(path, range(8), **settings, micro=12)
    assert report.rows_skipped == (6 if kind == "bad rows" else 0)
    for world, micro, accumulation in ((2, 3, 2), (3, 4, 1), (4, 1, 3)):
        split = {"world": world, "micro": micro, "accumulation": accumulation}
        assert global_batches(path, range(8), **settings, **split)[0] == alone
        assert global_batches(path, [5, 7], **settings, **split)[0] == [alone[5], alone[7]]  # resumed at 5


def test_a_stream_only_goes_forward(path):
    plan = stream(path)
    plan.global_batch(7)
    with pytest.raises(ValueError, match="a stream only goes forward: step 7 was asked for after 7"):
        plan.global_batch(7)


def test_a_stream_packs(path):
    plan = stream(path, packing=True, micro_batch_size=4)
    batch = plan.global_batch(0)
    micro = batch.micro_batches[0]
    assert micro["document_lengths"].sum() == batch.tokens
    assert batch.targets == int((micro["targets"] != -100).sum())
    assert int((micro["position_ids"] == 0).sum()) > 4  # several documents in a pack


@pytest.mark.parametrize(("kind", "most"), [("one each", 1.0), ("bad rows", 1.9), ("packed", 1.9)])
def test_each_rank_encodes_its_share(tmp_path, monkeypatch, kind, most):
    """Rows that make one example each are encoded once among the ranks; others at most twice."""
    path = write_jsonl(tmp_path / "train.jsonl", rows_of(kind))
    counts = Counter()
    encode = Encoder.encode_chunk

    def counting(self, rows):
        counts[id(self)] += len(rows)
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode_chunk", counting)

    def work(rank, exchange):
        plan = stream(path, rank, exchange=exchange, world_size=4, micro_batch_size=1, packing=kind == "packed")
        plan.global_batch(0)
        plan._coming.result(20)  # the second pass, read ahead, after what the first one lacked

    assert together(4, work) == [None] * 4
    assert len(counts) == 4
    assert sum(counts.values()) <= 2 * 40 * most
    assert max(counts.values()) <= 2 * 10 * most * 1.3


def test_the_next_window_is_encoded_meanwhile(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "train.jsonl", rows_of("one each"))
    threads = set()
    encode = Encoder.encode_chunk
    monkeypatch.setattr(
        Encoder, "encode_chunk", lambda self, rows: (threads.add(threading.get_ident()), encode(self, rows))[1]
    )
    plan = stream(path)
    plan.start()
    plan._coming.result(20)  # before any batch is asked for
    plan.global_batch(0)
    plan._coming.result(20)  # the next one
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize("world", [1, 3])
def test_a_bad_row_ends_all_ranks_alike(tmp_path, world):
    rows = rows_of("one each")
    rows[5] = rows[30] = BAD
    path = write_jsonl(tmp_path / "train.jsonl", rows)

    def work(rank, exchange):
        stream(path, rank, exchange=exchange, world_size=world, on_bad_row="error").global_batch(0)

    told = {(type(error), str(error)) for error in together(world, work)}
    assert told == {
        (UserError, f"{path}:6: the field 'completion' is missing (found: 'prompt'); valid would be a string")
    }


def test_whatever_fails_on_one_rank_ends_all(path, monkeypatch):
    encode = Encoder.encode_chunk

    def failing(self, rows):
        if any(row.place.endswith(":8") for row in rows):
            raise OSError("no more room")
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode_chunk", failing)
    errors = together(
        2, lambda rank, exchange: stream(path, rank, exchange=exchange, world_size=2).global_batch(0)
    )
    assert sorted(type(error).__name__ for error in errors) == ["OSError", "RunFailed"]
    (told,) = (error for error in errors if isinstance(error, RunFailed))
    assert "cannot read the data: OSError: no more room" in str(told)


def test_a_stream_without_good_rows_ends(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", ["{", "["])
    with pytest.raises(UserError, match=r"all 2 rows are bad"):
        stream(path).global_batch(0)
    path = write_jsonl(tmp_path / "train.jsonl", [{**BAD, "completion": 1}] * 3)
    errors = together(
        2, lambda rank, exchange: stream(path, rank, exchange=exchange, world_size=2).global_batch(0)
    )
    assert ["all 3 rows are bad" in str(error) for error in errors] == [True, True]
    with pytest.raises(UserError, match="fit no format"):
        stream(write_jsonl(tmp_path / "train.jsonl", [{"question": "a"}])).global_batch(0)


def test_what_a_stream_tells(tmp_path):
    rows = [{**row, "id": i} for i, row in enumerate(rows_of("bad rows"))]
    plan = stream(write_jsonl(tmp_path / "train.jsonl", rows), shuffle_rows=20)
    plan.global_batch(0)
    assert plan.news() == ["data: not used: id"]
    assert plan.news(last=True)[0].startswith("data, as far as it was read: 20 rows read, 3 skipped")
    for step in range(1, 10):
        plan.global_batch(step)
    (line,) = plan.news(last=True)
    assert line.startswith("data, read once: 40 rows read, 6 skipped")
    assert f"skipped {tmp_path / 'train.jsonl'}:5: the field 'completion' is missing" in line


def test_a_worker_ends_with_its_owner():
    worker = Worker()
    ended, begun = worker.ended, threading.Event()

    def job():
        begun.set()
        while not ended.is_set():
            time.sleep(0.01)

    future, never = worker.do(job), worker.do(lambda: 1)
    begun.wait(20)
    del worker
    gc.collect()
    assert future.result(0) is None
    assert never.cancelled()


def test_a_worker_hands_on_what_its_jobs_raise():
    worker = Worker()
    with pytest.raises(ZeroDivisionError):
        worker.do(lambda: 1 / 0).result(20)
    assert worker.do(lambda: 7).result(20) == 7
