"""FSDP2's shards, where no second process is needed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dora_dist.dora.norm_cache import find_shards
from dora_dist.errors import UserError


def test_what_another_parallelism_has_placed_is_not_taken_for_whole():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh, layer = init_device_mesh("cpu", (2,)), nn.Linear(4, 4)
        layer.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
        with pytest.raises(UserError, match="DoRA layers need FSDP2's default"):
            find_shards(layer).rectangles(layer.weight)
    finally:
        dist.destroy_process_group()
