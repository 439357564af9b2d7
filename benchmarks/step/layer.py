"""Time of one adapted linear layer, forward and backward: DoRA and LoRA, ours and PEFT's, over dense and 4-bit W.

Contenders get the same W, A, B, m and input and are first compared with plain fp64 mathematics. Over 4 bits m/n
rides on the scales of the weight's blocks ("qdora", what bf16 layers do), or is multiplied to the fp32 product
("qdora, ratio apart"). The norm is cached, as in training.

    python -m benchmarks.step.layer [--shapes 2048x2048 ...] [--ranks 8 16 64 384] [--tokens 512] ...
"""

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.contenders import peft
from benchmarks.common.results import chosen_device, default_path, parser_of, ratios, save, spread
from benchmarks.common.timing import time_rounds
from dora_dist.dora.functional import Constants, LinearOut, adapted_linear
from dora_dist.dora.norm_math import squared_norms
from dora_dist.quant.nf4 import Nf4, dequantize, quantize

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
Contender = tuple[Forward, dict[str, Tensor], Tensor]  # with what it trains, and the weight it computes with


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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="*", metavar="OUTxIN")
    parser.add_argument("--ranks", nargs="*", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtypes", nargs="*", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    return parser.parse_args(arguments)


def compare(O: int, I: int, R: int, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict:  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * std

    W_OI = random(O, I, std=0.02).to(dtype)
    trained = {"A": random(R, I, std=1 / math.sqrt(I)), "B": random(O, R, std=0.01)}
    trained["m"] = squared_norms(W_OI, trained["B"], trained["A"], SCALING, 0).sqrt_() * (1 + random(O, std=0.01))
    x_TI, dy_TO = random(tokens, I).to(dtype).requires_grad_(), random(tokens, O).to(dtype)
    contenders = make_contenders(W_OI, trained)
    leaves = {name: {"x": x_TI, **own} for name, (_, own, _) in contenders.items()}
    errors = {name: check(name, forward, leaves[name], dy_TO, W) for name, (forward, _, W) in contenders.items()}

    def once(name: str) -> None:
        for leaf in leaves[name].values():
            leaf.grad = None
        contenders[name][0](x_TI).backward(dy_TO)

    seconds = time_rounds({name: lambda name=name: once(name) for name in contenders}, rounds, device)
    return {
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": ratios(seconds, RATIOS),
        "errors": errors,
    }


def make_contenders(W_OI: Tensor, trained: dict[str, Tensor]) -> dict[str, Contender]:
    nf4 = Nf4(*W_OI.shape, W_OI.dtype)
    parts = quantize(W_OI, nf4)
    dequantized = dequantize(parts, nf4)
    found = {}
    for name in ("dora", "lora", "qdora", "qlora", "qdora, ratio apart"):
        weight, W, layout = (parts, dequantized, nf4) if name.startswith("q") else (W_OI, W_OI, None)
        own = {key: t.clone().requires_grad_() for key, t in trained.items() if "dora" in name or key != "m"}
        n = squared_norms(W, trained["B"], trained["A"], SCALING, 0).sqrt_() if "m" in own else None
        found[name] = (ours(weight, own, n, layout, apart="apart" in name), own, W)
        if peft is not None and layout is None:
            found[f"peft {name}"] = (*peft_layer(W_OI, trained, name == "dora"), W_OI)
    return found


def ours(weight: Any, own: dict[str, Tensor], n: Tensor | None, layout: Nf4 | None, apart: bool) -> Forward:
    A, B, m = (own.get(key) for key in "ABm")
    if apart:
        constants = Constants(SCALING, layout=layout)
        return lambda x: LinearOut.apply(x, A, B, m, n, None, None, constants, *weight)
    return lambda x: adapted_linear(x, weight, A, B, m, n, None, scaling=SCALING, layout=layout)


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
