"""One rank's part in scaling.py: trains with each strategy as a run does, and writes what was found as records."""

import argparse
import gc
import json
import os
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _results import default_path, environment, spread
from _scaling_comm import Counter, Phases, Waits, profiled_exposure, trained

from dora_dist.backends.process import Processes
from dora_dist.build import build, choose_strategy, draw_blueprint
from dora_dist.config import DataConfig, DoraConfig, ModelConfig, RunConfig, TrainConfig, load_config
from dora_dist.data import GlobalBatch
from dora_dist.errors import UserError
from dora_dist.hf_model import resolve_model
from dora_dist.target import peak_memory
from dora_dist.trainer import Trainer
from dora_dist.weights import base_tensors

VOCABULARY = 2048
PROBE_PARTS = 12
SAME = ("device", "versions", "mode", "strategy", "world_size", "hosts", "link", "settings")  # or no --append


@contextmanager
def run_config(args: argparse.Namespace) -> Iterator[RunConfig]:
    """What is trained: the YAML of --config, or a Llama of random weights of the size that the flags say."""
    with tempfile.TemporaryDirectory() as directory:
        if args.config:
            config = load_config(args.config)
        else:
            write_llama(Path(directory), args)
            dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
            config = RunConfig(
                model=ModelConfig(path=directory, init="random", dtype=dtype),
                dora=DoraConfig(rank=args.rank, targets="all-linear"),
                data=DataConfig(train="none", seq_len=args.tokens),
                train=TrainConfig(micro_batch_size=args.batch, accumulation=args.accumulation),
            )
        if config.model.task != "causal_lm":
            raise UserError(f"model.task: {config.model.task} is not measured here; use causal_lm")
        yield config


def write_llama(directory: Path, args: argparse.Namespace) -> None:
    from transformers import LlamaConfig

    heads = max(1, args.hidden // 64)
    if args.hidden % heads or args.hidden // heads % 2:
        raise UserError(f"--hidden: {args.hidden} cannot be shared by heads of 64; use a multiple of 64")
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        tie_word_embeddings=False, max_position_embeddings=args.tokens,
    ).save_pretrained(directory)  # fmt: skip


