"""Run under torchrun: dora_dist as a library, under someone else's deepspeed.initialize.

usage: library_zero.py STAGE MODEL_DIR OUT_DIR
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.common.collectives import Counter
from dora_dist import (
    DoraConfig,
    UserError,
    attach_norm_refresh,
    inject_dora,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from dora_dist.cli import leave
from dora_dist.dora.norm_cache import dora_layers, find_shards, refresh_norms
from dora_dist.parallel.engine import LossScale
from dora_dist.parallel.process import Processes
from dora_dist.parallel.zero import ZeroEngine, import_deepspeed
from tests.ranks.library_fsdp import IDS, check_whole_models, model_from
from tests.support.rounding import MODEL, TRAINED, assert_near, rounding

RELEASE = {
    f"stage3_{key}": 0
    for key in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
}
SHAPES = [(37, 53), (53, 5), (5, 3), (3, 7), (7, 1), (1, 1), (1, 6), (6, 8)]  # chained: in x out


class Odd(nn.Module):
    """Layers whose flattened weights the ranks split inside rows, some smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(*shape) for shape in SHAPES)
        with torch.no_grad():
            self.layers[0].weight[3:9] = 0
            self.layers[1].weight[:, 2:7] = 0

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum()


def start(deepspeed, model: nn.Module, stage: int, zero: dict | None = None, **more):
    """(engine, torch optimizer) under ZeRO; by default ZeRO-3 keeps nothing gathered."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    section = {"stage": stage, **((RELEASE if stage == 3 else {}) if zero is None else zero)}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": section, **more}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def step(engine, scale: float = 1.0) -> float:
    loss = engine(input_ids=IDS, labels=IDS).loss
    engine.backward(loss * scale)
    engine.step()
    return loss.item()


def train_plain(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_odd_shapes(deepspeed, stage: int) -> None:
    for axis in ("out", "in"):
        config = DoraConfig(rank=1, alpha=3, targets="all-linear", magnitude_axis=axis)
        engine, _ = start(deepspeed, inject_dora(Odd(), config), stage)
        attach_norm_refresh(engine.module, engine)
        for _ in range(3):
            engine.backward(engine(torch.linspace(-1, 1, 37)[None]))
            engine.step()
        shards = find_shards(engine.module)
        for layer in dora_layers(engine.module).values():
            W, A, B = (t.double() for t in shards.gather([layer.weight, layer.lora_A, layer.lora_B]))
            want = (W + layer.spec.scaling * (B @ A)).norm(dim=1 if axis == "out" else 0)
            assert_near(layer.norm, want, MODEL)


def check_collectives(engine) -> None:
    """The refresh is one gather of A (and of B where ranks split its rows) and one sum; the step beside it gathers
    nothing, so no base weight moves outside forward and backward."""
    with Counter() as refresh:
        refresh_norms(engine.module)
    shards = find_shards(engine.module)
    layers = dora_layers(engine.module).values()
    factors = [layer.lora_A for layer in layers if layer.lora_A is not None]
    factors += [
        layer.lora_B for layer in layers
        if layer.lora_B is not None and (layer.transposed or layer.out_features % shards.size)
    ]  # fmt: skip
    gathered = sum(shards.size * -(-shards.shape(p).numel() // shards.size) for p in factors)
    assert refresh.by_collective() == {
        "all_gather": {"count": 1, "bytes": 4 * gathered},
        "all_reduce": {"count": 1, "bytes": 4 * sum(layer.norm.numel() for layer in layers)},
    }
    engine.backward(engine(input_ids=IDS, labels=IDS).loss)
    with Counter() as sent:
        engine.step()
    counts = sent.by_collective()
    assert counts["all_gather"]["count"] == 1 and "broadcast" not in counts, counts  # the refresh's, of A


def check_steps(engine) -> None:
    """One refresh a true step: none between micro-batches, none for a step that overflowed."""
    layers = list(dora_layers(engine.module).values())
    calls = []
    layers[0].renew_norm = lambda norm: calls.append(norm) or type(layers[0]).renew_norm(layers[0], norm)
    for boundary, scale, refreshes in ((False, 1, 0), (True, 1, 1), (True, float("inf"), 1), (True, 1, 2)):
        engine.set_gradient_accumulation_boundary(boundary)
        step(engine, scale)
        assert len(calls) == refreshes, (boundary, scale)
        assert engine.was_step_applied() == (boundary and scale == 1)


def check_loss_scale(engine) -> None:
    """fp16's loss scale leaves no trace in the gradients, and an overflow halves it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    norms = []
    scale = LossScale(active=True)
    for ours in (ZeroEngine(engine, LossScale(active=False)), ZeroEngine(engine, scale)):
        ours.backward(engine(input_ids=IDS, labels=IDS).loss)
        norms.append(ours.step().item())
        assert engine.was_step_applied()
    assert norms[0] == pytest.approx(norms[1], rel=rounding(MODEL, torch.float32))
    before = scale.value
    ours.backward(engine(input_ids=IDS, labels=IDS).loss * float("inf"))
    assert ours.step().isinf() and scale.value == before / 2
    assert not engine.was_step_applied()


