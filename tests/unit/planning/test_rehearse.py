"""A rehearsal holds and sends what a real run does, and short models tell of deep ones."""

import gc
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from dora_dist.config import (
    DataConfig,
    DoraConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dora_dist.data.batches import GlobalBatch
from dora_dist.errors import RunFailed, UserError
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.planning import rehearse as rehearsals
from dora_dist.planning.cost import step_time
from dora_dist.planning.hardware import find_cluster
from dora_dist.planning.rehearse import Job
from dora_dist.planning.stand_ins import Watch
from dora_dist.planning.trace import COPY_IN, Tracer
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer
from tests.support.models import llama_config
from tests.support.small import small_config

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def write(directory, **sizes):
    llama_config(head_dim=None, **sizes).save_pretrained(directory)
    return directory


def config_of(model, strategy="single", rows=1, length=64, four_bit=False, **more):
    parallel = {key: more.pop(key) for key in ("replicas", "cpu_offload", "force") if key in more}
    return RunConfig(
        model=ModelConfig(path=str(model), init="random", dtype=more.pop("dtype", "float32")),
        dora=DoraConfig(targets="all-linear"),
        quant=QuantConfig(scheme="nf4" if four_bit else "none"),
        data=DataConfig(train="none", seq_len=length, packing=more.pop("packing", False)),
        train=TrainConfig(steps=2, micro_batch_size=rows, **more),
        parallel=ParallelConfig(strategy=strategy, **parallel),
    )


def allocated(config, steps):
    """The most that torch's CPU allocator holds in the steps of a real run, by the profiler's account."""
    processes = Processes()
    blueprint = make_blueprint(config, Path(config.model.path))
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    rows, length = config.train.micro_batch_size, config.data.seq_len
    ids = torch.zeros(rows, length, dtype=torch.long)
    gc.collect()  # what earlier tests left would be freed in the middle
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        built = build_to_train(blueprint, strategy)
        trainer = Trainer(built, config.model, config.train, config.data.packing, steps)
        with torch.profiler.record_function("steps begin"):
            pass
        for _ in range(steps):
            micro_batches = [{"input_ids": ids, "targets": ids}] * config.train.accumulation
            trainer.train_step(GlobalBatch(micro_batches, rows * length, rows * length))
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = most = 0
    began = False
    for event in events:
        began |= event.name() == "steps begin"
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live if began else 0)
    return most


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"activation_checkpointing": True, "rows": 2}, marks=pytest.mark.slow),
        pytest.param({"four_bit": True, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"four_bit": True, "dtype": "bfloat16", "activation_checkpointing": True},
        {"dtype": "bfloat16", "accumulation": 2},
    ],
    ids=str,
)
def test_a_rehearsal_holds_what_a_real_run_does(settings, tmp_path, rehearse):
    """One process, to 5 %; benchmarks/planning/plan_memory.py has several, whose gloo holds more."""
    model = write(tmp_path, num_hidden_layers=3, vocab_size=512, **SIZES)
    config = config_of(model, length=128, **settings)
    planned = rehearse(Job(config, model, 1, 1, gpu=False)).peak(loading=False)
    assert planned == pytest.approx(allocated(config, 2), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"four_bit": True, "dtype": "bfloat16"}], ids=str)
