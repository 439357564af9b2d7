"""Memory of one rank under each parallel strategy: held after the build, peak while loading, peak in a step.

Every strategy runs in processes of its own and as training does (`build`, then `Trainer.train_step`), on few
tokens, without activation checkpointing. The figures are the largest over the ranks, beyond what the process held
when a tiny model had been built and trained in it.

A CPU is measured by resident anonymous memory, whose peak is the kernel's own high-water mark (Linux only); glibc
is told to give large blocks back at once. What is offloaded lies in that memory too. A GPU is measured by torch's
allocator, where there are as many GPUs as ranks. ZeRO is left out where DeepSpeed is not installed.

    python -m benchmarks.planning.strategy_memory [--strategies fsdp zero3+cpu_offload ...] [--hidden 1024 ...]
"""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.models import add_shape, run_config, sizes, write_model
from benchmarks.common.results import ROOT, chosen_device, default_path, parser_of, save
from dora_dist.cli import leave
from dora_dist.config import RunConfig, load_config
from dora_dist.data.batches import GlobalBatch
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer

RANKS = {
    "ddp": [2], "fsdp": [2, 4], "fsdp+cpu_offload": [2],
    "zero1": [2], "zero2": [2], "zero3": [2, 4], "zero3+cpu_offload": [2],
}  # fmt: skip
VOCABULARY, TOKENS = 8192, 16
MODULE = "benchmarks.planning.strategy_memory"
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(64 << 10), "HF_HUB_OFFLINE": "1"}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.child:
        be_a_rank(args.child)
        leave(0)
    device = chosen_device(args.device)
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory), **sizes(args.hidden, args.layers, TOKENS, vocabulary=VOCABULARY))
        found = {
            f"{name} x{ranks}": result
            for name in args.strategies
            for ranks in RANKS[name]
            if (result := run(name, ranks, device, args, model)) is not None
        }
    if not found:
        return
    case = f"hidden {args.hidden} layers {args.layers} rank {args.rank} tokens 1x{TOKENS} {args.dtype}"
    settings = {"vocabulary": VOCABULARY, "steps": args.rounds, "hidden": args.hidden, "layers": args.layers,
                "rank": args.rank, "dtype": args.dtype, "tokens": TOKENS, "batch": 1}  # fmt: skip
    record = {"settings": settings, "strategies": found}
    save(args.out or default_path(device), "strategy_memory", case, device, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--strategies", nargs="+", choices=list(RANKS), default=list(RANKS), metavar="NAME",
                        help="default: all; the record then holds these alone")  # fmt: skip
    add_shape(parser, hidden=1024, layers=12, rank=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the base")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # a rank's own run, of this YAML
    parser.set_defaults(rounds=3)  # steps: the first makes the optimizer's state, the second ZeRO-3's prefetches
    return parser.parse_args(arguments)


def run(
    name: str, ranks: int, device: torch.device, args: argparse.Namespace, model: Path
) -> dict[str, Any] | None:
    """The figures of one strategy; None where it cannot run here."""
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        print(f"{name} x{ranks}: skipped, this machine has {torch.cuda.device_count()} GPU(s)")
        return None
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        print(f"{name} x{ranks}: skipped, DeepSpeed is not installed")
        return None
    strategy, _, offload = name.partition("+")
    settings = {"rank": args.rank, "dtype": args.dtype, "cpu_offload": bool(offload), "steps": args.rounds}
    print(f"{name} x{ranks}", flush=True)
    figures = measure(run_config(model, strategy, TOKENS, **settings), ranks, device)
    return {"strategy": name, "ranks": ranks, **figures}


def measure(config: RunConfig, ranks: int, device: torch.device) -> dict[str, int]:
    """Of a run in processes of its own: the figures, the largest over the ranks."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    no_gpus = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_text(config.to_yaml())
        write_model(path.parent / "tiny", **sizes(64, 2, config.data.seq_len, vocabulary=128))
        command = [sys.executable, *launcher, "-m", MODULE, "--child", str(path)]
        environment = {**os.environ, **CHILD_ENVIRONMENT, **no_gpus}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{config.parallel.strategy} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        each = [json.loads((path.parent / f"rank.{rank}").read_text()) for rank in range(ranks)]
    return {key: max(rank[key] for rank in each) for key in each[0]}


def be_a_rank(path: Path) -> None:
    """A rank's own run, of the YAML at `path`: its figures go beside it."""
    config = load_config(path)
    processes = Processes()
    processes.start(60)
    train(replace(config, model=replace(config.model, path=str(path.parent / "tiny"))))
    path.with_name(f"rank.{processes.rank}").write_text(json.dumps(train(config)))
    processes.stop()


def train(config: RunConfig) -> dict[str, int]:
    """Builds the model and takes the steps. Returns what was held, in bytes."""
    processes, steps = Processes(), config.train.steps
    blueprint = make_blueprint(config, Path(config.model.path))
    base = sum(tensor.nbytes for tensor in base_tensors(blueprint.model).values())
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    gc.collect()
    memory = Memory(processes.device)
    built = build_to_train(blueprint, strategy)
    loading_peak = memory.peak()
    gc.collect()
    held = memory.held()
    trainer = Trainer(built, config.model, config.train, config.data.packing, steps)
    rows, length = config.train.micro_batch_size, config.data.seq_len
    ids = torch.arange(length).expand(rows, length) % 128  # the tiny model knows as many words
    targets = rows * length * processes.world_size
    memory.reset_peak()
    for _ in range(steps):
        trainer.train_step(GlobalBatch([{"input_ids": ids, "targets": ids}], targets, targets))
    return {
        "base_bytes": base,
        "held_bytes": held,
        "loading_peak_bytes": loading_peak,
        "step_peak_bytes": memory.peak(),
    }


class Memory:
    """What this process holds beyond what it held when this was made, and the most it has held."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, 0
        self.start = self.held()
        self.reset_peak()

    def held(self) -> int:
        on_gpu = self.device.type == "cuda"
        return (torch.cuda.memory_allocated(self.device) if on_gpu else resident("RssAnon")) - self.start

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        # The high-water mark counts mapped files too, which only grow, by little after the tiny model's run.
        return resident("VmHWM") - resident("RssFile") - resident("RssShmem") - self.start

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
