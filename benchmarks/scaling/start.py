"""Starts this package under torchrun: one launch per world size and strategy, on this machine or on made hosts."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.scaling.measure import run_of, shared_out, strategies_of
from dora_dist.errors import UserError

DRIVERS = ("ranks", "hosts", "ranks_per_host", "passes", "draw", "append", "strategies", "local_rank")
PORT = 29500  # on a made host, whose network is its own


def start_all(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 where a launch failed; the others are made all the same."""
    sizes = [(hosts, ranks) for hosts in args.hosts or [0] for ranks in ranks_of(args)]
    names: list[str | None] = [None]
    if not args.links:
        with run_of(args) as config:
            for hosts, ranks in sizes:
                shared_out(config, args.mode, args.global_batch, ranks * (hosts or 1))
            names = list(strategies_of(args, config))
    failed = []
    for turn in range(args.passes):
        launches = [(hosts, ranks, name) for hosts, ranks in sizes for name in names]
        # In rotating order, so that what changes about the machine in an hour does not fall on one of them.
        for hosts, ranks, name in launches[turn % len(launches) :] + launches[: turn % len(launches)]:
            more = ["--strategies", name] if name else []
            more += ["--append"] if turn or args.append else []
            status = start(hosts, ranks, args, more)
            if status:
                failed.append(f"{name or 'links'} on {ranks * (hosts or 1)} ranks (exit status {status})")
    for what in failed:
        print(f"error: failed: {what}", file=sys.stderr)
    return int(bool(failed))


def ranks_of(args: argparse.Namespace) -> list[int]:
    """Of each launch: per machine, or per made host."""
    if not args.hosts:
        return args.ranks or [1]
    if args.ranks:
        raise UserError("--ranks and --hosts: give --ranks-per-host beside --hosts, and --ranks without it")
    return args.ranks_per_host


def child_arguments(args: argparse.Namespace) -> list[str]:
    """Those of a launch: as here, but for what says which launches there are."""
    words: list[str] = []
    for name, value in vars(args).items():
        if name in DRIVERS or value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(value.resolve() if isinstance(value, Path) else value)]
    return words


def environment(args: argparse.Namespace) -> dict[str, str]:
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    return {
        **({"OMP_NUM_THREADS": "1"} if on_cpu else {}),
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}),
    }


def torchrun(ranks: int, *options: str) -> list[str]:
    module = [f"--nproc-per-node={ranks}", "-m", "benchmarks.scaling"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *module]


def start(count: int, ranks: int, args: argparse.Namespace, more: list[str]) -> int:
    """Here, or with `ranks` on each of `count` made hosts; what one of them fails with, all end with."""
    words, here = [*child_arguments(args), *more], environment(args)
    if not count:
        return subprocess.run([*torchrun(ranks, "--standalone"), *words], env=here).returncode
    from benchmarks.scaling.hosts import Hosts, available

    if (reason := available()) is not None:
        raise UserError(f"--hosts: no hosts can be made here: {reason}; use --ranks")
    with Hosts(count, mbit=args.mbit, delay_ms=args.delay_ms) as hosts:
        meeting = [f"--nnodes={count}", f"--master-addr={hosts.addresses[0]}", f"--master-port={PORT}"]
        commands = [[*torchrun(ranks, *meeting, f"--node-rank={node}"), *words] for node in range(count)]
        launchers = [hosts.popen(node, command, env=here) for node, command in enumerate(commands)]
        return first_failure(launchers)  # where one has failed, leaving ends the others


def first_failure(launchers: list[subprocess.Popen[Any]]) -> int:
    while True:
        statuses = [launcher.poll() for launcher in launchers]
        if any(statuses) or None not in statuses:
            return next((status for status in statuses if status), 0)
        time.sleep(0.2)
