"""Memory of one 4-bit block of a 70B model, measured term by term and compared with what counting says; and the
account of the whole model on two 24 GB GPUs (configs/two-4090-70b.yaml), counted from its shape.

A checkpoint of random bf16 weights with one block of the real shape (hidden 8192, intermediate 28672, 64 and 8
heads; a small vocabulary) is written as safetensors, tensor by tensor. Every strategy runs by itself under
torchrun and as training does: `build` reads and quantizes the checkpoint, then steps are taken with different
numbers of tokens, so that what grows per token and what does not come apart. Activation checkpointing is off, so
that what a block keeps for its backward is seen; with it one block at a time makes and keeps the same.

Measured as strategy_memory.py measures, on a CPU, beyond what the process held when a tiny model had been built
and trained in it, the largest over the ranks. Pages of the mapped files are not the process's own and can be
dropped, so the peak while loading is given without them (resident anonymous memory, sampled each millisecond) and
with them (the kernel's high-water mark). What is offloaded lies in that memory too.

    python benchmarks/block_memory.py [--strategies fsdp zero3 ...] [--tokens 64 256] [--hidden 8192 ...]
"""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _account import SHAPE_70B, Shape, account
from _results import add_arguments, chosen_device, default_path, save
from strategy_memory import CHILD_ENVIRONMENT, Memory, resident
from strategy_memory import train as train_tiny

from dora_dist.backends.process import Processes
from dora_dist.build import Built, build, choose_strategy, draw_blueprint
from dora_dist.cli import leave
from dora_dist.config import (
    DataConfig,
    DoraConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from dora_dist.data import GlobalBatch
from dora_dist.trainer import Trainer
from dora_dist.weights import packed_layers

RANKS = {"fsdp": 2, "fsdp+cpu_offload": 2, "zero3": 2}
CONFIG_70B = Path(__file__).resolve().parents[1] / "configs" / "two-4090-70b.yaml"


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.child:
        measure(load_config(args.child), args.tokens, args.out)
        leave(0)
    device = chosen_device("cpu")
    shape = Shape(args.hidden, args.intermediate, 1, args.heads, args.kv_heads, args.vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory), shape, max(args.tokens))
        found = {
            f"{name} x{RANKS[name]}": result
            for name in args.strategies
            if (result := run(name, shape, args, Path(directory))) is not None
        }
    if not found:
        return
    case = f"hidden {args.hidden} intermediate {args.intermediate} rank {args.rank} bfloat16"
    settings = {"hidden": args.hidden, "intermediate": args.intermediate, "heads": args.heads,
                "kv_heads": args.kv_heads, "vocabulary": args.vocabulary, "rank": args.rank, "tokens": args.tokens,
                "checkpointing": False,
                "bitsandbytes": importlib.util.find_spec("bitsandbytes") is not None}  # fmt: skip
    config = load_config(CONFIG_70B)
    record = {"settings": settings, "strategies": found, "account": account(SHAPE_70B, config, ranks=2)}
    save(args.out or default_path(device), "block_memory", case, device, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategies", nargs="+", choices=list(RANKS), default=list(RANKS), metavar="NAME",
                        help="default: all; the record then holds these alone")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=SHAPE_70B.hidden)
    parser.add_argument("--intermediate", type=int, default=SHAPE_70B.intermediate)
    parser.add_argument("--heads", type=int, default=SHAPE_70B.heads)
    parser.add_argument("--kv-heads", type=int, default=SHAPE_70B.kv_heads)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=[64, 256], help="of one step each, per rank")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a rank's own run, of this YAML
    add_arguments(parser)
    return parser.parse_args(arguments)


