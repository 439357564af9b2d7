"""Count one training step's collectives at a faked world size: real FSDP2 code, fake tensors, a fake group.

usage: count_collectives.py WORLD_SIZE REPLICAS      prints {"METHOD/LAYERS": {"step": {...}, "refresh": {...}}}
"""

import json
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dora_dist import DoraConfig, attach_norm_refresh, inject_dora, refresh_norms
from dora_dist.backends import fsdp, zero
from dora_dist.backends.fsdp import Fsdp
from dora_dist.backends.process import Processes


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

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def count(layers: int, method: str, strategy: Fsdp) -> dict[str, dict[str, int]]:
    model = Model(layers)
    inject_dora(model, DoraConfig(method=method, rank=4, targets="all-linear"))
    strategy.shard(model)
    attach_norm_refresh(model, None)
    with CommDebugMode() as step:
        model(torch.zeros(2, 16)).backward()
    with CommDebugMode() as refresh, watch() as received:
        refresh_norms(model)
    small = sum(p.numel() for n, p in model.named_parameters() if n.endswith("lora_A"))
    norms = sum(p.numel() for n, p in model.named_parameters() if n.endswith("magnitude"))
    return {
        "step": named(step),
        "refresh": named(refresh),
        "bytes": {"received": sum(received), "floor": 4 * (small + norms)},
    }


@contextmanager
def watch():
    """Gives the bytes of each collective's output, in order."""
    received: list[int] = []
    all_reduce, gathers = dist.all_reduce, {backend: backend._all_gather for backend in (fsdp, zero)}

    def watched_all_reduce(tensor, **options):
        received.append(tensor.nbytes)
        return all_reduce(tensor, **options)

    def watched_all_gather(output, own, **options):
        received.append(output.nbytes)
        return gathers[fsdp](output, own, **options)

    dist.all_reduce, fsdp._all_gather, zero._all_gather = (
        watched_all_reduce,
        watched_all_gather,
        watched_all_gather,
    )
    yield received
    dist.all_reduce = all_reduce
    for backend, gather in gathers.items():
        backend._all_gather = gather


def named(mode: CommDebugMode) -> dict[str, int]:
    return {str(op).rpartition(".")[2].strip("_"): n for op, n in mode.get_comm_counts().items() if n}


def main(world_size: str, replicas: str) -> None:
    os.environ.update(RANK="1", WORLD_SIZE=world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=int(world_size))
    strategy = Fsdp(Processes(), replicas=int(replicas))
    strategy.mesh  # noqa: B018 - made here, because a mesh cannot be made of fake tensors
    with FakeTensorMode():
        counts = {f"{method}/{n}": count(n, method, strategy) for method in ("dora", "lora") for n in (1, 3)}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
