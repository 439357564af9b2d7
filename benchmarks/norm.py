"""What the norms of |W + s B A| cost: time, scratch memory, and bytes sent, against the number of ranks.

One weight: ours by tiles, and as PEFT computes it, taking turns. PEFT forms B A by passing an identity matrix
through both factors, adds it to the weight and takes the norm, in every forward; we do it once per optimizer step.
On a CPU PEFT is left out where its identity alone takes more than 1 GB.

The refresh after a step: one Llama block with random bf16 weights, sharded for N ranks by the real strategies over
a faked process group. The process is rank 0, whose part is the largest; it computes its part, and what the
collectives would bring it is counted, not sent: of an all-gather what the others hold, of an all-reduce twice that
(a ring's). Bytes grow with the blocks alone, so a model's are those of one block times their number. Scratch is
the most that is held beyond the model.

    python benchmarks/norm.py [--weights 4096x4096x16 ...] [--ranks 1 8 ...] [--hidden 4096 --intermediate 14336]
"""

import argparse
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _results import add_arguments, chosen_device, default_path, ratios, save, spread
from step_time import time_once
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist import DoraConfig, inject_dora, refresh_norms
from dora_dist.backends.fsdp import Fsdp
from dora_dist.backends.process import Processes
from dora_dist.backends.replicated import Ddp, Single
from dora_dist.build import materialize
from dora_dist.decomposition import squared_norms
from dora_dist.norms import dora_layers
from dora_dist.shards import Shards

