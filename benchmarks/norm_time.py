"""Time and scratch memory of one weight's norm, |W + s B A|, ours by tiles and as PEFT computes it.

PEFT forms B A by passing an identity matrix through both factors, adds it to the weight and takes the norm, in
every forward; we do it once per optimizer step.

    python benchmarks/norm_time.py [--shapes 4096x4096 ...] [--rank 16]
"""

import argparse
import math
from collections.abc import Callable

import torch
from _results import add_arguments, chosen_device, default_path, save, spread
from step_time import time_once
from torch import Tensor

from dora_dist.decomposition import squared_norms

SHAPES = {"cpu": ["768x768", "2048x768"], "cuda": ["4096x4096", "14336x4096", "8192x28672"]}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in args.shapes or SHAPES[device.type]:
        norms = compare(*map(int, shape.split("x")), args.rank, dtype, device, args.rounds)
        case = f"{shape} rank {args.rank} {str(dtype).removeprefix('torch.')}"
        save(args.out or default_path(device), "norm_time", case, device, {"norms": norms})
        print(f"{case}: a norm")
        for name, values in norms.items():
            scratch, rate = values["scratch_bytes"], values["weight_bytes_per_second"] / 1e9
            line = f"  {name:5} {values['seconds']['median'] * 1000:9.3f} ms   reads W at {rate:.1f} GB/s"
            print(line + ("" if scratch is None else f"   scratch {scratch / 2**20:.1f} MiB"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="*", metavar="OUTxIN")
    parser.add_argument("--rank", type=int, default=16)
    add_arguments(parser)
    return parser.parse_args(arguments)


def compare(O: int, I: int, rank: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict:  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    W_OI = torch.randn(O, I, generator=generator, device=device).to(dtype)
    A_RI = torch.randn(rank, I, generator=generator, device=device) / math.sqrt(I)
    B_OR = torch.randn(O, rank, generator=generator, device=device)
    ways = {"ours": lambda: tiled_norm(W_OI, A_RI, B_OR), "peft": lambda: peft_norm(W_OI, A_RI, B_OR)}
    # PEFT's is rounded to the weight's dtype.
    torch.testing.assert_close(
        ways["peft"]().float(), ways["ours"](), rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=0
    )
    scratch = {name: scratch_bytes(way, device) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(time_once(way, device))
    return {
        name: {
            "seconds": spread(values),
            "weight_bytes_per_second": W_OI.nbytes / spread(values)["median"],
            "scratch_bytes": scratch[name],
        }
        for name, values in seconds.items()
    }


def tiled_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    return squared_norms(W_OI, B_OR, A_RI, 2.0, 0).sqrt_()


@torch.no_grad()
def peft_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """DoraLinearLayer.get_lora_weight and get_weight_norm of PEFT 0.21, with its default fp32 adapters."""
    eye_II = torch.eye(A_RI.shape[1], device=A_RI.device, dtype=A_RI.dtype)
    BA_OI = ((eye_II @ A_RI.t()) @ B_OR.t()).t().to(W_OI.dtype)
    return torch.linalg.norm(W_OI + 2.0 * BA_OI, dim=1).to(W_OI.dtype)


def scratch_bytes(way: Callable[[], Tensor], device: torch.device) -> int | None:
    """The most that is held beyond the inputs while `way` runs, its result included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way()
    return torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    main()
