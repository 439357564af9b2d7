"""Weak and strong scaling of training: tokens per second, and what a step sends and waits for, by world size.

A launch measures one world size and writes one record per strategy; the same script does so on a laptop and on a
cluster:

    torchrun --nproc-per-node 8 benchmarks/scaling.py --config my.yaml --strategies fsdp zero3 --mode weak
    deepspeed --hostfile hosts benchmarks/scaling.py ...
    srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES ... benchmarks/scaling.py ...
    python benchmarks/scaling.py --ranks 1 2 4 --strategies fsdp zero3 ddp     # starts the launches itself, here
    python benchmarks/scaling.py --hosts 1 2 --mbit 1000 --delay-ms 5          # on made hosts (Linux, root)
    python benchmarks/scaling.py --links --ranks 2                             # single collectives by size
    python benchmarks/scaling.py --draw [--out results/DIR]                    # curves of the records there

weak: every rank has the same rows whatever the world size. strong: --global-batch rows are divided, and what
does not divide is refused. Without --config a Llama with random weights is trained, whose size the flags say;
with it, what the YAML says, and only its rows are replaced by random ones. A step is that of a run: forward,
backward, exchange, clipping, AdamW, norms. Ranks begin each round together; its step lasts until the slowest has
done. A run also agrees on whether to end, by one number a step, which is not in here. Each launch of --ranks and
--hosts trains one strategy in processes of its own; a launch of yours with several trains them one after the
other, DeepSpeed's last, because they replace F.linear for the whole process. On a CPU a rank computes in one
thread, unless OMP_NUM_THREADS says otherwise.

Records lie in benchmarks/results/scaling/DEVICE/LINK (or --out) as MODE-STRATEGY-RANKS-ranks-HOSTS-hosts.json,
and links-RANKS-ranks-HOSTS-hosts.json. The same measurement again replaces its record, or with --append adds its
rounds; --passes makes the launches several times, in rotating order, and appends. A record holds the rounds as
they were measured, and of them median, min and max. Efficiency is computed where the curves are drawn:
throughput per rank over that of the smallest world size of the curve. first_loss is the same for every strategy,
and in strong scaling for every world size, or something else was computed.

probe_seconds is a fixed piece of work that each rank does by itself before each round, at the same time as the
others: it tells how fast the machine was just then, where neighbours or ranks share it.

Bytes are those of a collective's whole vector in one step: what an all-gather has gathered, what a reduce-scatter
or an all-reduce sums. A ring sends (N-1)/N of it to each rank, an all-reduce twice as much. collectives counts by
kind, purposes also by what for: gathers of the forward and of the backward, gradients, the optimizer's step with
the norm of the gradients, the refresh of DoRA's norms.

Exposed communication is the time that computing stands still for it: with gloo, the host's time in waits for
collectives, which is what a step would save if they took no time. It holds waiting for slower ranks, too, so
both ends are recorded: the rank that waits most, and the one that waits least, which comes last and waits for
the network alone. Copies into and out of the buffers count as computing. With NCCL it is the time in which
NCCL's kernels run and no other, of one more step under the profiler; that was never run yet.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from _results import RESULTS
from _scaling_curves import draw_all
from _scaling_links import measure_links
from _scaling_run import measure
from _scaling_start import start_all

from dora_dist.cli import leave
from dora_dist.errors import UserError

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
_SECONDS_FOR_RANK_0 = 5  # to say what is wrong; a mistake is the same on all ranks


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    launched = "RANK" in os.environ
    try:
        check(args, launched)
        if args.draw:
            if not draw_all(args.out or RESULTS / "scaling"):
                raise UserError(f"--draw: there are no records in {str(args.out or RESULTS / 'scaling')!r}")
        elif not launched and (args.ranks or args.hosts):
            return start_all(args)
        else:
            measure_links(args) if args.links else measure(args)
    except UserError as error:
        time.sleep(_SECONDS_FOR_RANK_0 if os.environ.get("RANK", "0") != "0" else 0)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def check(args: argparse.Namespace, launched: bool) -> None:
    """UserError: the options contradict each other."""
    if launched and (args.ranks or args.hosts):
        raise UserError("--ranks and --hosts start launches of their own; leave them out under a launcher")
    if args.hosts is None and not launched and (args.mbit is not None or args.delay_ms):
        raise UserError("--mbit and --delay-ms shape the links of --hosts; name a real link with --link")
    for name in ("rounds", "steps", "warmup", "global_batch", "passes", "batch", "accumulation"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is less than 1")
    counts = [*(args.ranks or ()), *(args.hosts or ()), *args.ranks_per_host]
    if any(count < 1 for count in counts):
        raise UserError("--ranks, --hosts and --ranks-per-host: a number is less than 1")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what is measured")
    what.add_argument("--config", type=Path, metavar="C.yaml", help="a run's, but for its rows")
    what.add_argument("--strategies", nargs="+", choices=STRATEGIES, metavar="NAME",
                      help=f"of {', '.join(STRATEGIES)}; default: what the configuration says")  # fmt: skip
    what.add_argument("--mode", choices=["weak", "strong"], default="weak")
    what.add_argument("--global-batch", type=int, default=8, help="rows of a step over all ranks, for strong")
    what.add_argument("--links", action="store_true", help="single collectives instead of steps")
    size = parser.add_argument_group("the model and its rows, without --config")
    size.add_argument("--hidden", type=int, default=384)
    size.add_argument("--layers", type=int, default=8)
    size.add_argument("--rank", type=int, default=16)
    size.add_argument("--tokens", type=int, default=256, help="of a row")
    size.add_argument("--batch", type=int, default=2, help="rows of a micro-batch")
    size.add_argument("--accumulation", type=int, default=1, help="micro-batches of a rank's step, for weak")
    size.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    how.add_argument("--rounds", type=int, default=9)
    how.add_argument("--steps", type=int, default=1, help="of a round, between two meetings of the ranks")
    how.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    how.add_argument("--link", help="what connects the ranks, for the records: 'NVLink, 400 Gb/s InfiniBand'")
    how.add_argument("--out", type=Path, help="directory of the records")
    how.add_argument("--append", action="store_true", help="add the rounds to those of the record that is there")
    how.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher
    start = parser.add_argument_group("without a launcher")
    start.add_argument("--ranks", type=int, nargs="+", metavar="N", help="launches on this machine")
    start.add_argument("--hosts", type=int, nargs="+", metavar="N", help="launches on as many made hosts")
    start.add_argument("--ranks-per-host", type=int, nargs="+", default=[1], metavar="N")
    start.add_argument("--mbit", type=float, help="that a made host can send, in Mbit/s; default: no limit")
    start.add_argument("--delay-ms", type=float, default=0.0, help="of a packet from a made host to another")
    start.add_argument("--passes", type=int, default=1, help="all launches as often, and the rounds together")
    start.add_argument("--draw", action="store_true", help="only draw the curves of the records that are there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(main())
