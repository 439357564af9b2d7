"""Global batches do not depend on how they are shared out; packs are kept apart; streams hold every row."""

from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dora_dist.data.batches import BatchPlan, Collate, EvaluationBatches, Split
from dora_dist.data.formats import Labels
from dora_dist.data.packing import additive_mask, pack, packed_attention
from dora_dist.errors import UserError
from dora_dist.models.huggingface import check_model
from tests.support.data import SEQ_LEN, load, make_tokenizer, write_jsonl
from tests.support.rounding import MODEL, assert_near

SHAPE = {"seq_len": SEQ_LEN, "pad_id": 0}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    rows = [{"text": f"{i} fox", "label": i % 2} for i in range(10)]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
    return load(path, make_tokenizer(), Labels(2, {}))


def plan(examples, *, micro_batch_size=2, accumulation=2, rank=0, world_size=2, seed=3, **changes):
    split = Split(micro_batch_size, accumulation, rank, world_size)
    return BatchPlan(examples, split, Collate(**{**SHAPE, **changes}), seed)


def contents(batch):
    """Each row of a micro-batch as (ids, targets) without its padding."""
    rows = []
    for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
        length = max((i + 1 for i, token in enumerate(ids) if token != SHAPE["pad_id"]), default=0)
        assert set(targets[length:]) <= {-100}
        rows.append((tuple(ids[:length]), tuple(targets[:length])))
    return rows


def test_a_micro_batch(examples):
    batch = plan(examples).global_batch(0).micro_batches[0]
    assert set(batch) == {"input_ids", "targets"}
    rows = plan(examples).unit_rows(0)[:2]
    longest = max(len(examples[row].ids) for (row,) in rows)
    assert batch["input_ids"].shape == (2, min(-(-longest // 8) * 8, SEQ_LEN))
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
    for (row,), (ids, targets) in zip(rows, contents(batch), strict=True):
        example = examples[row]
        assert list(ids) == example.ids.tolist()
        expected = [int(i) if s else -100 for i, s in zip(example.ids[1:], example.supervised[1:], strict=True)]
        assert list(targets) == [*expected, -100]


def test_a_first_token_is_no_target_and_not_counted_as_one(path):
    examples = load(path, make_tokenizer(), seq_len=SEQ_LEN, loss_on="all")
    batch = plan(examples, world_size=1).global_batch(0)
    assert all(examples[row].supervised[0] for row in range(len(examples)))
    assert batch.targets == sum(int((micro["targets"] != -100).sum()) for micro in batch.micro_batches)


def test_longest_row_is_not_padded_beyond_seq_len(examples):
    widths = {b["input_ids"].shape[1] for b in evaluation(examples)}
    assert max(widths) == SEQ_LEN
    assert all(w % 8 == 0 or w == SEQ_LEN for w in widths)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("step", [0, 6, 100])
def test_global_batches_are_the_same_however_they_are_split(examples, packing, step):
    seen = []
    for micro, accumulation, world in ((2, 2, 2), (1, 1, 8), (1, 8, 1), (8, 1, 1), (2, 1, 4)):
        shape = {"micro_batch_size": micro, "accumulation": accumulation, "world_size": world}
        batches = [plan(examples, rank=r, packing=packing, **shape).global_batch(step) for r in range(world)]
        micro_batches = [[contents(m) for m in b.micro_batches] for b in batches]
        assert all(len(b) == accumulation and all(len(m) == micro for m in b) for b in micro_batches)
        in_order = [row for a in range(accumulation) for b in micro_batches for row in b[a]]
        targets = sum(int((m["targets"] != -100).sum()) for b in batches for m in b.micro_batches)
        tokens = sum(len(ids) for ids, _ in in_order)
        assert {(b.targets, b.tokens) for b in batches} == {(targets, tokens)}
        seen.append((in_order, targets))
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_hold_every_row_once_in_changing_order(examples, packing):
    stream = plan(examples, packing=packing, micro_batch_size=1, accumulation=1)
    units = [tuple(unit) for step in range(200) for unit in stream.unit_rows(step)]
    count = round(stream.steps_per_epoch * 2)
    first, second = units[:count], units[count : 2 * count]
    for epoch in (first, second):
        assert sorted(row for unit in epoch for row in unit) == list(range(len(examples)))
    assert first != second
    assert stream.rows == len(examples)
    assert plan(examples, packing=packing, seed=4).unit_rows(0) != plan(examples, packing=packing).unit_rows(0)


def test_global_batches_straddle_epochs(examples):
    stream = plan(examples)
    assert stream.steps_per_epoch == 50 / 8
    rows = [row for step in range(25) for (row,) in stream.unit_rows(step)]
    assert Counter(rows) == dict.fromkeys(range(50), 4)
    assert stream.unit_rows(3) == plan(examples).unit_rows(3)  # asked for alone, as a resumed run does


def test_too_few_rows(examples):
    message = (
        r"there are 50 rows, but one step takes 64: train.micro_batch_size 2 x train.accumulation 16 x 2 proc"
    )
    with pytest.raises(UserError, match=message):
        plan(examples, accumulation=16)
    with pytest.raises(UserError, match=r"50 rows make \d+ packs, but one step takes 64"):
        plan(examples, accumulation=16, packing=True)


def test_classification(labelled):
    settings = {"seq_len": 64, "causal": False}
    batch = plan(labelled, **settings).global_batch(0)
    assert batch.targets == 8
    micro = batch.micro_batches[1]
    assert set(micro) == {"input_ids", "attention_mask", "labels"}
    assert micro["labels"].shape == (2,)
    for i, row in enumerate(plan(labelled, **settings).unit_rows(0)[4:6]):
        kept = micro["attention_mask"][i].bool()
        assert micro["input_ids"][i][kept].tolist() == labelled[row[0]].ids.tolist()
        assert micro["labels"][i] == labelled[row[0]].label


def evaluation(examples, rank=0, world_size=1, size=4, **changes):
    split = Split(size, 3, rank, world_size)
    return EvaluationBatches(examples, split, Collate(**{**SHAPE, **changes}))


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (3, 7), (8, 1), (64, 2)])
def test_evaluation_covers_every_row_once_in_lockstep(examples, world, size):
    passes = [evaluation(examples, rank, world, size) for rank in range(world)]
    assert len({len(list(p)) for p in passes}) == 1
    batches = [batch for p in passes for batch in p]
    assert sum(int((b["targets"] != -100).sum()) for b in batches) == passes[-1].targets
    rows = Counter(ids for b in batches for ids, _ in contents(b) if ids)
    assert rows == Counter(tuple(example.ids.tolist()) for example in examples)


def test_evaluation_of_labels(labelled):
    batches = [b for rank in range(4) for b in evaluation(labelled, rank, 4, 3, causal=False)]
    labels = [label for b in batches for label in b["labels"].tolist()]
    assert [label for label in labels if label != -100] == labelled.labels.tolist()
    assert all(b["attention_mask"].any(dim=1).all() for b in batches)  # pooling needs a token, of dummies too


def test_pack():
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 101, size=2000)
    packs = pack(lengths, 100)
    assert sorted(row for rows in packs for row in rows) == list(range(2000))
    sums = [sum(int(lengths[row]) for row in rows) for rows in packs]
    assert max(sums) <= 100
    assert len(packs) <= 1.02 * lengths.sum() / 100 + 1
    assert packs == pack(lengths.tolist(), 100)
    assert pack([], 8) == []
    assert pack([5, 3, 8, 4], 8) == [[2], [0, 1], [3]]
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a pack of 8"):
        pack([9], 8)


