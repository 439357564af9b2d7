"""Count one training step's collectives at a faked world size: real FSDP2 code, fake tensors, a fake group.

usage: count_collectives.py WORLD_SIZE STRATEGY     prints {"METHOD/LAYERS": {"step": ..., "refresh": ...}}
STRATEGY is single, ddp, fsdp or hybrid (two replicas). Under ddp the step is that of the model alone.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common.collectives import Counter
from dora_dist import DoraConfig, inject_dora, refresh_norms
from dora_dist.dora.base_alone import adapters_off
from dora_dist.dora.norm_cache import cache_norms
from dora_dist.models.build import shard
from dora_dist.models.head_loss import HeadLoss
from dora_dist.parallel.fsdp import Fsdp
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Ddp, Single

WORDS = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(16, WORDS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def count(layers: int, method: str, strategy: Single | Fsdp) -> dict[str, dict]:
    model = Model(layers)
    inject_dora(model, DoraConfig(method=method, rank=4, targets="all-linear"))
    head_loss = HeadLoss(model.head, WORDS)
    shard(model, strategy, head_loss)
    shards = strategy.shards(model)
    cache_norms(model, shards)
    step, compared = (step_after_evaluation(model, head_loss, reference) for reference in (False, True))
    with Counter() as refresh:
        refresh_norms(model, shards)
    factors, norms = (
        4 * sum(p.numel() for name, p in model.named_parameters() if name.endswith(kind))
        for kind in ("lora_A", "magnitude")
    )
    return {
        "step": step.by_collective(),
        "compared": compared.by_collective(),
        "refresh": refresh.by_collective(),
        "bytes": {"factors": factors, "norms": norms},
    }


def step_after_evaluation(model: nn.Module, head_loss: HeadLoss, reference: bool) -> Counter:
    """The second of two steps with an evaluation before each; `reference`: that of a preference is in the step."""
    x, positions, targets = torch.zeros(2, 3, 16), torch.arange(2), torch.zeros(2, dtype=torch.long)
    for _ in range(2):
        with torch.no_grad():
            model(x)
        with Counter() as step, head_loss.of(positions, targets):
            if reference:
                with adapters_off(model):
                    model(x)
            model(x).sum().backward()
    return step


def main(world_size: str, name: str) -> None:
    os.environ.update(RANK="1", WORLD_SIZE=world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=int(world_size))
    processes = Processes()
    if name in ("single", "ddp"):
        strategy = {"single": Single, "ddp": Ddp}[name](processes)
    else:
        strategy = Fsdp(processes, replicas=2 if name == "hybrid" else 1)
        strategy.mesh  # noqa: B018 - made here, because a mesh cannot be made of fake tensors
    with FakeTensorMode():
        counts = {f"{method}/{n}": count(n, method, strategy) for method in ("dora", "lora") for n in (1, 3)}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
