"""Run under torchrun: dora_dist as a library, under someone else's fully_shard.

usage: library_fsdp.py MODEL_DIR OUT_DIR
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from dora_dist import (
    DoraConfig,
    UserError,
    adapters_off,
    attach_norm_refresh,
    inject_dora,
    iter_merged_weights,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from dora_dist.cli import leave
from dora_dist.config import QuantConfig
from dora_dist.dora.norm_cache import find_shards
from dora_dist.models.quantize import pack_linears
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import write_whole
from tests.support.models import mixture
from tests.support.peft import randomized
from tests.support.rounding import MODEL, TRAINED, assert_near

IDS = torch.tensor([[5, 9, 11, 20, 3, 44]])


def model_from(directory: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, use_cache=False)
    targets = ["q_proj", "up_proj", "down_proj", "embed_tokens"]
    return inject_dora(
        model, DoraConfig(rank=3, targets=targets, magnitude_only=["o_proj"], modules_to_save=["lm_head"])
    )


def shard(model: torch.nn.Module) -> torch.nn.Module:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def train(model: torch.nn.Module, attach: bool) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    if attach:
        attach_norm_refresh(model, optimizer)
    losses = []
    for _ in range(4):
        with torch.no_grad():
            model(input_ids=IDS)  # leaves the root gathered: the refresh must cope
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_whole_models(
    directory: str, shard: Callable[[torch.nn.Module], torch.nn.Module], split: int = 1
) -> None:
    """With its adapters off a sharded model is the base to the bit, in 16 bits and in 4, and merged it is what the
    unsharded one is; then it trains on. `split`: ranks among which flat memory is divided."""
    targets = ["*_proj", "embed_tokens"]
    for base in (AutoModelForCausalLM.from_pretrained(directory), mixture("qwen3_moe")):
        for packed in (False, True):
            plain, twin = (
                randomized(inject_dora(copy.deepcopy(base), DoraConfig(rank=3, targets=targets))) for _ in "12"
            )
            if packed:
                pack_linears(plain, QuantConfig(scheme="nf4"))
                pack_linears(twin, QuantConfig(scheme="nf4"), split)
            with adapters_off(plain):
                want = plain(input_ids=IDS).logits if packed else base(input_ids=IDS).logits
            sharded = shard(twin)
            with adapters_off(twin):
                assert torch.equal(sharded(input_ids=IDS).logits, want), packed
            for both in zip(iter_merged_weights(twin), iter_merged_weights(plain), strict=True):
                (name, tensor), (wanted_name, wanted) = both
                assert name == wanted_name
                assert_near(tensor, wanted, tensor.shape[-1], about=name)
            assert_near(sharded(input_ids=IDS).logits, plain(input_ids=IDS).logits, MODEL)


def main(directory: str, out: str) -> None:
    processes = Processes()
    processes.start(60)
    plain = model_from(directory)
    want = train(plain, attach=False)
    assert want[-1] < want[0] - 0.5, want
    for attach in (False, True):
        sharded = shard(model_from(directory))
        got = train(sharded, attach)
        assert got == pytest.approx(want, rel=TRAINED), attach

    save_adapter(sharded, Path(out) / "sharded")
    if processes.is_main:
        save_adapter(plain, Path(out) / "plain")
    processes.barrier()
    fresh = shard(model_from(directory))
    attach_norm_refresh(fresh, None)
    load_adapter(fresh, Path(out) / "sharded")
    assert_near(fresh(input_ids=IDS).logits, sharded(input_ids=IDS).logits, MODEL)

    partly = model_from(directory)
    partly.register_buffer("table", torch.zeros(3))
    for block in partly.model.layers:
        fully_shard(block)
    load_adapter(partly, Path(out) / "plain")  # what lies outside the sharding is written on every rank
    assert_near(partly(input_ids=IDS).logits, plain(input_ids=IDS).logits, MODEL)
    write_whole(partly.table, torch.arange(3.0), find_shards(partly))
    assert partly.table.tolist() == [0, 1, 2]

    check_whole_models(directory, shard)

    rounding = model_from(directory)
    for block in rounding.model.layers:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    for refused, kind, word in (
        (lambda: rounding(input_ids=IDS), RuntimeError, "param_dtype"),
        (lambda: merge_adapter(fresh), UserError, "sharded"),
        (lambda: fresh.model.layers[0].self_attn.q_proj(torch.zeros(1, 12)), RuntimeError, "sharded"),
        (
            lambda: inject_dora(shard(AutoModelForCausalLM.from_pretrained(directory)), DoraConfig()),
            UserError,
            "sharded",
        ),
    ):
        fresh.model.layers[0].reshard()
        with pytest.raises(kind, match=word):
            refused()
    processes.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
