"""What the norms of |W + s B A| cost: time, scratch memory, and bytes sent, against the number of ranks.

One weight: ours by tiles, and as PEFT computes it in every forward: B A by passing an identity matrix through both
factors, added to the weight. On a CPU PEFT is left out where its identity alone takes more than 1 GB.

The refresh after a step: rank 0's part (the largest) of one Llama block with random bf16 weights, sharded by the
real strategies over a fake process group. What collectives would bring is counted, not sent. A model's bytes are
those of one block times their number. Scratch is the most that is held beyond the model.

    python -m benchmarks.step.norm [--weights 4096x4096x16 ...] [--ranks 1 8 ...] [--hidden 4096 ...]
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.collectives import Counter
from benchmarks.common.memory import memory_profile
from benchmarks.common.models import add_shape, llama, sizes
from benchmarks.common.results import chosen_device, default_path, parser_of, ratios, save, spread
from benchmarks.common.timing import growth, time_rounds
from dora_dist import DoraConfig, inject_dora, refresh_norms
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.dora.norm_math import squared_norms
from dora_dist.models.build import materialize
from dora_dist.parallel.fsdp import Fsdp
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Ddp, Single
from dora_dist.parallel.shards import Shards
from dora_dist.planning.fake_group import fake_group

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
    found = {
        f"{name} x{ranks}": measure(name, ranks, args, device)
        for ranks in args.ranks
        for name in (("ddp", "fsdp") if ranks > 1 else ("single",))
    }
    case = f"refresh, a block of hidden {args.hidden} intermediate {args.intermediate} rank {args.rank} bfloat16"
    save(out, "norm", case, device, {"rounds": args.rounds, "refresh": found})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--weights", nargs="*", metavar="OUTxINxRANK")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8, 64, 1024], help="of the refresh")
    parser.add_argument("--intermediate", type=int, default=14336)
    add_shape(parser, hidden=4096, rank=16)  # of the refresh
    return parser.parse_args(arguments)


def compare(O: int, I: int, R: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    W_OI = torch.randn(O, I, generator=generator, device=device).to(dtype)
    A_RI = torch.randn(R, I, generator=generator, device=device) / math.sqrt(I)
    B_OR = torch.randn(O, R, generator=generator, device=device)
    ways = {
        "ours": lambda: squared_norms(W_OI, B_OR, A_RI, 2.0, 0).sqrt_(),
        "peft": lambda: peft_norm(W_OI, A_RI, B_OR),
    }
    if device.type == "cpu" and 4 * I * I > PEFT_IDENTITY_BYTES:
        del ways["peft"]
    want = (W_OI[:64].double() + 2.0 * B_OR[:64].double() @ A_RI.double()).norm(dim=1)
    for name, way in ways.items():  # PEFT's is rounded to the weight's dtype
        tolerance = 1e-2 if name == "peft" and dtype.itemsize < 4 else 1e-5
        torch.testing.assert_close(way()[:64].double(), want, rtol=tolerance, atol=0)
    scratch = {name: scratch_bytes(way, device) for name, way in ways.items()}
    seconds = time_rounds(ways, rounds, device)
    norms = {
        name: {
            "seconds": spread(values),
            "weight_bytes_per_second": W_OI.nbytes / spread(values)["median"],
            "scratch_bytes": scratch[name],
        }
        for name, values in seconds.items()
    }
    return {"rounds": rounds, "norms": norms, "ratios": ratios(seconds, [("ours", "peft")])}


@torch.no_grad()
def peft_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """DoraLinearLayer.get_lora_weight and get_weight_norm of PEFT 0.21, with its default fp32 adapters."""
    eye_II = torch.eye(A_RI.shape[1], device=A_RI.device, dtype=A_RI.dtype)
    BA_OI = ((eye_II @ A_RI.t()) @ B_OR.t()).t().to(W_OI.dtype)
    return torch.linalg.norm(W_OI + 2.0 * BA_OI, dim=1).to(W_OI.dtype)


def scratch_bytes(way: Callable[[], object], device: torch.device) -> int:
    """The most that is held beyond the inputs while `way` runs, its result included."""
    if device.type == "cuda":
        return growth(way, device)
    with tempfile.TemporaryDirectory() as directory:
        return memory_profile(lambda _: way(), Path(directory) / "trace.json")[0]


def measure(strategy: str, ranks: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A refresh by rank 0: its time without the collectives', its scratch, and what it would receive."""
    with fake_group(ranks, ranks):
        model, shards = sharded_block(strategy, args, device)
        weights = sum(shards.shape(layer.weight).numel() * 2 for layer in dora_layers(model).values())
        refresh = {"": lambda: refresh_norms(model, shards)}
        refresh[""]()
        with Counter() as counted:
            refresh[""]()
        return {
            "strategy": strategy,
            "ranks": ranks,
            "seconds": spread(time_rounds(refresh, args.rounds, device)[""]),
            "scratch_bytes": scratch_bytes(refresh[""], device),
            "collectives": {kind: row["count"] for kind, row in counted.by_collective().items()},
            "received_bytes": round(counted.received(ranks)),
            # The bf16 weights, which a step gathers for its forward and again for its backward.
            "weights_received_bytes": round(2 * weights * (1 - 1 / ranks)) if strategy == "fsdp" else 0,
        }


def sharded_block(strategy: str, args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Shards]:
    """Rank 0's part of a Llama of one block, heads of 128 and 4 of them to a key, as Llama 3's."""
    from transformers import LlamaForCausalLM

    shape = sizes(args.hidden, 1, 1, vocabulary=64, head=128, grouped=True, intermediate=args.intermediate)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama(**shape)).to(torch.bfloat16)
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


if __name__ == "__main__":
    main()
