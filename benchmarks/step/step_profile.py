"""Where a training step's time goes: torch's profiler over one step of our DoRA, beside the floor of its products.

The floor is the operations of all matrix products but attention's over the rate of one large product on the same
device. The profiler gives each operator's own time (CUDA kernels' on a GPU), by kind and for the longest. The
norms are timed by themselves, too. So is the host, which has started a step's last kernel after `host_seconds`:
where that is not below the step's own time, the GPU waits for the host.

    python -m benchmarks.step.step_profile [--rank 64] [--four-bit] [--checkpointing] [--hidden 768 --layers 4 ...]
"""

import statistics
import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.contenders import Contender, adapted, case_name, make_ours, parse, prepare, settings_of
from benchmarks.common.results import default_path, save
from benchmarks.common.timing import time_once
from dora_dist import refresh_norms

KINDS = {  # an operator belongs to the first kind that a part of its name names
    "attention": ("scaled_dot_product", "flash", "fmha"),
    "products": ("mm", "gemm", "cutlass", "cublas", "nvjet"),
    "optimizer": ("adamw", "adam"),
    "dequantization": ("dequantize", "bitsandbytes"),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse(__doc__, arguments)
    base, ids = prepare(args)
    device, contender = ids.device, make_ours(base, "dora", args.rank, args.four_bit)
    for _ in range(2):
        contender.step(ids)
    seconds = [time_once(lambda: contender.step(ids), device) for _ in range(args.rounds)]
    norms = [time_once(lambda: refresh_norms(contender.model), device) for _ in range(args.rounds)]
    rate = product_rate(device, getattr(torch, args.dtype), args.rounds)
    flops = count_flops(contender.model, args.batch * args.tokens, args.checkpointing)
    record = {
        "settings": settings_of(args),
        "step_seconds": statistics.median(seconds),
        "norm_seconds": statistics.median(norms),
        "host_seconds": statistics.median(host_seconds(contender, ids) for _ in range(args.rounds)),
        "flops": flops,
        "product_flops_per_second": rate,
        "floor_seconds": sum(flops.values()) / rate,
        **profiled(contender, ids),
    }
    save(args.out or default_path(device), "step_profile", case_name(args), device, record)


def count_flops(model: nn.Module, tokens: int, checkpointing: bool) -> dict[str, int]:
    """Multiplications and additions of a step's matrix products, but for attention's."""
    forwards = 2 if checkpointing else 1
    weights = low_rank = norms = 0
    for _, layer in adapted(model):
        rank, features = layer.spec.rank, layer.in_features + layer.out_features
        weights += layer.in_features * layer.out_features
        low_rank += rank * features
        norms += 2 * rank * layer.in_features * layer.out_features
    head = model.lm_head.weight.numel()
    return {
        "weights": 2 * tokens * ((forwards + 1) * weights + 2 * head),
        "low rank": 2 * tokens * (forwards + 2) * low_rank,
        "norms": norms,
    }


def product_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(time_once(lambda: a @ b, device) for _ in range(rounds + 1))


def host_seconds(contender: Contender, ids: torch.Tensor) -> float:
    """Until a step's last kernel has been started."""
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    start = time.perf_counter()
    contender.step(ids)
    return time.perf_counter() - start


def profiled(contender: Contender, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Seconds of one step by kind of operator, and of the ten longest."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ids.is_cuda else [])]
    with profile(activities=activities) as found:
        contender.step(ids)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
    seconds, each = dict.fromkeys([*KINDS, "the rest"], 0.0), {}
    for event in found.key_averages():
        own = (event.self_device_time_total if ids.is_cuda else event.self_cpu_time_total) / 1e6
        kind = next((k for k, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "the rest")
        seconds[kind] += own
        each[f"{event.key[:60]} x{event.count}"] = own
    longest = dict(sorted(each.items(), key=lambda item: -item[1])[:10])
    return {"profile_seconds": seconds, "longest_seconds": longest}


if __name__ == "__main__":
    main()
