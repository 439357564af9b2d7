"""DeepSpeed's configuration is made from ours, and what contradicts it is refused by name."""

import sys

import pytest

from dora_dist.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dora_dist.errors import UserError
from dora_dist.parallel.deepspeed_config import Sizes, deepspeed_config
from dora_dist.parallel.process import Processes
from dora_dist.parallel.zero import Zero


def run_config(strategy: str = "zero3", cpu_offload: bool = False, **extra) -> RunConfig:
    return RunConfig(
        ModelConfig(path="m"),
        DataConfig(train="t"),
        train=TrainConfig(micro_batch_size=3, accumulation=5, max_grad_norm=0.5),
        parallel=ParallelConfig(strategy=strategy, cpu_offload=cpu_offload, deepspeed=extra),
    )


def made(**arguments) -> dict:
    sizes = Sizes(weight_bytes=0, block=1000, trained=100)
    config = run_config(**arguments)
    return deepspeed_config(config.parallel, config.train, sizes, world_size=4, on_gpu=False)


def test_our_settings_become_deepspeed_s():
    got = made()
    assert got["train_micro_batch_size_per_gpu"] == 3
    assert got["gradient_accumulation_steps"] == 5
    assert got["gradient_clipping"] == 0.5
    assert got["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "allgather_bucket_size": 100,
        "stage3_max_live_parameters": 2000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
    assert not {"bf16", "fp16"} & got.keys()  # they would round the magnitudes


@pytest.mark.parametrize(("strategy", "offloaded"), [("zero2", {"optimizer"}), ("zero3", {"optimizer", "param"})])
def test_cpu_offload(strategy, offloaded):
    zero = made(strategy=strategy, cpu_offload=True)["zero_optimization"]
    assert {key.removeprefix("offload_") for key in zero if key.startswith("offload_")} == offloaded
    assert all(zero[f"offload_{what}"]["device"] == "cpu" for what in offloaded)


def test_extra_keys_are_laid_over():
    got = made(
        cpu_offload=True,
        wall_clock_breakdown=True,
        gradient_accumulation_steps="auto",
        train_micro_batch_size_per_gpu=3,  # says the same
        train_batch_size=60,
        bf16={"enabled": False},
        fp16={"enabled": "auto", "loss_scale": 0},
        optimizer=None,
        zero_optimization={
            "stage3_prefetch_bucket_size": 9,
            "offload_param": {"pin_memory": True},
            "stage": 3.0,
            "cpu_offload": False,
        },
    )
    assert got["wall_clock_breakdown"] is True
    assert not {"bf16", "fp16", "optimizer", "train_batch_size"} & got.keys()
    assert got["gradient_accumulation_steps"] == 5
    assert got["zero_optimization"]["stage3_prefetch_bucket_size"] == 9
    assert got["zero_optimization"]["stage"].__class__ is int
    assert got["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu", "train.micro_batch_size"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps", "train.accumulation"]),
        ({"train_batch_size": 8}, ["train_batch_size", "train.accumulation"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "train.max_grad_norm"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "train.optimizer"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.schedule"]),
        ({"bf16": {"enabled": True}}, ["bf16", "model.dtype"]),
        ({"fp16": {"enabled": True}}, ["fp16", "model.dtype"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage", "parallel.strategy"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "parallel.cpu_offload"]),
        ({"zero_optimization": {"zero_quantized_weights": True}}, ["zero_quantized_weights", "norms"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device", "nvme", "cpu"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm", "reports"]),
        ({"zero_optimization": {"round_robin_gradients": True}}, ["round_robin_gradients", "masters"]),
        ({"zero_optimization": {"stage3_module_granularity_threshold": 5}}, ["granularity", "frozen"]),
        ({"zero_optimization": {"zero_hpz_partition_size": 3}}, ["zero_hpz_partition_size", "4 processes"]),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, ["zero_quantized_gradients", "GPUs"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio", "optimizer"]),
        ({"steps_per_print": 0}, ["steps_per_print", "communication_data_type"]),
        ({"zero_optimization": 3}, ["zero_optimization", "section"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean 'zero_optimization'"]),
    ],
)
def test_contradictions_name_both_keys(extra, words):
    with pytest.raises(UserError) as caught:
        made(**extra)
    assert str(caught.value).startswith("parallel.deepspeed.")
    for word in words:
        assert word in str(caught.value)


def test_offloading_that_contradicts_ours():
    with pytest.raises(UserError, match=r"offload_param.*parallel\.cpu_offload"):
        made(cpu_offload=True, zero_optimization={"offload_param": {"device": "none"}})
    for key, value in (("offload_param", {"device": "cpu"}), ("zero_hpz_partition_size", 2), ("stage3_x", 1)):
        with pytest.raises(UserError, match="only zero3"):
            made(strategy="zero1", zero_optimization={key: value})
    assert made(zero_optimization={"offload_optimizer": {"device": "cpu"}})  # a part of it alone


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"strategy": "fsdp", "deepspeed": {"dump_state": True}}, "parallel.deepspeed needs"),
        ({"strategy": "zero3", "replicas": 2}, "zero_hpz_partition_size"),
        ({"strategy": "ddp", "cpu_offload": True}, "zero3"),
        ({"strategy": "zero4"}, "zero3"),
    ],
)
def test_parallel_settings_that_do_not_go_together(settings, word):
    with pytest.raises(UserError, match=word):
        ParallelConfig(**settings)


@pytest.mark.parametrize("zero", [{"stage3_prefetch_bucket": 1}, {"overlap_comm": "perhaps"}])
def test_deepspeed_s_own_section_is_checked_before_the_run(zero):
    settings = made(zero_optimization=zero)
    with pytest.raises(UserError, match=rf"parallel\.deepspeed\.zero_optimization\.{next(iter(zero))}"):
        Zero(Processes(), settings)


def test_the_rest_is_checked_too():
    with pytest.raises(UserError, match=r"^parallel\.deepspeed: .*fp8"):
        Zero(Processes(), made(communication_data_type="fp8"))


def test_a_missing_deepspeed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"dora-dist\[deepspeed\]"):
        Zero(Processes(), made())
