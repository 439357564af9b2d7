"""Run under torchrun: `agree`, `gather_bytes` and `told_by_main` over all ranks, beside other collectives."""

import torch

from dora_dist.backends.process import Processes
from dora_dist.cli import leave


def main() -> None:
    processes = Processes()
    processes.start(60)
    rank, last = processes.rank, processes.world_size - 1
    agreement = processes.agree([0, 0])
    for step in range(50):  # what a step begins is read at the end of the next
        processes.sum_(torch.ones(10_000))
        before, agreement = agreement, processes.agree([step * rank, int(rank == last and step == 30)])
        assert before.read() == before.read() == [max(0, (step - 1) * last), int(step == 31)]
    for parts in ([b"a" * r for r in range(last + 1)], [b""] * (last + 1), [bytes(range(256))] * (last + 1)):
        gathered = processes.gather_bytes(parts[rank])
        assert gathered == (parts if rank == 0 else None)
    assert processes.told_by_main(rank) == 0
    assert processes.told_by_main({"path": f"/ä{rank}"}) == {"path": "/ä0"}
    processes.stop()


if __name__ == "__main__":
    main()
    leave(0)
