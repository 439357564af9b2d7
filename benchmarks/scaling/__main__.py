"""Weak and strong scaling of training: tokens per second, and what a step sends and waits for, by world size.

A launch measures one world size and writes one record per strategy, on a laptop as on a cluster, from the
repository's root:

    torchrun --nproc-per-node 8 -m benchmarks.scaling --config my.yaml --strategies fsdp zero3 --mode weak
    deepspeed --hostfile hosts --module benchmarks.scaling ...
    srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES ... -m benchmarks.scaling ...
    python -m benchmarks.scaling --ranks 1 2 4 --strategies fsdp zero3 ddp     # starts the launches itself, here
    python -m benchmarks.scaling --hosts 1 2 --mbit 1000 --delay-ms 5          # on made hosts (Linux, root)
    python -m benchmarks.scaling --links --ranks 2                             # single collectives by size
    python -m benchmarks.scaling --draw [--out results/DIR]                    # curves of the records there

weak: every rank has the same rows whatever the world size. strong: --global-batch rows are divided. Without
--config a Llama with random weights is trained; with it what the YAML says, on random rows. A step is that of a
run: forward, backward, exchange, clipping, AdamW, norms; it lasts until the slowest rank has done. A launch of
yours with several strategies trains them one after the other, DeepSpeed's last. On a CPU a rank computes in one
thread, unless OMP_NUM_THREADS says otherwise.

Records lie in benchmarks/results/scaling/DEVICE/LINK (or --out). The same measurement again replaces its record,
or with --append adds its rounds; --passes makes the launches several times, in rotating order, and appends.
- probe_seconds: a fixed piece of work of each rank before each round, beside the others': how fast the machine
  was.
- first_loss is the same for every strategy, and in strong scaling for every world size, or something was wrong.
- Bytes are those of a collective's whole vector in one step. A ring sends (N-1)/N of it to each rank, an
  all-reduce twice as much.
- Exposed communication is the time that computing stands still for it: with gloo the host's waits for collectives,
  with NCCL (never tried yet) the time in which its kernels run and no other. It holds waiting for slower ranks, so
  both ends are recorded: the rank that waits most, and the one that waits least, for the network alone.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.common.models import add_shape, count
from benchmarks.common.results import RESULTS
from benchmarks.scaling.curves import STRATEGIES, draw_all
from benchmarks.scaling.links import measure_links
from benchmarks.scaling.measure import measure
from benchmarks.scaling.start import start_all
from dora_dist.cli import leave
from dora_dist.errors import UserError

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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what is measured")
    what.add_argument("--config", type=Path, metavar="C.yaml", help="a run's, but for its rows")
    what.add_argument("--strategies", nargs="+", choices=STRATEGIES, metavar="NAME",
                      help=f"of {', '.join(STRATEGIES)}; default: what the configuration says")  # fmt: skip
    what.add_argument("--mode", choices=["weak", "strong"], default="weak")
    what.add_argument("--global-batch", type=count, default=8, help="rows of a step over all ranks, for strong")
    what.add_argument("--links", action="store_true", help="single collectives instead of steps")
    size = parser.add_argument_group("the model and its rows, without --config")
    add_shape(size, hidden=384, layers=8, rank=16, tokens=256, batch=2)
    size.add_argument("--accumulation", type=count, default=1, help="micro-batches of a rank's step, for weak")
    size.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    how.add_argument("--rounds", type=count, default=9)
    how.add_argument("--steps", type=count, default=1, help="of a round, between two meetings of the ranks")
    how.add_argument("--warmup", type=count, default=3, help="steps before the first round")
    how.add_argument("--link", help="what connects the ranks, for the records: 'NVLink, 400 Gb/s InfiniBand'")
    how.add_argument("--out", type=Path, help="directory of the records")
    how.add_argument("--append", action="store_true", help="add the rounds to those of the record that is there")
    how.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher
    start = parser.add_argument_group("without a launcher")
    start.add_argument("--ranks", type=count, nargs="+", metavar="N", help="launches on this machine")
    start.add_argument("--hosts", type=count, nargs="+", metavar="N", help="launches on as many made hosts")
    start.add_argument("--ranks-per-host", type=count, nargs="+", default=[1], metavar="N")
    start.add_argument("--mbit", type=float, help="that a made host can send, in Mbit/s; default: no limit")
    start.add_argument("--delay-ms", type=float, default=0.0, help="of a packet from a made host to another")
    start.add_argument("--passes", type=count, default=1, help="all launches as often, and the rounds together")
    start.add_argument("--draw", action="store_true", help="only draw the curves of the records that are there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(main())
