"""Each example in configs/ fits the GPUs that it is written for, by `plan`, of its model's true shape.

What `plan` counts is held against bounds worked out here from the shape alone, and what an example's comment says
against what `plan` counts.
"""

import json
import re
from dataclasses import dataclass

import pytest
import transformers

from dora_dist.config import RunConfig, load_config
from dora_dist.planning.hardware import BALANCED, GB, find_cluster
from dora_dist.planning.known_models import known_models
from dora_dist.planning.plan import make_plan
from tests.support import ROOT

CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Meant:
    """The cluster that an example is for, the strategy there, and how many GPUs share a copy of its weights."""

    gpu: str
    gpus: int
    nodes: int
    strategy: str
    shards: int


MEANT = {
    "quickstart": Meant("h100", 2, 1, "fsdp", 2),
    "one-4090": Meant("rtx4090", 1, 1, "single", 1),
    "one-4090-qdora": Meant("rtx4090", 1, 1, "single", 1),
    "one-4090-dpo": Meant("rtx4090", 1, 1, "single", 1),
    "gpt2-classification": Meant("rtx4090", 1, 1, "single", 1),
    "distilbert-classification": Meant("rtx4090", 1, 1, "single", 1),
    "two-gpus": Meant("rtx4090", 2, 1, "fsdp", 2),
    "two-4090-70b": Meant("rtx4090", 2, 1, "fsdp", 2),
    "eight-gpus": Meant("h100", 8, 1, "zero2", 1),
    "eight-gpus-70b": Meant("h100", 8, 1, "fsdp", 8),
    "slurm": Meant("h100", 16, 2, "fsdp", 16),
    "multi-node-hybrid": Meant("h100", 16, 2, "fsdp", 8),
    "multi-node-zero3": Meant("h100", 16, 2, "zero3", 16),
    "multi-node-405b": Meant("h100", 64, 8, "fsdp", 64),
    "multi-node-405b-zero3": Meant("h100", 64, 8, "zero3", 64),
    "one-4090-30b-moe": Meant("rtx4090", 1, 1, "single", 1),
    "one-h100-120b-moe": Meant("h100", 1, 1, "single", 1),
    "eight-gpus-235b-moe": Meant("h100", 8, 1, "fsdp", 8),
    "multi-node-671b-moe": Meant("h100", 16, 2, "fsdp", 16),
}


@dataclass(frozen=True)
class Shape:
    """Of a model, as far as it is needed to count by hand."""

    hidden: int
    layers: int
    linear: int  # parameters of all blocks' linear layers
    words: int  # of embeddings and output head
    idle: int = 0  # of the linear layers' parameters: those of experts that a token does not go to

    @classmethod
    def of(cls, model: transformers.PretrainedConfig) -> "Shape":
        h, layers, vocabulary = model.hidden_size, model.num_hidden_layers, model.vocab_size
        if model.model_type in ("gpt2", "distilbert"):  # 4 h x h for attention, 2 h x 4h behind it
            return cls(h, layers, layers * 12 * h * h, vocabulary * h)
        if hasattr(model, "num_experts_per_tok"):
            return cls.of_mixture(model)
        kv = model.num_key_value_heads * h // model.num_attention_heads
        linear = layers * h * (2 * h + 2 * kv + 3 * model.intermediate_size)
        return cls(h, layers, linear, (1 if model.tie_word_embeddings else 2) * vocabulary * h)

    @classmethod
    def of_mixture(cls, model: transformers.PretrainedConfig) -> "Shape":
        h, layers, words = model.hidden_size, model.num_hidden_layers, 2 * model.vocab_size * model.hidden_size
        heads, top_k = model.num_attention_heads, model.num_experts_per_tok
        if model.model_type == "deepseek_v3":
            head, value, r = model.qk_nope_head_dim, model.v_head_dim, model.qk_rope_head_dim
            attention = h * (model.q_lora_rank + model.kv_lora_rank + r) + model.q_lora_rank * heads * (head + r)
            attention += model.kv_lora_rank * heads * (head + value) + heads * value * h
            one, E, dense = (
                3 * h * model.moe_intermediate_size,
                model.n_routed_experts,
                model.first_k_dense_replace,
            )
            rest = layers * attention + dense * 3 * h * model.intermediate_size + (layers - dense) * one  # shared
        else:
            attention = 2 * h * (heads + model.num_key_value_heads) * model.head_dim
            dense, rest, E = 0, layers * attention, model.num_local_experts
            one = 3 * h * getattr(model, "moe_intermediate_size", model.intermediate_size)
        return cls(h, layers, rest + (layers - dense) * E * one, words, (layers - dense) * (E - top_k) * one)


