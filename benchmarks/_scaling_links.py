"""Seconds of single collectives by size, as FSDP2 asks for them: what a model of the network is fitted to."""

import argparse
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _results import environment, spread
from _scaling_run import directory_of, everyones, link_of, save
from torch import Tensor

from dora_dist.backends.process import Processes
from dora_dist.errors import UserError

SIZES = [1 << power for power in range(10, 26)]  # 1 KB to 32 MB
TIMEOUT_S = 300
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Of the whole vector, and of this rank's part. What they write is new memory each time, as in FSDP2: on a CPU its
# pages are made then.
CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all_gather": lambda whole, part: _all_gather(torch.empty_like(whole), part),
    "reduce_scatter": lambda whole, part: _reduce_scatter(torch.empty_like(part), whole),
    "all_reduce": lambda whole, part: dist.all_reduce(whole),
}


def measure_links(args: argparse.Namespace) -> None:
    """On every rank; rank 0 writes. Bytes are the whole vector's, rounded up to a multiple of the ranks."""
    processes = Processes()
    if processes.world_size == 1:
        raise UserError("--links: one rank sends nothing; start at least two, for example with --ranks 2")
    processes.start(TIMEOUT_S)
    hosts = everyones(processes, {"host": socket.gethostname()})
    seconds = {
        name: [time_sizes(processes, call, size, args.rounds) for size in SIZES] for name, call in CALLS.items()
    }
    if hosts is not None:
        count = len({rank["host"] for rank in hosts})
        record = {"kind": "links", "world_size": processes.world_size, "hosts": count,
                  "link": link_of(args, count), "dtype": "float32", "cores": os.cpu_count(),
                  "seconds": seconds}  # fmt: skip
        save(directory_of(args, record), environment(processes.device) | record, append=False)
    processes.stop()


def time_sizes(
    processes: Processes, call: Callable[[Tensor, Tensor], Any], size: int, rounds: int
) -> dict[str, float]:
    """Spread, over the rounds, of the slowest rank's seconds from a common start; and the seconds in which cores
    of this machine were busy, of a round."""
    part = torch.zeros(-(-size // (4 * processes.world_size)), device=processes.device)
    whole = torch.zeros(part.numel() * processes.world_size, device=processes.device)
    for _ in range(2):
        time_once(processes, lambda: call(whole, part))
    busy = busy_seconds()
    own = [time_once(processes, lambda: call(whole, part)) for _ in range(rounds)]
    busy = (busy_seconds() - busy) / rounds
    slowest = torch.tensor(own)
    if processes.world_size > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {"bytes": whole.nbytes, **spread(slowest.tolist()), "busy": busy}


def busy_seconds() -> float:
    """Of all cores of this machine since it was started, whoever had them; 0.0 where Linux does not say so."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, stat.read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


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
