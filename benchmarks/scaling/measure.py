"""One rank's part: trains with each strategy as a run does, and writes what was found as records."""

import argparse
import gc
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.collectives import Counter
from benchmarks.common.models import run_config, sizes, write_model
from benchmarks.common.results import environment
from benchmarks.common.timing import wall_seconds
from benchmarks.scaling.exposure import Phases, Waits, profiled_exposure, trained
from benchmarks.scaling.records import directory_of, link_of, over_ranks, save, summary
from dora_dist.config import RunConfig, load_config
from dora_dist.data.batches import GlobalBatch
from dora_dist.device import peak_memory
from dora_dist.errors import UserError
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.models.huggingface import resolve_model
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer

PROBE_PARTS = 12


@contextmanager
def run_of(args: argparse.Namespace) -> Iterator[RunConfig]:
    """What is trained: the YAML of --config, or a Llama of random weights of the size that the flags say."""
    with tempfile.TemporaryDirectory() as directory:
        if args.config:
            config = load_config(args.config)
        else:
            if args.hidden % 64:
                raise UserError(f"--hidden: {args.hidden} cannot be shared by heads of 64; use a multiple of 64")
            model = write_model(Path(directory), **sizes(args.hidden, args.layers, args.tokens))
            dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
            config = run_config(
                model, "auto", args.tokens, rank=args.rank, dtype=dtype, micro_batch_size=args.batch,
                accumulation=args.accumulation,
            )  # fmt: skip
        if config.model.task != "causal_lm":
            raise UserError(f"model.task: {config.model.task} is not measured here; use causal_lm")
        yield config