def shared_out(config: RunConfig, mode: str, global_batch: int, world_size: int) -> RunConfig:
    """`config` with each rank's part of a step. weak: the same for every world size. strong: `global_batch` rows
    are divided, so that accumulation shrinks first, and then the micro-batch.

    Raises:
        UserError: the rows do not divide.
    """
    if mode == "weak":
        return config
    rows, rest = divmod(global_batch, world_size)
    if rest:
        raise UserError(
            f"--global-batch: {global_batch} rows cannot be shared evenly by {world_size} ranks; choose a "
            f"multiple of {world_size}"
        )
    micro = min(config.train.micro_batch_size, rows)
    if rows % micro:
        raise UserError(
            f"--global-batch: {global_batch} rows leave {rows} to each of {world_size} ranks, which are no whole "
            f"micro-batches of {micro}; choose a multiple of {world_size * micro}"
        )
    return replace(config, train=replace(config.train, micro_batch_size=micro, accumulation=rows // micro))


def strategies_of(args: argparse.Namespace, config: RunConfig) -> list[str]:
    """DeepSpeed's come last: they replace F.linear for the whole process."""
    return sorted(args.strategies or [config.parallel.strategy], key=lambda name: name.startswith("zero"))


def measure(args: argparse.Namespace) -> None:
    """On every rank; rank 0 writes."""
    processes = Processes()
    if processes.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # torchrun sets it for two processes, and not for one
    with run_config(args) as config:
        config = shared_out(config, args.mode, args.global_batch, processes.world_size)
        processes.start(config.parallel.timeout_s, needed=processes.world_size > 1)
        names = {rank["host"] for rank in everyones(processes, {"host": socket.gethostname()}) or ()}
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


def link_of(args: argparse.Namespace, hosts: int) -> str | dict[str, float]:
    """What the records say of the network."""
    if args.mbit is not None or args.delay_ms:
        return {"mbit": args.mbit, "delay_ms": args.delay_ms}
    return args.link or ("one host" if hosts == 1 else "not told")


def directory_of(args: argparse.Namespace, about: dict[str, Any]) -> Path:
    if args.out:
        return args.out
    text = about["link"]
    if not isinstance(text, str):
        rate = "any" if text["mbit"] is None else f"{text['mbit']:g}"
        text = f"{rate} mbit {text['delay_ms']:g} ms"
    device = default_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return device.parent / "scaling" / device.stem / re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def measure_strategy(config: RunConfig, args: argparse.Namespace, processes: Processes) -> dict[str, Any] | None:
    """One strategy's record, on rank 0."""
    directory = resolve_model(config.model.path, config.model.allow_pickle)
    blueprint = draw_blueprint(config, directory, processes.world_size)
    base = sum(tensor.nbytes for tensor in base_tensors(blueprint.model).values())
    strategy = choose_strategy(config, blueprint.model, processes)
    processes.start(config.parallel.timeout_s, needed=strategy.needs_group)
    built = build(blueprint, strategy)
    phases = Phases()
    total = args.warmup + args.rounds * args.steps + 2
    data = SimpleNamespace(steps=total, causal=True)
    trainer = Trainer(config, built, strategy, data, log=None, watch=phases)  # type: ignore[arg-type]
    batch = make_batch(config, built.model.config.vocab_size, processes)
    first_loss = processes.sum_(trainer.train_step(batch)[0]).item()
    for _ in range(args.warmup - 1):
        trainer.train_step(batch)
    rounds = time_rounds(trainer, phases, batch, args, strategy.name)
    with Counter(phases) as counter:
        trainer.train_step(batch)
    own: dict[str, Any] = {"rounds": rounds, "peak": peak_memory(processes.device)}
    if processes.device.type == "cuda":
        own["profiled"] = profiled_exposure(lambda: trainer.train_step(batch), processes.device)
    ranks = everyones(processes, own)
    if ranks is None:
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
    on_gpu, rounds = trainer.device.type == "cuda", []
    waits = Waits(phases, trainer.built.model, reducer=strategy == "ddp" and trainer.processes.world_size > 1)
    for _ in range(args.rounds):
        trainer.processes.barrier()
        probe = probe_seconds(trainer.device)
        trainer.processes.barrier()
        if on_gpu:
            torch.cuda.synchronize(trainer.device)
        with waits.watched():
            start = time.perf_counter()
            norms = 0.0
            for _ in range(args.steps):
                trainer.train_step(batch)
                norms += 0.0 if on_gpu else trainer.norm_clock.seconds()
            if on_gpu:
                torch.cuda.synchronize(trainer.device)
                norms = trainer.norm_clock.seconds() * args.steps  # the last step's: to read each would wait
            seconds = time.perf_counter() - start
        found = waits.take()
        rounds.append({"probe": probe, "step": seconds / args.steps, "norms": norms / args.steps,
                       "waited": {name: value / args.steps for name, value in found.items()}})  # fmt: skip
    waits.close()
    return rounds


def probe_seconds(device: torch.device, before: Callable[[int], float] = lambda _: 0.0) -> float:
    """Of a fixed piece of work of this rank's alone, while the others do the same: how fast the machine is just
    now, shared as it is. Products and passes over memory, as in a step. `before` is called before each of its
    PROBE_PARTS parts, and the seconds that it returns are left out."""
    x, w = torch.ones(512, 512, device=device), torch.ones(512, 1408, device=device)
    start, other = time.perf_counter(), 0.0
    for part in range(PROBE_PARTS):
        other += before(part)
        y = torch.nn.functional.silu(x @ w)
        x = (y @ w.t()).mul_(1e-6)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start - other


def over_ranks(ranks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One round: the slowest rank's step and norms; of the waits the largest sum and the smallest, with phases."""
    sums = [sum(rank["waited"].values()) for rank in ranks]
    most, least = sums.index(max(sums)), sums.index(min(sums))
    return {
        "probe_seconds": max(rank["probe"] for rank in ranks),
        "step_seconds": max(rank["step"] for rank in ranks),
        "norm_seconds": max(rank["norms"] for rank in ranks),
        "waited_most": ranks[most]["waited"],
        "waited_least": ranks[least]["waited"],
    }


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of all its rounds."""
    rounds, settings = record["rounds"], record["settings"]
    tokens = record["world_size"] * settings["tokens_per_rank"]
    steps = spread([turn["step_seconds"] for turn in rounds])
    found: dict[str, Any] = {
        "tokens_per_second": spread([tokens / turn["step_seconds"] for turn in rounds]),
        "step_seconds": steps,
        "norm_seconds": spread([turn["norm_seconds"] for turn in rounds]),
        "probe_seconds": spread([turn["probe_seconds"] for turn in rounds]),
        "norm_share": statistics.median(turn["norm_seconds"] / turn["step_seconds"] for turn in rounds),
    }
    if "profiled_exposed_seconds" in record:
        return found | {"exposed_seconds": {k: spread([v]) for k, v in record["profiled_exposed_seconds"].items()}}
    ends = {"most": "waited_most", "least": "waited_least"}
    found["exposed_seconds"] = {
        end: spread([sum(turn[key].values()) for turn in rounds]) for end, key in ends.items()
    }
    found["exposed_by_phase"] = {
        end: {phase: statistics.median(turn[key][phase] for turn in rounds) for phase in rounds[0][key]}
        for end, key in ends.items()
    }
    return found


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


def everyones(processes: Processes, value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Each rank's value, in the order of the ranks, on rank 0."""
    parts = processes.gather_bytes(json.dumps(value).encode())
    return None if parts is None else [json.loads(part) for part in parts]


def save(directory: Path, record: dict[str, Any], append: bool) -> None:
    """Write one record; `append`: with the rounds of the one that is there, where it is of the same.

    Raises:
        UserError: it is of something else, and would be mixed with this.
    """
    about = "links" if record["kind"] == "links" else f"{record['mode']}-{record['strategy']}"
    path = directory / f"{about}-{record['world_size']:05}-ranks-{record['hosts']}-hosts.json"
    if append and path.is_file():
        before = json.loads(path.read_text())
        other = [key for key in SAME if before.get(key) != record.get(key)]
        if other:
            raise UserError(
                f"--append: {str(path)!r} is of something else ({other[0]}: {before.get(other[0])}, here "
                f"{record.get(other[0])}); choose another --out"
            )
        record["rounds"] = before["rounds"] + record["rounds"]
        if record["peak_memory_bytes"] is not None:
            record["peak_memory_bytes"] = max(record["peak_memory_bytes"], before["peak_memory_bytes"] or 0)
        record |= summary(record)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    if record["kind"] == "step":
        print(line_of(record), flush=True)
    print(f"  {path}", flush=True)


def line_of(record: dict[str, Any]) -> str:
    speed, step = record["tokens_per_second"]["median"], record["step_seconds"]
    least = record["exposed_seconds"]["least"]["median"]
    low, median, high = (f"{step[key] * 1e3:.1f}" for key in ("min", "median", "max"))
    return (
        f"{record['mode']} {record['strategy']:6} {record['world_size']:4} ranks, {record['hosts']} host(s): "
        f"{speed:,.0f} tokens/s, a step of {median} ms ({low} .. {high}), norms {record['norm_share']:.1%}, "
        f"exposed communication at least {least * 1e3:.1f} ms"
    )
