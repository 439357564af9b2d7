"""What `plan` says that a process will hold against what it does hold, on this machine's CPU.

Each case is trained for real, as strategy_memory.py does it, and rehearsed on fake tensors, where a CPU has gloo's
copies, too.

    python -m benchmarks.planning.plan_memory [--cases "fsdp x2" ...]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.models import SHAPES, add_shape, run_config, sizes, write_model
from benchmarks.common.results import default_path, save
from benchmarks.planning.strategy_memory import VOCABULARY, measure
from dora_dist.config import RunConfig
from dora_dist.planning.rehearse import Job, Rehearsals

CASES = [
    "single x1", "single x1 checkpointing", "single x1 4-bit", "ddp x2", "fsdp x2", "fsdp x2 checkpointing",
    "fsdp x2 4-bit checkpointing", "zero3 x2", "zero3 x2 checkpointing", "zero3 x2 4-bit", "fsdp x4",
    "fsdp x2 4-bit block of 70B", "zero3 x2 4-bit block of 70B",
]  # fmt: skip
BLOCK = "block of 70B"  # one, and a small vocabulary
STEPS = 3


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as directory, Rehearsals() as rehearse:
        for case in args.cases:
            config, ranks, shape = run_of(case, Path(directory) / case.replace(" ", "-"), args)
            measured = measure(config, ranks, device)
            found = rehearse(Job(config, Path(config.model.path), ranks, ranks, gpu=False))
            record = {
                "case": case, "ranks": ranks, "hidden": shape["hidden_size"], "layers": shape["num_hidden_layers"],
                "tokens": args.tokens, "dtype": config.model.dtype, "measured_bytes": measured["step_peak_bytes"],
                "planned_bytes": found.peak(loading=False), "measured_held_bytes": measured["held_bytes"],
            }  # fmt: skip
            save(args.out or default_path(device), "plan_memory", case, device, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    add_shape(parser, hidden=2048, layers=8, tokens=256)
    parser.add_argument("--out", type=Path, help="JSON file to add to; default: benchmarks/results/<device>.json")
    return parser.parse_args(arguments)


def run_of(case: str, directory: Path, args: argparse.Namespace) -> tuple[RunConfig, int, dict[str, Any]]:
    """What is trained, on how many ranks, and the model's sizes: twice as many layers in 4 bits, where a process's
    own growth would be a large part of what it holds."""
    strategy, ranks, *more = case.split()
    four_bit = "4-bit" in more
    shape = sizes(args.hidden, args.layers * (1 + four_bit), args.tokens, vocabulary=VOCABULARY)
    if BLOCK in case:
        shape = SHAPES["70B"] | {"num_hidden_layers": 1, "vocab_size": 256}
    config = run_config(
        write_model(directory, **shape), strategy, args.tokens, dtype="bfloat16" if four_bit else "float32",
        four_bit=four_bit, steps=STEPS, activation_checkpointing="checkpointing" in more,
    )  # fmt: skip
    return config, int(ranks[1:]), shape


if __name__ == "__main__":
    main()
