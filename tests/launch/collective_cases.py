"""Run under torchrun: `agree`, `all_gather_bytes`, `from_main` and `wait_for_all`, beside other collectives."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from dora_dist.cli import leave
from dora_dist.models.weights import load_whole
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Whole


def nobody_waits_in_a_collective(processes: Processes) -> None:
    """While rank 0 loads a whole checkpoint, or another its part, for longer than a collective may take."""
    gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    gloo._set_default_timeout(timedelta(seconds=2))

    def load() -> nn.Module:
        time.sleep(3)
        return nn.Linear(3, 2, bias=False).requires_grad_(False)

    model = nn.Linear(3, 2, bias=False)
    load_whole(model, load, Whole(), processes)
    mine = model.weight.detach().clone()
    assert torch.equal(processes.broadcast_(model.weight.detach()), mine)
    time.sleep(3 * processes.rank)
    processes.wait_for_all()
    processes.sum_(torch.ones(1))
    gloo._set_default_timeout(timedelta(seconds=60))


def main() -> None:
    processes = Processes()
    processes.start(60)
    rank, last = processes.rank, processes.world_size - 1
    agreement = processes.agree([0, 0])
    for step in range(50):  # what a step begins is read at the end of the next
        processes.sum_(torch.ones(10_000))
        before, agreement = agreement, processes.agree([step * rank, int(rank == last and step == 30)])
        assert before() == before() == [max(0, (step - 1) * last), int(step == 31)]
    for parts in ([b"a" * r for r in range(last + 1)], [b""] * (last + 1), [bytes(range(256))] * (last + 1)):
        assert processes.all_gather_bytes(parts[rank]) == parts
    assert processes.from_main(rank) == 0
    assert processes.from_main({"path": f"/ä{rank}"}) == {"path": "/ä0"}
    nobody_waits_in_a_collective(processes)
    processes.stop()


if __name__ == "__main__":
    main()
    leave(0)