def main(stage_text: str, directory: str, out: str) -> None:
    stage, processes = int(stage_text), Processes()
    world = processes.world_size
    deepspeed = import_deepspeed(processes)
    processes.start(60)
    deepspeed.init_distributed()
    check_odd_shapes(deepspeed, stage)

    plain = model_from(directory)
    want = train_plain(plain)
    engine, _ = start(deepspeed, model_from(directory), stage)
    attach_norm_refresh(engine.module, engine)
    got = [step(engine) for _ in range(4)]
    assert got == pytest.approx(want, rel=TRAINED)
    save_adapter(engine.module, Path(out) / "sharded")
    if processes.is_main:
        save_adapter(plain, Path(out) / "plain")
    processes.barrier()
    check_steps(engine)
    if stage == 3:
        check_collectives(engine)
    check_loss_scale(engine)

    kinds = [None] if stage < 3 else [None, {}, {"zero_hpz_partition_size": world}]
    losses = train_plain(plain, 2)  # from what was saved; a new optimizer there as here
    for zero in kinds:
        fresh, optimizer = start(deepspeed, model_from(directory), stage, zero)
        attach_norm_refresh(fresh.module, SimpleNamespace(optimizer=fresh.optimizer))  # as accelerate wraps it
        if zero is not None:
            step(fresh)  # leaves whole copies of what DeepSpeed keeps, which the load must renew
        load_adapter(fresh.module, Path(out) / "plain")
        got = [step(fresh), step(fresh)] if zero is None else [step(fresh)]
        assert got == pytest.approx(losses[: len(got)], rel=TRAINED), zero

    check_steps(fresh)
    check_whole_models(directory, lambda model: start(deepspeed, model, stage)[0], world)
    check_refusals(deepspeed, stage, fresh, optimizer, directory)
    processes.stop()


def check_refusals(deepspeed, stage: int, fresh, optimizer, directory: str) -> None:
    with pytest.raises(UserError, match="with the engine"):
        attach_norm_refresh(fresh.module, optimizer)
    with pytest.raises(UserError, match="pass the torch optimizer"):
        attach_norm_refresh(fresh.module, fresh.module)
    early = model_from(directory)
    attached = torch.optim.AdamW((p for p in early.parameters() if p.requires_grad), lr=0.02)
    attach_norm_refresh(early, attached)  # before DeepSpeed takes the model: told at the first step
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    with pytest.raises(UserError, match=r"after deepspeed\.initialize"):
        step(deepspeed.initialize(model=early, optimizer=attached, config=config)[0])
    if stage < 3:
        turning, _ = start(deepspeed, model_from(directory), stage, {"round_robin_gradients": True})
        with pytest.raises(UserError, match="round_robin_gradients"):
            attach_norm_refresh(turning.module, turning)
    odd = inject_dora(Odd(), DoraConfig(rank=1, targets="all-linear"))
    rounding, _ = start(deepspeed, odd, stage, bf16={"enabled": True})
    with pytest.raises(UserError, match="bf16"):
        attach_norm_refresh(odd, rounding)
    if stage == 3:
        with pytest.raises(UserError, match="sharded"):
            merge_adapter(fresh.module)
        bare = deepspeed.zero.Init(module=AutoModelForCausalLM.from_pretrained(directory)).module
        with pytest.raises(UserError, match="sharded"):
            inject_dora(bare, DoraConfig())


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
