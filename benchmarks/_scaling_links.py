"""Seconds of single collectives by size, as FSDP2 asks for them: what a model of the network is fitted to."""

import argparse
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _results import environment, spread
from _scaling_run import PROBE_PARTS, directory_of, everyones, link_of, probe_seconds, save
from torch import Tensor

from dora_dist.backends.process import Processes
from dora_dist.errors import UserError

SIZES = [1 << power for power in range(10, 26)]  # 1 KB to 32 MB
TIMEOUT_S = 300
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Of the whole vector, of this rank's part, and whether to go on meanwhile. What they write is new memory each
# time, as in FSDP2: on a CPU its pages are made then.
CALLS: dict[str, Callable[[Tensor, Tensor, bool], Any]] = {
    "all_gather": lambda whole, part, on: _all_gather(torch.empty_like(whole), part, async_op=on),
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
    processes.start(TIMEOUT_S)
    probe = [timed_probe(processes, lambda _: 0.0) for _ in range(args.rounds)]
    ranks = everyones(processes, {"host": socket.gethostname(), "probe": statistics.median(probe)})
    seconds = {
        name: [time_sizes(processes, call, size, args.rounds) for size in SIZES] for name, call in CALLS.items()
    }
    lost = None
    if processes.device.type == "cpu":
        lost = {
            name: [time_lost(processes, call, size, args.rounds) for size in LOST_SIZES]
            for name, call in CALLS.items()
        }
    if ranks is not None:
        count = len({rank["host"] for rank in ranks})
        record = {"kind": "links", "world_size": processes.world_size, "hosts": count,
                  "link": link_of(args, count), "dtype": "float32", "seconds": seconds,
                  "probe_seconds": max(rank["probe"] for rank in ranks), "lost_probes": lost}  # fmt: skip
        save(directory_of(args, record), environment(processes.device) | record, append=False)
    processes.stop()


def time_sizes(
    processes: Processes, call: Callable[[Tensor, Tensor, bool], Any], size: int, rounds: int
) -> dict[str, float]:
    """Spread, over the rounds, of the slowest rank's seconds from a common start."""
    whole, part = vectors(processes, size)
    own = [time_once(processes, lambda: call(whole, part, False)) for _ in range(rounds + 2)][2:]
    slowest = torch.tensor(own)
    if processes.world_size > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {"bytes": whole.nbytes, **spread(slowest.tolist())}


def vectors(processes: Processes, size: int) -> tuple[Tensor, Tensor]:
    """The whole one, of `size` bytes or some more, and this rank's part."""
    part = torch.zeros(-(-size // (4 * processes.world_size)), device=processes.device)
    return torch.zeros(part.numel() * processes.world_size, device=processes.device), part


def time_lost(
    processes: Processes, call: Callable[[Tensor, Tensor, bool], Any], size: int, rounds: int
) -> dict[str, float]:
    """By which part of itself the probe's computing takes longer for each collective between its parts, whose own
    time is not counted (`around`), or beside them (`beside`). On a CPU, gloo's threads and the system's copies
    take cores and caches from it. Medians over the rounds, means over the ranks."""
    whole, part = vectors(processes, size)
    takes = time_sizes(processes, call, size, rounds)["median"]
    alone = timed_probe(processes, lambda _: 0.0)
    agreed = torch.tensor(min(_MOST_BESIDE, 0.6 * alone / takes))  # not longer under way than the probe
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    count = max(1, int(agreed))
    before_part = [count * (i + 1) // PROBE_PARTS - count * i // PROBE_PARTS for i in range(PROBE_PARTS)]
    under_way: list[Any] = []

    def around(index: int) -> float:
        start = time.perf_counter()
        for _ in range(before_part[index]):
            call(whole, part, False)
        return time.perf_counter() - start

    def beside(index: int) -> float:
        under_way.extend(call(whole, part, True) for _ in range(before_part[index]))
        return 0.0

    found = []
    for _ in range(rounds):
        alone = timed_probe(processes, lambda _: 0.0)
        found.append([timed_probe(processes, between) / alone - 1 for between in (around, beside)])
        while under_way:
            under_way.pop().wait()
    medians = torch.tensor(found).median(dim=0).values / count
    dist.all_reduce(medians)
    lost_around, lost_beside = (medians / processes.world_size).tolist()
    return {"bytes": whole.nbytes, "around": lost_around, "beside": lost_beside}


def timed_probe(processes: Processes, before: Callable[[int], float]) -> float:
    """Of the probe's own computing: without the seconds that `before` each of its parts returns."""
    processes.barrier()
    return probe_seconds(processes.device, before)


def time_once(processes: Processes, call: Callable[[], Any]) -> float:
    on_gpu = processes.device.type == "cuda"
    processes.barrier()
    if on_gpu:
        torch.cuda.synchronize(processes.device)
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(processes.device)
    return time.perf_counter() - start
