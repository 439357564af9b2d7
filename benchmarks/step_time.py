"""Time and peak memory of a whole training step: DoRA and LoRA, ours and PEFT's, in the same model.

A step is forward, cross-entropy, backward, AdamW and, for our DoRA, the refresh of the norms. The contenders share
one set of frozen weights and take turns within a process; every round times each of them once, in rotating order,
so that what disturbs the machine disturbs all. The ratios are medians over rounds of each round's own ratio. A CPU
is timed by the process's CPU time in one thread, a GPU by events.

Before anything is timed, ours and PEFT's must give the same loss from the same A, B and m.

    python benchmarks/step_time.py [--rank 64] [--four-bit] [--compile] [--checkpointing] [--hidden 768 ...]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _contenders import (
    TOLERANCE,
    Contender,
    add_model_arguments,
    case_name,
    check_losses,
    make_contenders,
    prepare,
    settings_of,
)
from _results import add_arguments, default_path, ratios, save, spread
from torch import Tensor

RATIOS = [
    ("ours dora", "ours lora"), ("ours dora", "peft lora"), ("ours dora", "peft dora"), ("ours lora", "peft lora"),
    ("ours dora", "peft lora 16-bit"), ("ours dora", "peft dora 16-bit"),
    ("ours qdora", "ours qlora"), ("ours qdora", "peft qlora"), ("ours qdora", "peft qdora"),
]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    base, ids = prepare(args)
    device = ids.device
    contenders = make_contenders(base, args)
    losses = {name: contender.loss(ids).item() for name, contender in contenders.items()}
    check_losses(losses, TOLERANCE[base.dtype])
    seconds, memory = measure(contenders, ids, args.rounds)
    record = summarize(seconds, memory, losses)
    settings = settings_of(args)
    save(args.out or default_path(device), "step_time", case_name(args), device, {"settings": settings, **record})
    print_table(case_name(args), record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    add_arguments(parser)
    return parser.parse_args(arguments)


def measure(contenders: dict[str, Contender], ids: Tensor, rounds: int) -> tuple[dict, dict]:
    """Seconds of each round, and peak bytes (on a GPU), by contender."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = {}
    for name in names * 2:  # warm up; the optimizer makes its state in the first step
        memory[name] = peak_bytes(contenders[name], ids)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(time_once(lambda name=name: contenders[name].step(ids), ids.device))
    return seconds, memory if ids.is_cuda else {}


def time_once(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(contender: Contender, ids: Tensor) -> int:
    """The most that a step holds, were this contender alone on the GPU. Runs a step."""
    if not ids.is_cuda:
        contender.step(ids)
        return 0
    torch.cuda.reset_peak_memory_stats(ids.device)
    before = torch.cuda.memory_allocated(ids.device)
    contender.step(ids)
    return contender.held_bytes() + torch.cuda.max_memory_allocated(ids.device) - before


def summarize(seconds: dict[str, list[float]], memory: dict[str, int], losses: dict[str, float]) -> dict[str, Any]:
    found = ratios(seconds, RATIOS)
    for name, other in RATIOS:
        if memory and f"{name} / {other}" in found:
            found[f"{name} / {other}"]["peak_memory"] = memory[name] / memory[other]
    return {
        "rounds": len(next(iter(seconds.values()))),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": found,
        "peak_memory_bytes": memory,
        "first_loss": losses,
    }


def print_table(case: str, record: dict[str, Any]) -> None:
    print(f"{case}, {record['rounds']} rounds: a training step")
    for name, values in record["seconds"].items():
        memory = record["peak_memory_bytes"].get(name)
        median, low, high = (values[key] * 1000 for key in ("median", "min", "max"))
        line = f"  {name:18} {median:9.1f} ms   ({low:.1f} .. {high:.1f})"
        print(line + (f"   peak {memory / 2**20:,.0f} MiB" if memory else ""))
    for name, values in record["ratios"].items():
        line = f"  {name:28} {values['median']:.3f}   ({values['min']:.3f} .. {values['max']:.3f})"
        print(line + (f"   memory {values['peak_memory']:.3f}" if "peak_memory" in values else ""))


if __name__ == "__main__":
    main()