def test_packed_attention():
    mask = packed_attention(torch.tensor([[2, 1, 0], [1, 1, 3]]), 5)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == expected
    assert mask[1, 0, 2:, 2:].equal(torch.ones(3, 3, dtype=torch.bool).tril())
    assert mask.shape == (2, 1, 5, 5)


def test_packed_positions_and_targets(examples):
    stream = plan(examples, packing=True)
    units, batch = stream.unit_rows(0), stream.global_batch(0).micro_batches[0]
    assert any(len(unit) > 1 for unit in units[:2])
    for b, unit in enumerate(units[:2]):
        lengths = [len(examples[row].ids) for row in unit]
        assert batch["position_ids"][b, : sum(lengths)].tolist() == [p for n in lengths for p in range(n)]
        assert [n for n in batch["document_lengths"][b].tolist() if n] == lengths
        ends = np.cumsum(lengths) - 1
        assert set(batch["targets"][b, ends].tolist()) == {-100}  # none predicts the next document's first token


TINY = {"vocab_size": 340, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda attention: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation=attention, **TINY,
        )
    ),
    "gpt2": lambda attention: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention, **TINY)
    ),
}  # fmt: skip


def token_losses(model, batch, row):
    batch = {name: value[row : row + 1] for name, value in batch.items()}
    targets = batch.pop("targets")[0]
    with torch.no_grad():
        logits = model(**batch).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    return losses[targets != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_losses_equal_those_of_single_rows(examples, name, attention):
    torch.manual_seed(0)
    model = MODELS[name](attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention that matters
    stream = plan(examples, packing=True)
    single = list(evaluation(examples, size=1))
    compared = 0
    batch = stream.global_batch(0).micro_batches[0]
    batch["attention_mask"] = packed_attention(batch.pop("document_lengths"), batch["input_ids"].shape[1])
    if attention == "eager":
        batch["attention_mask"] = additive_mask(batch["attention_mask"], torch.float32)
    for row, unit in enumerate(stream.unit_rows(0)[:2]):
        packed = token_losses(model, batch, row)
        expected = torch.cat([token_losses(model, single[number], 0) for number in unit])
        assert_near(packed, expected, MODEL)
        compared += len(unit)
    assert compared > 2


@pytest.mark.parametrize("name", ["Qwen3Next", "Bamba"])  # with and without `layer_types`
def test_recurrent_models_refuse_packing(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, mamba_n_heads=2, mamba_d_head=32, mamba_n_groups=1, num_experts=2,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(UserError, match=f"data.packing: {name}ForCausalLM keeps a state from token to token"):
        check_model(model, "causal_lm", packing=True, checkpointing=False)
