"""Time of one adapted linear layer, forward and backward: DoRA and LoRA, ours and PEFT's, over dense and 4-bit W.

Every contender gets the same W, A, B, m and input, and its output and gradients are compared with plain fp64
mathematics first; the norm errors are in the record. Over 4-bit weights there are two ways to apply the ratio m/n:
riding on the scales of the weight's blocks before it is dequantized ("qdora", what bf16 layers do), and multiplied
to the fp32 product ("qdora, ratio apart"). The norm is cached, as in training: norm.py times it. Contenders
take turns within a process; ratios are medians over rounds of each round's own ratio.

    python benchmarks/layer.py [--shapes 2048x2048 ...] [--ranks 8 16 64 384] [--tokens 512] [--dtype bfloat16]
"""

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from _results import add_arguments, chosen_device, default_path, ratios, save, spread
from step_time import time_once
from torch import Tensor, nn

from dora_dist.decomposition import squared_norms
from dora_dist.functional import _DoraOut, adapted_linear
from dora_dist.quant import Nf4, dequantize, quantize

try:
    import peft
except ImportError:
    peft = None

SHAPES = {"cpu": ["1024x1024", "2048x768"], "cuda": ["4096x4096", "14336x4096"]}
RANKS = {"cpu": [16, 64], "cuda": [8, 16, 64, 384]}
TOKENS = {"cpu": 512, "cuda": 4096}
SCALING = 2.0
RATIOS = [
    ("dora", "lora"), ("dora", "peft lora"), ("dora", "peft dora"), ("qdora", "qlora"),
    ("qdora", "qdora, ratio apart"),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of output and gradients against fp64
Forward = Callable[[Tensor], Tensor]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    tokens = args.tokens or TOKENS[device.type]
    for shape, rank, dtype in itertools.product(
        args.shapes or SHAPES[device.type], args.ranks or RANKS[device.type], args.dtypes
    ):
        O, I = map(int, shape.split("x"))  # noqa: E741
        record = compare(O, I, rank, tokens, getattr(torch, dtype), device, args.rounds)
        case = f"{shape} rank {rank} tokens {tokens} {dtype}"
        save(args.out or default_path(device), "layer", case, device, record)
        print(f"{case}: forward and backward of a layer")
        for name, values in record["seconds"].items():
            error = max(record["errors"][name].values())
            print(f"  {name:20} {values['median'] * 1000:9.3f} ms   largest error {error:.1e}")
        for name, values in record["ratios"].items():
            print(f"  {name:28} {values['median']:.3f}   ({values['min']:.3f} .. {values['max']:.3f})", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="*", metavar="OUTxIN")
    parser.add_argument("--ranks", nargs="*", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtypes", nargs="*", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    add_arguments(parser)
    return parser.parse_args(arguments)


def compare(O: int, I: int, R: int, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict:  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * std

    W_OI = random(O, I, std=0.02).to(dtype)
    trained = {"A": random(R, I, std=1 / math.sqrt(I)), "B": random(O, R, std=0.01)}
    trained["m"] = squared_norms(W_OI, trained["B"], trained["A"], SCALING, 0).sqrt_() * (1 + random(O, std=0.01))
    x_TI, dy_TO = random(tokens, I).to(dtype).requires_grad_(), random(tokens, O).to(dtype)
    contenders = {**dense(W_OI, trained), **packed(W_OI, trained)}
    leaves = {name: {"x": x_TI, **own} for name, (_, own, _) in contenders.items()}
    errors = {name: check(name, forward, leaves[name], dy_TO, W) for name, (forward, _, W) in contenders.items()}

    def once(name: str) -> None:
        for leaf in leaves[name].values():
            leaf.grad = None
        contenders[name][0](x_TI).backward(dy_TO)

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(time_once(lambda name=name: once(name), device))
    return {
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": ratios(seconds, RATIOS),
        "errors": errors,
    }


def dense(W_OI: Tensor, trained: dict[str, Tensor]) -> dict[str, tuple[Forward, dict[str, Tensor], Tensor]]:
    """Name -> its forward, what it trains, and the weight that it computes with."""
    found = {}
    for name in ("dora", "lora"):
        own = copies(trained, name == "dora")
        found[name] = (ours(W_OI, own), own, W_OI)
        if peft is not None:
            found[f"peft {name}"] = (*peft_layer(W_OI, trained, name == "dora"), W_OI)
    return found


def packed(W_OI: Tensor, trained: dict[str, Tensor]) -> dict[str, tuple[Forward, dict[str, Tensor], Tensor]]:
    layout = Nf4(*W_OI.shape, W_OI.dtype)
    parts = quantize(W_OI, layout)
    W = dequantize(parts, layout)
    found = {}
    for name in ("qdora", "qlora", "qdora, ratio apart"):
        own = copies(trained, name != "qlora")
        forward = ours(parts, own, layout)
        if name == "qdora, ratio apart":
            n = norm(W, own)
            forward = lambda x, own=own, n=n: _DoraOut.apply(  # noqa: E731
                x, own["A"], own["B"], own["m"], n, None, None, 1.0, SCALING, False, layout, *parts
            )
        found[name] = (forward, own, W)
    return found


def copies(trained: dict[str, Tensor], dora: bool) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_() for name, t in trained.items() if dora or name != "m"}


def norm(W: Tensor, own: dict[str, Tensor]) -> Tensor:
    return squared_norms(W, own["B"].detach(), own["A"].detach(), SCALING, 0).sqrt_()


def ours(weight: Tensor | list[Tensor], own: dict[str, Tensor], layout: Nf4 | None = None) -> Forward:
    n = None
    if "m" in own:
        n = norm(weight if isinstance(weight, Tensor) else dequantize(weight, layout), own)
    return lambda x: adapted_linear(
        x, weight, own["A"], own["B"], own.get("m"), n, None, scaling=SCALING, layout=layout
    )


def peft_layer(W_OI: Tensor, trained: dict[str, Tensor], dora: bool) -> tuple[Forward, dict[str, Tensor]]:
    """PEFT's, with its default fp32 adapters."""
    linear = nn.Linear(*reversed(W_OI.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(W_OI, requires_grad=False)
    rank = trained["A"].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["linear"], use_dora=dora)
    model = peft.get_peft_model(nn.ModuleDict({"linear": linear}), config)
    layer: Any = model.base_model.model["linear"]
    own = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if dora:
        own["m"] = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(trained[name])
    return layer, own


def check(name: str, forward: Forward, leaves: dict[str, Tensor], dy_TO: Tensor, W_OI: Tensor) -> dict[str, float]:
    """Relative errors of output and gradients against fp64. SystemExit: it computes something else."""
    leaves["x"].grad = None  # which the contenders share
    y = forward(leaves["x"])
    y.backward(dy_TO)
    wide = {key: leaf.detach().double().requires_grad_() for key, leaf in leaves.items()}
    V = W_OI.double() + SCALING * wide["B"] @ wide["A"]
    want = wide["x"] @ V.t()
    if "m" in wide:
        want = want * (wide["m"] / V.detach().norm(dim=1))
    want.backward(dy_TO.double())
    pairs = {"y": (y, want), **{f"d{key}": (leaf.grad, wide[key].grad) for key, leaf in leaves.items()}}
    errors = {key: ((a.double() - b).norm() / b.norm()).item() for key, (a, b) in pairs.items()}
    if not max(errors.values()) <= TOLERANCE[W_OI.dtype]:
        raise SystemExit(f"layer: {name} computes something else: {errors}")
    return errors


if __name__ == "__main__":
    main()