def item_bytes(config: RunConfig) -> tuple[float, float]:
    """Bytes of a parameter of a linear layer, and of another."""
    plain = {"bfloat16": 2, "float32": 4}[config.model.dtype]
    return (4.125 / 8 if config.quant.scheme == "nf4" else plain), plain


def test_every_example_is_planned():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MEANT)


LONG = {
    n
    for n in MEANT
    if n.startswith("multi-node") or n.endswith("moe") or n in ("slurm", "eight-gpus-70b", "one-4090-dpo")
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in MEANT])
def test_an_example_fits_its_gpus(name, tmp_path, rehearse):
    path, meant = CONFIGS / f"{name}.yaml", MEANT[name]
    config = load_config(path)
    directory = ROOT / config.model.path
    if not directory.is_dir():
        directory = tmp_path
        (directory / "config.json").write_text(json.dumps(known_models()[config.model.path]))
    shape = Shape.of(transformers.AutoConfig.from_pretrained(directory))
    cluster = find_cluster(meant.gpu, meant.gpus, meant.nodes)
    plan = make_plan(config, directory, cluster, rehearse)
    assert (plan.rehearsed.strategy, plan.fits) == (meant.strategy, True)

    # What must be held: a part of the weights, the block that computes, and the input of each block.
    of_linear, of_word = item_bytes(config)
    part = (shape.linear * of_linear + shape.words * of_word) / meant.shards
    where = plan.host_memory if config.parallel.cpu_offload else plan.memory
    weights = where["base weights"] + where.get("scales of 4-bit weights", 0)
    assert part <= weights <= 1.15 * part  # biases and norms; pinned memory comes in powers of two
    tokens = config.sequences * config.data.seq_len
    block = shape.linear * of_linear / shape.layers if meant.shards > 1 else 0
    inputs = tokens * shape.layers * shape.hidden * of_word
    assert plan.peak > (0 if config.parallel.cpu_offload else part) + block + inputs

    # A product of each weight with each token: forward, its recompute, backward, the reference's forward.
    products = 2 + config.train.activation_checkpointing + (config.model.task == "preference")
    device = plan.cluster.device
    rate = device.flops_16 if config.model.dtype == "bfloat16" else device.flops_32
    seconds = 2 * products * (shape.linear - shape.idle) * tokens * config.train.accumulation / rate
    assert seconds < plan.time.total
    assert plan.time.total < 5 * seconds or shape.hidden < 4096 or shape.idle  # small products, by memory
    assert (BALANCED in plan.assumptions) == bool(shape.idle)
    if not config.parallel.cpu_offload:  # no tensor is larger than the embeddings
        assert 0 < plan.loading_on_host <= shape.words * of_word

    said = re.search(r"Planned, not measured: ([\d.]+) GB of (?:an|each) (RTX 4090|H100)", path.read_text())
    assert said.group(2).replace(" ", "").lower() == meant.gpu
    assert float(said.group(1)) == pytest.approx(plan.peak / GB, rel=0.03, abs=0.05)
    for figure in re.findall(r"([\d.]+) GB of it weights", path.read_text()):
        assert float(figure) == pytest.approx(weights / GB, abs=0.06)
