"""What `plan` says that a process will hold against what it does hold, on this machine's CPU.

Each case is trained for real under its launcher, in processes of their own, as strategy_memory.py does: the
figure is the growth of the resident anonymous memory over what the process held before, the largest over the
ranks, the kernel's own high-water mark. Then it is rehearsed on fake tensors (dora_dist/rehearse.py), where a
CPU has gloo's copies, too.

    python benchmarks/plan_memory.py [--cases "fsdp x2" ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import strategy_memory
import torch
from _results import default_path, save

from dora_dist.config import (
    DataConfig,
    DoraConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dora_dist.rehearse import Job, Rehearsals

CASES = [
    "single x1", "single x1 checkpointing", "single x1 4-bit", "ddp x2", "fsdp x2", "fsdp x2 checkpointing",
    "fsdp x2 4-bit checkpointing", "zero3 x2", "zero3 x2 checkpointing", "zero3 x2 4-bit", "fsdp x4",
]  # fmt: skip
STEPS = 3


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as directory, Rehearsals() as rehearse:
        for case in args.cases:
            make_models(Path(directory), case, args)
            config, ranks = run_config(case, Path(directory), args)
            measured = measure(config, ranks, Path(directory))
            found = rehearse(Job(config, Path(config.model.path), ranks, ranks, gpu=False))
            record = {
                "case": case, "ranks": ranks, "hidden": args.hidden, "layers": layers_of(case, args),
                "tokens": args.tokens, "dtype": config.model.dtype, "measured_bytes": measured["step_peak_bytes"],
                "planned_bytes": found.peak(loading=False), "measured_held_bytes": measured["held_bytes"],
            }  # fmt: skip
            print_row(record)
            save(args.out or default_path(device), "plan_memory", case, device, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="JSON file to add to; default: benchmarks/results/<device>.json")
    return parser.parse_args(arguments)


def layers_of(case: str, args: argparse.Namespace) -> int:
    """Twice as many in 4 bits, where a process's own growth would be a large part of what it holds."""
    return args.layers * (2 if "4-bit" in case else 1)


def make_models(directory: Path, case: str, args: argparse.Namespace) -> None:
    sizes = argparse.Namespace(hidden=args.hidden, layers=layers_of(case, args))
    strategy_memory.make_models(directory, sizes, positions=args.tokens)


def run_config(case: str, directory: Path, args: argparse.Namespace) -> tuple[RunConfig, int]:
    strategy, ranks, *more = case.split()
    four_bit = "4-bit" in more
    config = RunConfig(
        model=ModelConfig(
            path=str(directory / "model"), init="random", dtype="bfloat16" if four_bit else "float32"
        ),
        dora=DoraConfig(targets="all-linear"),
        quant=QuantConfig(scheme="nf4" if four_bit else "none"),
        data=DataConfig(train="none", seq_len=args.tokens),
        train=TrainConfig(steps=STEPS, activation_checkpointing="checkpointing" in more),
        parallel=ParallelConfig(strategy=strategy),  # type: ignore[arg-type]
    )
    return config, int(ranks[1:])


def measure(config: RunConfig, ranks: int, directory: Path) -> dict[str, int]:
    """The largest figures over the ranks of a real run."""
    (directory / "run.yaml").write_text(config.to_yaml())
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        sys.executable, *launcher, strategy_memory.__file__, "--child", str(directory / "run.yaml"),
        "--rounds", str(STEPS), "--out", str(directory / "rank"),
    ]  # fmt: skip
    environment = {**os.environ, **strategy_memory.CHILD_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"plan_memory: {config.parallel.strategy} on {ranks} failed:\n{done.stderr[-4000:]}")
    each = [json.loads((directory / f"rank.{rank}").read_text()) for rank in range(ranks)]
    return {key: max(rank[key] for rank in each) for key in each[0]}


def print_row(record: dict[str, Any]) -> None:
    planned, measured = record["planned_bytes"], record["measured_bytes"]
    print(
        f"{record['case']:30} planned {planned / 1e6:7.0f} MB, measured {measured / 1e6:7.0f} MB, "
        f"{100 * (planned / measured - 1):+.1f} %",
        flush=True,
    )


if __name__ == "__main__":
    main()
