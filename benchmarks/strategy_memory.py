"""Memory of one rank under each parallel strategy: held after the build, peak while loading, peak in a step.

Every strategy runs by itself under torchrun and as training does (`build`, then `Trainer.train_step`), on a Llama
with random weights and a few tokens, so that weights and what is made of them outweigh activations; activation
checkpointing is off. The figures are the largest over the ranks, and growth over what the process held before the
build, when a tiny model had been built and trained in it: what libraries load and keep is not counted.

A CPU is measured by the process's resident anonymous memory: pages count once they are written to, and the peak
is the kernel's own high-water mark, not sampled (Linux only). glibc is told to give large blocks back at once.
What is offloaded lies in that memory too, so there the offloading strategies show only what they add. A GPU is
measured by torch's allocator, and only where there are as many GPUs as ranks: on a machine with one GPU nothing is
measured, because one rank shards nothing. ZeRO is left out where DeepSpeed is not installed.

    python benchmarks/strategy_memory.py [--strategies fsdp zero3+cpu_offload ...] [--hidden 1024 --layers 12]
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
from types import SimpleNamespace

import torch
from _results import add_arguments, chosen_device, default_path, save

from dora_dist.backends.process import Processes
from dora_dist.build import build, choose_strategy, draw_blueprint
from dora_dist.cli import leave
from dora_dist.config import (
    DataConfig,
    DoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from dora_dist.data import GlobalBatch
from dora_dist.trainer import Trainer
from dora_dist.weights import base_tensors

RANKS = {
    "ddp": [2], "fsdp": [2, 4], "fsdp+cpu_offload": [2],
    "zero1": [2], "zero2": [2], "zero3": [2, 4], "zero3+cpu_offload": [2],
}  # fmt: skip
VOCABULARY, TOKENS = 8192, 16
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(64 << 10), "HF_HUB_OFFLINE": "1"}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.child:
        measure(load_config(args.child), args.rounds, args.out)
        leave(0)
    device = chosen_device(args.device)
    with tempfile.TemporaryDirectory() as directory:
        make_models(Path(directory), args)
        found = {
            f"{name} x{ranks}": result
            for name in args.strategies
            for ranks in RANKS[name]
            if (result := run(name, ranks, device, args, Path(directory))) is not None
        }
    if not found:
        return
    case = f"hidden {args.hidden} layers {args.layers} rank {args.rank} tokens 1x{TOKENS} {args.dtype}"
    settings = {"vocabulary": VOCABULARY, "steps": args.rounds, "hidden": args.hidden, "layers": args.layers,
                "rank": args.rank, "dtype": args.dtype, "tokens": TOKENS, "batch": 1}  # fmt: skip
    record = {"settings": settings, "strategies": found}
    save(args.out or default_path(device), "strategy_memory", case, device, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategies", nargs="+", choices=list(RANKS), default=list(RANKS), metavar="NAME",
                        help="default: all; the record then holds these alone")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the base")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a rank's own run, of this YAML
    add_arguments(parser)
    parser.set_defaults(rounds=3)  # steps: the first makes the optimizer's state, the second ZeRO-3's prefetches
    return parser.parse_args(arguments)


def make_models(directory: Path, args: argparse.Namespace, positions: int = TOKENS) -> None:
    """Directories with a config.json each: the model that is measured, and a tiny one."""
    from transformers import LlamaConfig

    shapes = {"model": (args.hidden, args.layers, VOCABULARY), "tiny": (64, 2, 128)}
    for name, (hidden, layers, vocabulary) in shapes.items():
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
            tie_word_embeddings=False, max_position_embeddings=positions,
        ).save_pretrained(directory / name)  # fmt: skip


def run(name: str, ranks: int, device: torch.device, args: argparse.Namespace, directory: Path) -> dict | None:
    """The figures of one strategy, the largest over its ranks; None where it cannot run here."""
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        print(f"{name} x{ranks}: skipped, this machine has {torch.cuda.device_count()} GPU(s)")
        return None
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        print(f"{name} x{ranks}: skipped, DeepSpeed is not installed")
        return None
    strategy, _, offload = name.partition("+")
    config = RunConfig(
        model=ModelConfig(path=str(directory / "model"), init="random", dtype=args.dtype),
        dora=DoraConfig(rank=args.rank, targets="all-linear"),
        data=DataConfig(train="none", seq_len=TOKENS),
        train=TrainConfig(steps=args.rounds),
        parallel=ParallelConfig(strategy=strategy, cpu_offload=bool(offload)),
    )
    (directory / "run.yaml").write_text(config.to_yaml())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
        "--child", str(directory / "run.yaml"), "--rounds", str(args.rounds), "--out", str(directory / "rank"),
    ]  # fmt: skip
    no_gpus = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    environment = {**os.environ, **CHILD_ENVIRONMENT, **no_gpus}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"strategy_memory: {name} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
    each = [json.loads((directory / f"rank.{rank}").read_text()) for rank in range(ranks)]
    largest = {key: max(rank[key] for rank in each) for key in each[0]}
    print_row(name, ranks, largest)
    return {"strategy": name, "ranks": ranks, **largest}


def print_row(name: str, ranks: int, figures: dict[str, int]) -> None:
    base = figures["base_bytes"]
    parts = {"held": "held_bytes", "loading": "loading_peak_bytes", "a step": "step_peak_bytes"}
    texts = [f"{what} {figures[key] / 1e6:6.0f} MB ({figures[key] / base:.2f})" for what, key in parts.items()]
    print(f"{name:18} x{ranks}   base {base / 1e6:.0f} MB   " + "   ".join(texts), flush=True)


def measure(config: RunConfig, steps: int, out: Path) -> None:
    """On one rank: writes its figures to OUT.RANK."""
    processes = Processes()
    processes.start(60)
    tiny = str(Path(config.model.path).parent / "tiny")
    train(replace(config, model=replace(config.model, path=tiny)), steps)
    figures = train(config, steps)
    Path(f"{out}.{processes.rank}").write_text(json.dumps(figures))
    processes.stop()


def train(config: RunConfig, steps: int) -> dict[str, int]:
    """Builds the model and takes `steps` steps. Returns what was held, in bytes."""
    processes = Processes()
    blueprint = draw_blueprint(config, Path(config.model.path))
    base = sum(tensor.nbytes for tensor in base_tensors(blueprint.model).values())
    strategy = choose_strategy(config, blueprint.model, processes)
    gc.collect()
    memory = Memory(processes.device)
    built = build(blueprint, strategy)
    loading_peak = memory.peak()
    gc.collect()
    held = memory.held()
    trainer = Trainer(config, built, strategy, SimpleNamespace(steps=steps, causal=True), log=None)
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
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.start
        return resident("RssAnon") - self.start

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
