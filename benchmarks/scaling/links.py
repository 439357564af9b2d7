"""Seconds of single collectives by size, as FSDP2 asks for them: what a model of the network is fitted to."""

import argparse
import socket
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.results import environment, spread
from benchmarks.common.timing import wall_seconds
from benchmarks.scaling.measure import PROBE_PARTS, everyones, probe_seconds
from benchmarks.scaling.records import directory_of, link_of, save
from dora_dist.errors import UserError
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import all_gather

SIZES = [1 << power for power in range(10, 26)]  # 1 KB to 32 MB
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Of the whole vector, of this rank's part, and whether to go on meanwhile. What they write is new memory each
# time, as in FSDP2: on a CPU its pages are made then.
Call = Callable[[Tensor, Tensor, bool], Any]
CALLS: dict[str, Call] = {
    "all_gather": lambda whole, part, on: all_gather(torch.empty_like(whole), part, async_op=on),
    "reduce_scatter": lambda whole, part, on: _reduce_scatter(torch.empty_like(part), whole, async_op=on),
    "all_reduce": lambda whole, part, on: dist.all_reduce(whole, async_op=on),
}
LOST_SIZES = [1 << 18, 1 << 20, 1 << 22]
_MOST_BESIDE = 4.0 * PROBE_PARTS


def measure_links(args: argparse.Namespace) -> None:
    """On every rank; rank 0 writes. Bytes are the whole vector's, rounded up to a multiple of the ranks."""
    processes = Processes()
    if processes.world_size == 1:
        raise UserError("--links: one rank sends nothing; start at least two, for example with --ranks 2")
    processes.start(timeout_s=300)
    probe = [probe_seconds(processes) for _ in range(args.rounds)]
    ranks = everyones(processes, {"host": socket.gethostname(), "probe": statistics.median(probe)})

    def each(what: Callable[..., dict[str, float]], sizes: list[int]) -> dict[str, list[dict[str, float]]]:
        return {name: [what(processes, call, size, args.rounds) for size in sizes] for name, call in CALLS.items()}

    seconds = each(time_sizes, SIZES)
    lost = each(time_lost, LOST_SIZES) if processes.device.type == "cpu" else None
    if processes.is_main:
        count = len({rank["host"] for rank in ranks})
        record = {"kind": "links", "world_size": processes.world_size, "hosts": count,
                  "link": link_of(args, count), "dtype": "float32", "seconds": seconds,
                  "probe_seconds": max(rank["probe"] for rank in ranks), "lost_probes": lost}  # fmt: skip
        save(directory_of(args, record), environment(processes.device) | record, append=False)
    processes.stop()


def time_sizes(processes: Processes, call: Call, size: int, rounds: int) -> dict[str, float]:
    """Spread, over the rounds, of the slowest rank's seconds from a common start."""
    whole, part = vectors(processes, size)
    own = []
    for _ in range(rounds + 2):
        processes.barrier()
        own.append(wall_seconds(lambda: call(whole, part, False), processes.device))
    slowest = torch.tensor(own[2:])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {"bytes": whole.nbytes, **spread(slowest.tolist())}


def vectors(processes: Processes, size: int) -> tuple[Tensor, Tensor]:
    """The whole one, of `size` bytes or some more, and this rank's part."""
    part = torch.zeros(-(-size // (4 * processes.world_size)), device=processes.device)
    return torch.zeros(part.numel() * processes.world_size, device=processes.device), part


def time_lost(processes: Processes, call: Call, size: int, rounds: int) -> dict[str, float]:
    """By which part of itself the probe's computing takes longer for each collective between its parts, whose own
    time is not counted (`around`), or beside them (`beside`). On a CPU, gloo's threads and the system's copies
    take cores and caches from it. Medians over the rounds, means over the ranks."""
    whole, part = vectors(processes, size)
    takes = time_sizes(processes, call, size, rounds)["median"]
    alone = probe_seconds(processes)
    agreed = torch.tensor(min(_MOST_BESIDE, 0.6 * alone / takes))  # not longer under way than the probe
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    count = max(1, int(agreed))
    before_part = [count * (i + 1) // PROBE_PARTS - count * i // PROBE_PARTS for i in range(PROBE_PARTS)]
    under_way: list[Any] = []

    def around(index: int) -> float:
        work = lambda: [call(whole, part, False) for _ in range(before_part[index])]  # noqa: E731
        return wall_seconds(work, processes.device)

    def beside(index: int) -> float:
        under_way.extend(call(whole, part, True) for _ in range(before_part[index]))
        return 0.0

    found = []
    for _ in range(rounds):
        alone = probe_seconds(processes)
        found.append([probe_seconds(processes, between) / alone - 1 for between in (around, beside)])
        while under_way:
            under_way.pop().wait()
    medians = torch.tensor(found).median(dim=0).values / count
    dist.all_reduce(medians)
    lost_around, lost_beside = (medians / processes.world_size).tolist()
    return {"bytes": whole.nbytes, "around": lost_around, "beside": lost_beside}
