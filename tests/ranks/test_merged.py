"""Host memory while the merged weights of a sharded model pass by: one of them, and little else."""

import gc
import json

import pytest
from torch import nn
from torch.distributed.fsdp import fully_shard

from dora_dist import DoraConfig, inject_dora, iter_merged_weights
from dora_dist.config import QuantConfig
from dora_dist.models.quantize import pack_linears
from dora_dist.parallel.process import Processes
from tests.ranks.measure_fsdp_memory import PeakMemory
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks

_WIDTH, _BLOCKS = 4096, 3  # 67 MB each
_ELSEWHERE = 24 << 20  # A and B, tiles in fp32, gloo's buffers


def measure() -> None:
    processes = Processes()
    processes.start(60, needed=True)
    for packed in (False, True):
        linears = [nn.utils.skip_init(nn.Linear, _WIDTH, _WIDTH, bias=False) for _ in range(_BLOCKS)]
        model = nn.Sequential(*linears)
        for linear in linears:
            nn.init.constant_(linear.weight, 0.01)
        inject_dora(model, DoraConfig(rank=2, targets="all-linear"))
        if packed:
            pack_linears(model, QuantConfig(scheme="nf4"))
        for block in model:
            fully_shard(block)
        fully_shard(model)
        with PeakMemory() as merging:
            weights = iter_merged_weights(model)
            for _ in range(_BLOCKS):
                name, tensor = next(weights)
                del tensor
        assert next(weights, None) is None, name
        print(json.dumps(merging.growth), flush=True)
        del model, linears, weights
        gc.collect()
    processes.stop()


def test_one_weight_at_a_time():
    done = run_ranks(2, measure)
    assert done.returncode == 0, done.stderr[-4000:]
    growths = [int(line) for line in done.stdout.split()]
    assert len(growths) == 4
    assert max(growths) <= 4 * _WIDTH**2 + _ELSEWHERE, growths