def test_a_rehearsal_of_experts_holds_what_a_real_run_does(settings, tmp_path, rehearse):
    """Balanced routing is assumed; what a real router makes of random weights strays from it."""
    Qwen3MoeConfig(
        **SIZES, vocab_size=512, num_hidden_layers=3, head_dim=32, num_experts=16, num_experts_per_tok=2,
        moe_intermediate_size=96, pad_token_id=0,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = config_of(tmp_path, length=128, **settings)
    planned = rehearse(Job(config, tmp_path, 1, 1, gpu=False)).peak(loading=False)
    assert planned == pytest.approx(allocated(config, 2), rel=0.06)


@pytest.mark.slow
def test_one_expert_stands_for_all_that_have_tokens(tmp_path, rehearse):
    """A step's time, products and bytes are those of all 12 gone through one by one, 8 tokens each."""
    Qwen3MoeConfig(
        **SIZES, vocab_size=64, num_hidden_layers=1, head_dim=32, num_experts=12, num_experts_per_tok=2,
        moe_intermediate_size=96, pad_token_id=0,
    ).save_pretrained(tmp_path)  # fmt: skip
    job = Job(config_of(tmp_path, length=48, dtype="bfloat16", four_bit=True), tmp_path, 1, 1)
    short, whole = rehearse(job), rehearse(replace(job, every_piece=True))
    cluster = find_cluster("h100", 1)
    assert len(short.runs[0].calls) < 0.9 * len(whole.runs[0].calls)
    for measure in ("flops", "bytes"):
        found, counted = (
            {phase: sum(c.times * getattr(c, measure) for c in run.calls if c.phase is phase) for phase in Phase}
            for run in (short.runs[0], whole.runs[0])
        )
        assert found == counted, measure
    assert step_time(short, cluster).phases == pytest.approx(step_time(whole, cluster).phases, rel=0.01)
    assert short.peak() == pytest.approx(whole.peak(), rel=0.05)


@pytest.mark.parametrize(
    ("strategy", "world"),
    [("single", 1), ("fsdp", 4), *(pytest.param(f"zero{n}", 4, marks=pytest.mark.slow) for n in (2, 3))],
)
def test_two_short_models_tell_of_a_deep_one(strategy, world, tmp_path, rehearse):
    model = write(tmp_path, num_hidden_layers=7, vocab_size=512, **SIZES)
    job = Job(config_of(model, strategy, activation_checkpointing=True), model, world, 2)
    cluster = find_cluster("h100", world, max(1, world // 2))
    short = rehearse(job)
    whole = rehearse(replace(job, blocks=7))
    assert len(short.runs) == 2 and [run.blocks for run in whole.runs] == [7]
    assert short.strategy == whole.strategy == strategy
    buckets = strategy == "zero2"  # their sizes are no straight line
    for loading in (True, False):
        assert short.peak(loading=loading) == pytest.approx(
            whole.peak(loading=loading), rel=0.03 if buckets else 0.002
        )
    drawn, counted = step_time(short, cluster), step_time(whole, cluster)
    assert drawn.messages == pytest.approx(counted.messages)
    assert drawn.sent == pytest.approx(counted.sent)
    assert drawn.total == pytest.approx(counted.total, rel=0.03 if buckets else 0.01)


@pytest.mark.slow
def test_a_few_other_blocks_may_come_first(tmp_path, rehearse):
    """DeepSeek's first blocks have no experts."""
    config = small_config("deepseek_v3", layers=9)
    config.first_k_dense_replace, config.num_key_value_heads = 2, config.num_attention_heads
    config.save_pretrained(tmp_path)
    job = Job(config_of(tmp_path, "fsdp", activation_checkpointing=True), tmp_path, 4, 4)
    short, whole = rehearse(job), rehearse(replace(job, blocks=9))
    assert [run.blocks for run in short.runs] == [5, 6] and [run.blocks for run in whole.runs] == [9]
    assert short.experts and short.peak() == pytest.approx(whole.peak(), rel=0.002)
    cluster = find_cluster("h100", 4)
    assert step_time(short, cluster).sent == pytest.approx(step_time(whole, cluster).sent)


def test_auto_is_decided_by_the_whole_model(tmp_path, rehearse):
    """A short version of it would fit each GPU."""
    model = write(tmp_path, num_hidden_layers=7, vocab_size=64, **SIZES)
    config = config_of(model, "auto")
    weights = sum(t.nbytes for t in base_tensors(make_blueprint(config, model).model).values())
    found = rehearse(Job(config, model, 2, 2, device_memory=1.5 * weights))
    assert "more than half" in found.reason
    assert found.strategy == "fsdp" and [run.strategy for run in found.runs] == ["fsdp", "fsdp"]


def test_what_fsdp_sends_is_what_the_sizes_say(tmp_path, rehearse):
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    found = rehearse(Job(config_of(model, "fsdp"), model, 2, 2))
    step = step_time(found, find_cluster("h100", 2))
    H, M, V, R = SIZES["hidden_size"], SIZES["intermediate_size"], 512, 16
    kv = H // 2
    linears = [(H, H), (kv, H), (kv, H), (H, H), (M, H), (M, H), (H, M)]
    trained = 4 * sum(R * i + o * R + o for o, i in linears)
    block = 4 * sum(o * i for o, i in linears) + trained + 4 * 2 * H
    assert (
        step.sent[Phase.FORWARD, "all_gather"] == 2 * block + 2 * 4 * V * H + 4 * H
    )  # and both embeddings, and the norm
    copied = sum(call.bytes for call in found.runs[0].calls if (call.phase, call.name) == (Phase.FORWARD, COPY_IN))
    assert copied == step.sent[Phase.FORWARD, "all_gather"]  # this rank's half of it, read and written
    assert step.sent[Phase.BACKWARD, "all_gather"] == 2 * block
    assert step.sent[Phase.BACKWARD, "reduce_scatter"] == 2 * trained
    assert step.sent[Phase.NORMS, "all_reduce"] == 2 * 4 * sum(o for o, _ in linears)
    assert step.sent[Phase.NORMS, "all_gather"] == 2 * 4 * sum(R * i for _, i in linears)


def test_norms_of_8b_at_1024_ranks_are_two_collectives_and_a_thousandth_of_the_bytes(tmp_path, rehearse):
    """A step of four rows of 4096 tokens a GPU, one at a time. Without accumulation the same bytes are 0.2 %."""
    model = write(tmp_path, **SHAPE_8B)
    config = config_of(model, "fsdp", length=4096, accumulation=4, dtype="bfloat16", activation_checkpointing=True)
    step = step_time(rehearse(Job(config, model, 1024, 8)), find_cluster("h100", 1024, 128))
    norms = {kind: count for (phase, kind), count in step.messages.items() if phase == Phase.NORMS}
    assert sum(norms.values()) == pytest.approx(2)
    sent = sum(size for (phase, _), size in step.sent.items() if phase == Phase.NORMS)
    assert sent <= 0.001 * sum(step.sent.values())


def test_hybrid_sharding_stays_inside_machines(tmp_path, rehearse):
    """Weights and norms in groups of neighbours; only gradients cross."""
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    found = rehearse(Job(config_of(model, "fsdp", replicas=4), model, 8, 2))
    for call in found.runs[0].calls:
        if call.collective is not None and call.phase in (Phase.FORWARD, Phase.NORMS):
            assert (call.collective.ranks, call.collective.stride) == (2, 1)
    across = [c.collective for c in found.runs[0].calls if c.collective and c.collective.stride == 2]
    assert {c.kind for c in across} == {"all_reduce"} and {c.ranks for c in across} == {4}


def test_offloaded_weights_are_the_hosts(tmp_path, rehearse):
    model = write(tmp_path, num_hidden_layers=3, vocab_size=512, **SIZES)
    held = rehearse(Job(config_of(model, "fsdp", cpu_offload=True, dtype="bfloat16"), model, 2, 2)).peaks()
    on_host, on_gpu = held[Phase.NORMS, True], held[Phase.NORMS, False]
    assert "base weights" not in on_gpu and on_host["host: base weights"] > 0
    assert on_host["host: optimizer states"] > 0


def test_loading_holds_rows_of_files_on_the_host(tmp_path, rehearse):
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    held = rehearse(Job(config_of(model), model, 1, 1)).peaks()
    assert json.dumps(sorted(held[Phase.LOADING, True])) == '["host: rows of files"]'
    assert 0 < held[Phase.LOADING, True]["host: rows of files"] <= 2 * 4 * 512 * SIZES["hidden_size"]


def test_mistakes_are_told_as_in_training(tmp_path, rehearse):
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    config = config_of(model, "fsdp", replicas=3)
    with pytest.raises(UserError, match="replicas: 3"):
        rehearse(Job(config, model, 4, 4))
    wrong = replace(config, dora=DoraConfig(targets=["nothing"]))
    with pytest.raises(UserError, match="nothing"):
        rehearse(Job(wrong, model, 4, 4))


def test_attention_is_counted_once_and_causal(tmp_path, rehearse):
    """Packed rows of one document each and plain ones do the same arithmetic: half of all pairs of tokens."""
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    found = {}
    for packing in (False, True):
        config = config_of(model, rows=2, length=64, dtype="bfloat16", packing=packing)
        calls = rehearse(Job(config, model, 1, 1)).runs[0].calls
        found[packing] = sum(c.flops for c in calls if "attention" in c.name or "attn" in c.name)
    pairs, layers = 2 * 64 * 64 / 2, 2
    assert found[False] == found[True] == layers * 2 * (2 + 5) * pairs * SIZES["hidden_size"]


def test_an_adapter_to_go_on_from_changes_nothing(tmp_path, rehearse):
    model = write(tmp_path / "model", num_hidden_layers=7, vocab_size=512, **SIZES)
    config = config_of(model)
    plain = rehearse(Job(config, model, 1, 1)).peak()
    (tmp_path / "adapter").mkdir()
    going_on = replace(config, dora=replace(config.dora, init_from=str(tmp_path / "adapter")))
    assert rehearse(Job(going_on, model, 1, 1)).peak() == plain


@pytest.mark.parametrize(("strategy", "on_gpu"), [("zero2", True), ("zero3", False)])
def test_zero_offloads_states_and_only_stage_3_the_weights(strategy, on_gpu, tmp_path, rehearse):
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    config = config_of(model, strategy, cpu_offload=True, dtype="bfloat16")
    held = rehearse(Job(config, model, 2, 2)).peaks()[Phase.NORMS, False]
    assert ("base weights" in held) == on_gpu


def test_a_phase_that_a_rehearsal_does_not_know_is_no_other():
    tracer = Tracer(lambda func, args, kwargs: None)
    watch = Watch(tracer, offloaded="")
    for phase, micro in ((Phase.FORWARD, 2), (Phase.BACKWARD, 2), (Phase.STEP, 0), (Phase.NORMS, 0)):
        watch.at(1, phase, micro)
        assert (tracer.phase, tracer.micro) == (phase, micro)
    with pytest.raises(KeyError):
        watch.at(1, Phase.LOG)


def dies(_):
    os.kill(os.getpid(), signal.SIGKILL)


def is_orphaned(_):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize("killed", [dies, is_orphaned])
def test_a_killed_rehearsal_does_not_hang(killed, tmp_path, monkeypatch):
    model = write(tmp_path, num_hidden_layers=2, vocab_size=512, **SIZES)
    monkeypatch.setattr(rehearsals, "_in_child", killed)
    with rehearsals.Rehearsals() as own, pytest.raises(RunFailed, match="was killed"):
        own(Job(config_of(model), model, 1, 1))