WEIGHTS = {
    "cpu": ["768x768x16", "2048x768x16", "4096x4096x16", "8192x28672x384"],
    "cuda": [f"{shape}x{rank}" for rank in (16, 384) for shape in ("4096x4096", "14336x4096", "8192x28672")],
}
PEFT_IDENTITY_BYTES = 1e9
STRATEGIES: dict[str, Callable[[Processes], Single | Fsdp]] = {"single": Single, "ddp": Ddp, "fsdp": Fsdp}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    out = args.out or default_path(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for weight in args.weights or WEIGHTS[device.type]:
        O, I, R = map(int, weight.split("x"))  # noqa: E741
        record = compare(O, I, R, dtype, device, args.rounds)
        case = f"{O}x{I} rank {R} {str(dtype).removeprefix('torch.')}"
        save(out, "norm", case, device, record)
        print(f"{case}: a norm")
        for name, values in record["norms"].items():
            rate, scratch = values["weight_bytes_per_second"] / 1e9, values["scratch_bytes"] / 1e6
            print(f"  {name:5} {values['seconds']['median'] * 1000:9.3f} ms   reads W at {rate:.1f} GB/s   "
                  f"scratch {scratch:.2f} MB", flush=True)  # fmt: skip
    found = {f"{name} x{ranks}": measure(name, ranks, args, device) for name, ranks in worlds(args.ranks)}
    case = f"refresh, a block of hidden {args.hidden} intermediate {args.intermediate} rank {args.rank} bfloat16"
    save(out, "norm", case, device, {"rounds": args.rounds, "refresh": found})
    print(case)
    for name, values in found.items():
        seconds, scratch, received = (values[key] for key in ("seconds", "scratch_bytes", "received_bytes"))
        print(f"  {name:12} {seconds['median'] * 1000:8.1f} ms   scratch {scratch / 1e6:6.2f} MB   "
              f"receives {received / 1e6:.3f} MB by {values['collectives']}")  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", nargs="*", metavar="OUTxINxRANK")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8, 64, 1024], help="of the refresh")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16, help="of the refresh's adapters")
    add_arguments(parser)
    return parser.parse_args(arguments)


def compare(O: int, I: int, R: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    W_OI = torch.randn(O, I, generator=generator, device=device).to(dtype)
    A_RI = torch.randn(R, I, generator=generator, device=device) / math.sqrt(I)
    B_OR = torch.randn(O, R, generator=generator, device=device)
    ways = {"ours": lambda: tiled_norm(W_OI, A_RI, B_OR), "peft": lambda: peft_norm(W_OI, A_RI, B_OR)}
    if device.type == "cpu" and 4 * I * I > PEFT_IDENTITY_BYTES:
        del ways["peft"]
    want = (W_OI[:64].double() + 2.0 * B_OR[:64].double() @ A_RI.double()).norm(dim=1)
    for name, way in ways.items():  # PEFT's is rounded to the weight's dtype
        tolerance = 1e-2 if name == "peft" and dtype.itemsize < 4 else 1e-5
        torch.testing.assert_close(way()[:64].double(), want, rtol=tolerance, atol=0)
    scratch = {name: scratch_bytes(way, device) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(time_once(way, device))
    norms = {
        name: {
            "seconds": spread(values),
            "weight_bytes_per_second": W_OI.nbytes / spread(values)["median"],
            "scratch_bytes": scratch[name],
        }
        for name, values in seconds.items()
    }
    return {"rounds": rounds, "norms": norms, "ratios": ratios(seconds, [("ours", "peft")])}


def tiled_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    return squared_norms(W_OI, B_OR, A_RI, 2.0, 0).sqrt_()


@torch.no_grad()
def peft_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """DoraLinearLayer.get_lora_weight and get_weight_norm of PEFT 0.21, with its default fp32 adapters."""
    eye_II = torch.eye(A_RI.shape[1], device=A_RI.device, dtype=A_RI.dtype)
    BA_OI = ((eye_II @ A_RI.t()) @ B_OR.t()).t().to(W_OI.dtype)
    return torch.linalg.norm(W_OI + 2.0 * BA_OI, dim=1).to(W_OI.dtype)


def scratch_bytes(way: Callable[[], object], device: torch.device) -> int:
    """The most that is held beyond the inputs while `way` runs, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        way()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for _, change in sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak


def worlds(numbers: list[int]) -> Iterator[tuple[str, int]]:
    for ranks in numbers:
        yield from [("ddp", ranks), ("fsdp", ranks)] if ranks > 1 else [("single", 1)]


def measure(strategy: str, ranks: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A refresh by rank 0: its time without the collectives', its scratch, and what it would receive."""
    with faked_group(ranks):
        model, shards = sharded_block(strategy, args, device)
        weights = sum(shards.shape(layer.weight).numel() * 2 for layer in dora_layers(model).values())
        refresh_norms(model, shards)
        with CountedCollectives(ranks) as counted:
            refresh_norms(model, shards)
        return {
            "strategy": strategy,
            "ranks": ranks,
            "seconds": spread(
                [time_once(lambda: refresh_norms(model, shards), device) for _ in range(args.rounds)]
            ),
            "scratch_bytes": scratch_bytes(lambda: refresh_norms(model, shards), device),
            "collectives": dict(counted.calls),
            "received_bytes": round(counted.received),
            # The bf16 weights, which a step gathers for its forward and again for its backward.
            "weights_received_bytes": round(2 * weights * (1 - 1 / ranks)) if strategy == "fsdp" else 0,
        }


@contextmanager
def faked_group(ranks: int) -> Iterator[None]:
    """A process group of which this process is rank 0 and nobody else is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", WORLD_SIZE=str(ranks))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_block(strategy: str, args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Shards]:
    """Rank 0's part of a Llama of one block, heads of 128 and 4 of them to a key, as Llama 3's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, args.hidden // 128)
    config = LlamaConfig(
        vocab_size=64, hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = None  # its frequencies would have no values, and norms need none
    inject_dora(model, DoraConfig(rank=args.rank, targets="all-linear"))
    processes = Processes()
    processes.device = device
    made = STRATEGIES[strategy](processes)
    made.shard(model)
    materialize(model, made.parameter, device)
    shards = made.shards(model)
    with torch.no_grad():
        for parameter in model.parameters():
            for own in shards.rectangles(parameter):
                own.values.normal_(0, 0.02)
    return model, shards


class CountedCollectives(TorchDispatchMode):
    """Counts the collectives in its scope, and the bytes that one of `ranks` receives in them."""

    def __init__(self, ranks: int):
        super().__init__()
        self.others, self.calls, self.received = 1 - 1 / ranks, Counter[str](), 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__.strip("_")
            whole, times = {"allgather_base": (args[0], 1), "allreduce": (args[0][0], 2)}[name]
            self.calls[name] += 1
            self.received += times * whole.nbytes * self.others
        return function(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