def shared_out(config: RunConfig, mode: str, global_batch: int, world_size: int) -> RunConfig:
    """`config` with each rank's part of a step. weak: the same for every world size. strong: `global_batch` rows
    are divided, so that accumulation shrinks first, and then the micro-batch. UserError: they do not divide."""
    if mode == "weak":
        return config
    rows, rest = divmod(global_batch, world_size)
    if rest:
        problem = (
            f"{global_batch} rows cannot be shared evenly by {world_size} ranks; choose a multiple of {world_size}"
        )
        raise UserError(f"--global-batch: {problem}")
    micro = min(config.train.micro_batch_size, rows)
    if rows % micro:
        problem = f"{rows} rows of a rank are no whole micro-batches of {micro}"
        raise UserError(f"--global-batch: {problem}; choose a multiple of {world_size * micro}")
    return replace(config, train=replace(config.train, micro_batch_size=micro, accumulation=rows // micro))


def strategies_of(args: argparse.Namespace, config: RunConfig) -> list[str]:
    """DeepSpeed's come last: they replace F.linear for the whole process."""
    return sorted(args.strategies or [config.parallel.strategy], key=lambda name: name.startswith("zero"))


def measure(args: argparse.Namespace) -> None:
    """On every rank; rank 0 writes."""
    processes = Processes()
    if processes.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # torchrun sets it for two processes, and not for one
    with run_of(args) as config:
        config = shared_out(config, args.mode, args.global_batch, processes.world_size)
        processes.start(config.parallel.timeout_s, needed=processes.world_size > 1)
        names = {rank["host"] for rank in everyones(processes, {"host": socket.gethostname()})}
        about = {"hosts": len(names), "link": link_of(args, len(names))}
        for number, name in enumerate(strategies_of(args, config)):
            asked = replace(config, parallel=replace(config.parallel, strategy=name))
            record = measure_strategy(asked, args, processes)
            if record is not None:
                if number and processes.device.type == "cpu":
                    record["peak_memory_bytes"] = None  # the process's, which the strategy before it has raised
                record = environment(processes.device) | about | record
                save(directory_of(args, record), record, args.append)
            gc.collect()
    processes.stop()


def measure_strategy(config: RunConfig, args: argparse.Namespace, processes: Processes) -> dict[str, Any] | None:
    """One strategy's record, on rank 0."""
    directory = resolve_model(config.model.path, config.model.allow_pickle)
    blueprint = make_blueprint(config, directory, processes.world_size)
    base = sum(tensor.nbytes for tensor in base_tensors(blueprint.model).values())
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    processes.start(config.parallel.timeout_s, needed=strategy.needs_group)
    built = build_to_train(blueprint, strategy)
    phases = Phases()
    total = args.warmup + args.rounds * args.steps + 2
    trainer = Trainer(
        built,
        config.model,
        config.train,
        config.data.packing,
        total,
        watch=phases,  # type: ignore[arg-type]
    )
    batch = make_batch(config, built.model.config.vocab_size, processes)
    first_loss = processes.sum_(trainer.train_step(batch)[0]).item()
    for _ in range(args.warmup - 1):
        trainer.train_step(batch)
    rounds = time_rounds(trainer, phases, batch, args, strategy.name)
    with Counter(phases.purpose) as counter:
        trainer.train_step(batch)
    own: dict[str, Any] = {"rounds": rounds, "peak": peak_memory(processes.device)}
    if processes.device.type == "cuda":
        own["profiled"] = profiled_exposure(lambda: trainer.train_step(batch), processes.device)
    ranks = everyones(processes, own)
    if not processes.is_main:
        return None
    settings = settings_of(config, args, built.model.config)
    trainable = sum(built.shards.shape(p).numel() for p in trained(built.model))
    record: dict[str, Any] = {
        "kind": "step", "mode": args.mode, "strategy": strategy.name, "world_size": processes.world_size,
        "settings": settings | {"base_bytes": base, "trained_parameters": trainable},
        "first_loss": first_loss,
        "collectives": counter.by_collective(), "purposes": counter.counts,
        "peak_memory_bytes": max(rank["peak"] for rank in ranks),
        "rounds": [over_ranks(turn) for turn in zip(*(rank["rounds"] for rank in ranks), strict=True)],
    }  # fmt: skip
    if processes.device.type == "cuda":
        profiled = [rank["profiled"] for rank in ranks]
        record["profiled_exposed_seconds"] = {"most": max(profiled), "least": min(profiled)}
    return record | summary(record)


def make_batch(config: RunConfig, vocabulary: int, processes: Processes) -> GlobalBatch:
    """This rank's rows of the same random ones whatever the world size, as data/batches.py shares them out."""
    size, accumulation, world = config.train.micro_batch_size, config.train.accumulation, processes.world_size
    micro_batches = []
    for index in range(accumulation):
        rows = []
        for row in range((index * world + processes.rank) * size, (index * world + processes.rank + 1) * size):
            generator = torch.Generator().manual_seed(row)
            rows.append(torch.randint(vocabulary, (config.data.seq_len,), generator=generator))
        ids = torch.stack(rows)
        micro_batches.append({"input_ids": ids, "targets": ids})
    tokens = world * accumulation * size * config.data.seq_len
    return GlobalBatch(micro_batches, tokens, tokens)


def time_rounds(
    trainer: Trainer, phases: Phases, batch: GlobalBatch, args: argparse.Namespace, strategy: str
) -> list[dict[str, Any]]:
    """This rank's seconds per step of each round. All ranks begin a round together."""
    on_gpu, rounds, norms = trainer.device.type == "cuda", [], list[float]()
    waits = Waits(phases, trainer.built.model, reducer=strategy == "ddp" and trainer.processes.world_size > 1)

    def steps() -> None:
        norms.clear()
        for _ in range(args.steps):
            trainer.train_step(batch)
            norms.extend([] if on_gpu else [trainer.norm_clock.seconds()])

    for _ in range(args.rounds):
        probe = probe_seconds(trainer.processes)
        trainer.processes.barrier()
        with waits.watched():
            seconds = wall_seconds(steps, trainer.device)
        norm = (
            trainer.norm_clock.seconds() if on_gpu else sum(norms) / args.steps
        )  # to read a GPU.s each would wait
        waited = {name: value / args.steps for name, value in waits.take().items()}
        rounds.append({"probe": probe, "step": seconds / args.steps, "norms": norm, "waited": waited})
    waits.close()
    return rounds


def probe_seconds(processes: Processes, before: Callable[[int], float] = lambda _: 0.0) -> float:
    """Of a fixed piece of work of this rank's alone, while the others do the same: how fast the machine is just
    now, shared as it is. Products and passes over memory, as in a step. `before` is called before each of its
    PROBE_PARTS parts, and the seconds that it returns are left out."""
    processes.barrier()
    x, w = torch.ones(512, 512, device=processes.device), torch.ones(512, 1408, device=processes.device)
    other = 0.0

    def work(x: torch.Tensor = x) -> None:
        nonlocal other
        for part in range(PROBE_PARTS):
            other += before(part)
            x = (torch.nn.functional.silu(x @ w) @ w.t()).mul_(1e-6)

    return wall_seconds(work, processes.device) - other


def settings_of(config: RunConfig, args: argparse.Namespace, model: Any) -> dict[str, Any]:
    shape = {
        "hidden": "hidden_size", "layers": "num_hidden_layers", "intermediate": "intermediate_size",
        "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "vocabulary": "vocab_size",
    }  # fmt: skip
    train, parallel = config.train, config.parallel
    return {
        **{name: getattr(model, key, None) for name, key in shape.items()},
        "method": config.dora.method, "rank": config.dora.rank, "dtype": config.model.dtype,
        "quant": config.quant.scheme,
        "tokens": config.data.seq_len, "micro_batch_size": train.micro_batch_size,
        "accumulation": train.accumulation,
        "tokens_per_rank": train.micro_batch_size * train.accumulation * config.data.seq_len,
        "activation_checkpointing": train.activation_checkpointing, "compile": train.compile,
        "replicas": parallel.replicas, "cpu_offload": parallel.cpu_offload,
        "threads": torch.get_num_threads(), "warmup": args.warmup, "steps_per_round": args.steps,
    }  # fmt: skip


def everyones(processes: Processes, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rank's value, in the order of the ranks."""
    return [json.loads(part) for part in processes.all_gather_bytes(json.dumps(value).encode())]
