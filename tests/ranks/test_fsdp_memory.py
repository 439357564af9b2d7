"""FSDP: 1/N of the base per rank and one block while it computes; loading never holds more than that either."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support import ROOT
from tests.support.models import llama_config
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks

WORLD = 2


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mid_llama")
    torch.manual_seed(0)
    config = llama_config(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(directory)
    del model
    done = run_ranks(WORLD, ROOT / "tests/ranks/measure_fsdp_memory.py", str(directory), str(directory / "out"))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"out.{rank}.json").read_text()) for rank in range(WORLD)]


def test_each_rank_rests_on_its_share_of_the_base(figures):
    for rank in figures:
        assert rank["resting"] <= 1.01 * rank["base"] / WORLD


def test_training_adds_one_block(figures):
    """Seen right after each block's forward and backward, when its weights are still gathered."""
    for rank in figures:
        assert rank["samples"] == 16
        assert rank["resting"] + 0.9 * rank["block"] <= rank["training"]
        assert rank["training"] <= 1.01 * rank["base"] / WORLD + 1.05 * rank["block"]


def test_loading_never_holds_more_than_a_block_beyond_the_share(figures):
    for rank in figures:
        assert rank["loading"] <= rank["base"] / WORLD + rank["block"] + (12 << 20)  # adapters, allocator
