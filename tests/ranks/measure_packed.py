"""Run under torchrun: the bytes of 4-bit base that each rank holds, per strategy, of a mixture of three experts.

usage: measure_packed.py OUT.json STRATEGY...     writes {strategy: [bytes of rank 0, ...]} and what they stand for
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from dora_dist.cli import leave
from dora_dist.config import DataConfig, DoraConfig, ModelConfig, ParallelConfig, QuantConfig, RunConfig
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.models.weights import packed_layers
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import build_to_train

CONFIG = Qwen3MoeConfig(
    vocab_size=96, hidden_size=512, moe_intermediate_size=448, num_experts=3, num_experts_per_tok=2, head_dim=128,
    num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2,
)  # fmt: skip


def main(out: str, *strategies: str) -> None:
    processes = Processes()
    processes.start(60)
    held: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        CONFIG.save_pretrained(directory)
        for name in strategies:
            config = RunConfig(
                ModelConfig(path=directory, init="random"),
                DataConfig(train="none"),
                dora=DoraConfig(rank=2, targets=["q_proj", "down_proj"]),
                quant=QuantConfig(scheme="nf4"),
                parallel=ParallelConfig(strategy=name),
            )
            blueprint = make_blueprint(config, Path(directory), processes.world_size)
            built = build_to_train(
                blueprint, choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
            )
            layers = packed_layers(built.model).values()
            own = sum(
                rectangle.values.nbytes
                for layer in layers
                for part in layer.weight_parts
                for rectangle in built.shards.rectangles(part)
            )
            everyone = torch.zeros(processes.world_size)
            everyone[processes.rank] = own
            held[name] = processes.sum_(everyone).tolist()
            elements = sum(layer.layout.rows * layer.layout.columns for layer in layers)
            scales = sum(layer.layout.rows * (layer.layout.blocks + 8) for layer in layers)
    if processes.is_main:
        Path(out).write_text(json.dumps({"held": held, "whole": elements / 2 + scales, "elements": elements}))
    processes.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