def write_models(directory: Path, shape: Shape, tokens: int) -> None:
    """`model`, with random weights of the given shape, and `tiny`, a config.json alone."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    for name, s in {"model": shape, "tiny": Shape(64, 128, 2, 4, 2, 128)}.items():
        LlamaConfig(
            vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate,
            num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
            tie_word_embeddings=False, max_position_embeddings=max(tokens, 16), dtype="bfloat16",
        ).save_pretrained(directory / name)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, (name, (rows, columns)) in enumerate(shape.checkpoint().items(), start=1):
        weight = torch.ones(rows, dtype=torch.bfloat16)
        if columns:  # random rows, each there many times: a billion random numbers take long
            drawn = torch.empty(min(rows, 256), columns).normal_(0, 0.02, generator=generator).bfloat16()
            weight = drawn[torch.randint(drawn.shape[0], (rows,), generator=generator)]
        weight_map[name] = f"model-{number:05}.safetensors"
        save_file({name: weight}, directory / "model" / weight_map[name])
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def run(name: str, shape: Shape, args: argparse.Namespace, directory: Path) -> dict | None:
    """What one strategy holds, measured (the largest over its ranks) and counted; None: it cannot run here."""
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        print(f"{name}: skipped, DeepSpeed is not installed")
        return None
    strategy, _, offload = name.partition("+")
    config = RunConfig(
        model=ModelConfig(path=str(directory / "model")),
        dora=DoraConfig(rank=args.rank, targets="all-linear"),
        quant=QuantConfig(scheme="nf4"),
        data=DataConfig(train="none", seq_len=max(args.tokens)),
        train=TrainConfig(steps=1 + len(args.tokens)),
        parallel=ParallelConfig(strategy=strategy, cpu_offload=bool(offload)),
    )
    (directory / "run.yaml").write_text(config.to_yaml())
    ranks = RANKS[name]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
        "--child", str(directory / "run.yaml"), "--out", str(directory / "rank"),
        "--tokens", *map(str, args.tokens),
    ]  # fmt: skip
    environment = {**os.environ, **CHILD_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"block_memory: {name} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
    each = [json.loads((directory / f"rank.{rank}").read_text()) for rank in range(ranks)]
    measured = {key: max(rank[key] for rank in each) for key in each[0]}
    result = {"strategy": name, "ranks": ranks, "measured": measured, "counted": shape.counted(args.rank, ranks)}
    print_result(result)
    return result


def print_result(result: dict[str, Any]) -> None:
    measured, counted = result["measured"], result["counted"]
    print(f"{result['strategy']} x{result['ranks']}: loaded in {measured['load_seconds']:.0f} s, "
          f"norms in {measured['norm_seconds']:.1f} s")  # fmt: skip
    for key, value in measured.items():
        if not key.endswith("seconds"):
            by_count = (
                f"counted {counted[key] / 1e6:9.3f} MB   {value / counted[key]:.2f}x" if key in counted else ""
            )
            print(f"    {key:32} {value / 1e6:9.3f} MB   {by_count}".rstrip(), flush=True)


def measure(config: RunConfig, tokens: list[int], out: Path) -> None:
    """On one rank: writes its figures to OUT.RANK."""
    processes = Processes()
    processes.start(300)
    tiny = ModelConfig(path=str(Path(config.model.path).parent / "tiny"), init="random")
    train_tiny(replace(config, model=tiny), 1)
    figures = measure_block(config, tokens, processes)
    Path(f"{out}.{processes.rank}").write_text(json.dumps(figures))
    processes.stop()


def measure_block(config: RunConfig, tokens: list[int], processes: Processes) -> dict[str, float]:
    blueprint = draw_blueprint(config, Path(config.model.path), processes.world_size)
    strategy = choose_strategy(config, blueprint.model, processes)
    gc.collect()
    memory, other_pages = Memory(processes.device), resident("RssFile") + resident("RssShmem")
    start = time.perf_counter()
    with sampled() as seen:
        built = build(blueprint, strategy)
    seconds = time.perf_counter() - start
    loading = {
        "load_seconds": seconds,
        "loading_peak_bytes": seen[0] - memory.start,
        "loading_peak_with_files_bytes": resident("VmHWM") - memory.start - other_pages,
    }
    gc.collect()
    held = memory.held()
    trainer = Trainer(config, built, strategy, SimpleNamespace(steps=1 + len(tokens), causal=True), log=None)
    take_step(trainer, memory, min(tokens))  # makes the optimizer's states
    steps = [take_step(trainer, memory, count) for count in sorted(tokens)]
    gc.collect()
    slopes = {
        f"{name}_per_token": (steps[1][f"{name}_bytes"] - steps[0][f"{name}_bytes"]) / (max(tokens) - min(tokens))
        for name in ("saved", "between", "step_peak")
    }
    fixed = {
        f"{name}_fixed_bytes": steps[0][f"{name}_bytes"] - min(tokens) * slopes[f"{name}_per_token"]
        for name in ("saved", "between", "step_peak")
    }
    return {
        "base_bytes": packed_bytes(built),
        **loading,
        "held_bytes": held,
        "held_after_steps_bytes": memory.held(),
        **slopes,
        **fixed,
        "norm_seconds": trainer.norm_clock.seconds(),
        "step_seconds": steps[1]["seconds"],
    }


def take_step(trainer: Trainer, memory: Memory, tokens: int) -> dict[str, float]:
    """One optimizer step. Bytes: its peak, and what there is between forward and backward: in all, and in saved
    tensors that are no parameters."""
    engine, found = trainer.built.engine, dict[str, float]()
    backward = type(engine).backward
    saved: dict[int, int] = {}

    def look(loss: torch.Tensor) -> None:
        found["between_bytes"] = memory.held()
        backward(engine, loss)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_addresses(trainer.built.model):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine.backward = look
    ids = (torch.arange(tokens) % trainer.built.model.config.vocab_size).unsqueeze(0)
    targets = tokens * trainer.processes.world_size
    gc.collect()
    memory.reset_peak()
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train_step(GlobalBatch([{"input_ids": ids, "targets": ids}], targets, targets))
    found |= {"seconds": time.perf_counter() - start, "step_peak_bytes": memory.peak()}
    return found | {"saved_bytes": sum(saved.values())}


def parameter_addresses(model: torch.nn.Module) -> set[int]:
    locals_ = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return {p.untyped_storage().data_ptr() for p in locals_}


def packed_bytes(built: Built) -> int:
    """Of the 4-bit weights' parts, this rank's own."""
    parts = (part for layer in packed_layers(built.model).values() for part in layer.weight_parts)
    return sum(own.values.nbytes for part in parts for own in built.shards.rectangles(part))


@contextmanager
def sampled(interval: float = 1e-3) -> Iterator[list[int]]:
    """The process's resident anonymous memory while the block runs, by another thread."""
    seen, done = [resident("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            seen[0] = max(seen[0], resident("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
