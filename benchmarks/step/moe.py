"""Time of a mixture-of-experts block with its router: DoRA and LoRA on all experts, ours and PEFT's, and frozen.

Contenders get the same W, A, B, m and tokens. First they are compared with plain fp64 mathematics: the experts'
output, and the gradients of tokens, router's weights and all that is trained. A pass is forward and backward; a
step has AdamW, too, and the norms of our DoRA. The frozen block's step is its pass. PEFT's LoRA on experts
(`target_parameters`) makes every expert's B A in each forward; PEFT has no DoRA on experts.

    python -m benchmarks.step.moe [--experts 16 --top-k 2 ...] [--four-bit]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.contenders import Contender, adapted, copy_sharing_weights, make_optimizer, make_ours, peft
from benchmarks.common.models import add_shape, random_model
from benchmarks.common.results import chosen_device, default_path, parser_of, ratios, save, spread
from benchmarks.common.timing import Seconds, growth, keep_freed_memory, time_rounds
from benchmarks.step.step_time import saved_bytes
from dora_dist import refresh_norms
from dora_dist.dora import grouped_kernels
from dora_dist.quant.nf4 import Nf4

DEFAULTS = {
    "cpu": {"hidden": 512, "intermediate": 512, "experts": 16, "top_k": 2, "tokens": 4096, "dtype": "float32"},
    "cuda": {"hidden": 2048, "intermediate": 768, "experts": 64, "top_k": 8, "tokens": 4096, "dtype": "bfloat16"},
}
RATIOS = [("ours dora", "ours lora"), ("ours dora", "frozen"), ("ours dora", "peft lora"), ("ours lora", "frozen")]
WAYS = {"experts at once": True, "experts in turn": False}  # on a GPU ours chooses one of them
RATIOS.append(("ours dora, experts at once", "ours dora, experts in turn"))
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}  # of the output and each gradient against fp64
CHECKED = 256  # tokens
NAMES = ("gate_up_proj", "down_proj")
SCALING = 2.0  # alpha is twice the rank


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    for name, default in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    keep_freed_memory()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    block = make_block(args, dtype, device)
    contenders = make_contenders(block, args)
    x, dy = (torch.randn(1, args.tokens, args.hidden, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    errors = {name: check(name, c.model, block, x.detach()[0, :CHECKED]) for name, c in contenders.items()}

    def pass_(contender: Contender) -> None:
        x.grad = None
        contender.model(x).backward(dy)

    def step(contender: Contender) -> None:
        pass_(contender)
        contender.optimizer.step()  # with our DoRA, the norms too
        contender.optimizer.zero_grad(set_to_none=True)

    def in_way(group: bool, work: Callable[[Contender], None]) -> None:
        grouped_kernels.force = group
        try:
            work(contenders["ours dora"])
        finally:
            grouped_kernels.force = None

    passes: dict[str, Callable[[], None]] = {name: lambda c=c: pass_(c) for name, c in contenders.items()}
    steps = {name: lambda c=c: step(c) for name, c in contenders.items()}
    for way, group in WAYS.items() if device.type == "cuda" else ():
        passes[f"ours dora, {way}"] = lambda group=group: in_way(group, pass_)
        steps[f"ours dora, {way}"] = lambda group=group: in_way(group, step)
    peaks = {}
    for name in [*steps, *steps]:  # warm up; the optimizer makes its state in the first step
        peaks[name] = growth(steps[name], device)
    record = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "device", "rounds")},
        "rounds": args.rounds,
        **times("pass", time_rounds(passes, args.rounds, device)),
        **times("step", time_rounds(steps, args.rounds, device)),
        "saved_bytes": {name: saved_bytes(c.model, lambda c=c: c.model(x)) for name, c in contenders.items()},
        "step_bytes": peaks if device.type == "cuda" else {},
        "errors": errors,
    }
    save(args.out or default_path(device), "moe", case_name(args), device, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_shape(parser, hidden=None, tokens=None, rank=16)
    parser.add_argument("--intermediate", type=int, help="of an expert")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--top-k", type=int, help="experts of a token")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in TOLERANCE])
    parser.add_argument("--four-bit", action="store_true", help="ours alone, over 4-bit experts")
    return parser.parse_args(arguments)


def case_name(args: argparse.Namespace) -> str:
    size = f"hidden {args.hidden} intermediate {args.intermediate} {args.experts} experts top-{args.top_k}"
    return f"{size} rank {args.rank} tokens {args.tokens} {args.dtype}" + " four-bit" * args.four_bit


def make_block(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Qwen3-MoE's, with the forward that transformers chooses for its experts."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_experts=args.experts,
        num_experts_per_tok=args.top_k, norm_topk_prob=True, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, vocab_size=8,
    )  # fmt: skip
    return random_model(config, dtype, device).model.layers[0].mlp.requires_grad_(False)


def make_contenders(block: nn.Module, args: argparse.Namespace) -> dict[str, Contender]:
    found = {
        f"ours {method}": make_ours(block, method, args.rank, targets=["experts"]) for method in ("dora", "lora")
    }
    if args.four_bit:
        for contender in found.values():
            for _, layer in adapted(contender.model):
                layer.pack(Nf4(*layer.weight.shape, layer.weight.dtype))
            refresh_norms(contender.model)
        return found
    frozen = nn.Parameter(torch.zeros(1))  # an optimizer needs one
    found["frozen"] = Contender(block, torch.optim.SGD([frozen]))
    if peft is not None:
        found["peft lora"] = make_peft(block, args.rank, trained_of(found["ours lora"].model))
    return found


def make_peft(block: nn.Module, rank: int, ours: dict[str, Tensor]) -> Contender:
    parameters = [f"experts.{name}" for name in NAMES]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=parameters)
    model = peft.get_peft_model(copy_sharing_weights(block), config)
    with torch.no_grad():
        for name, wrapper in wrappers(model).items():
            A, B = ours[f"{name}.lora_A"], ours[f"{name}.lora_B"]
            wrapper.lora_A["default"].weight.copy_(A)
            experts = A.shape[0] // rank  # of B's columns theirs has the expert's number fastest
            wrapper.lora_B["default"].weight.copy_(B.view(experts, -1, rank).permute(1, 2, 0).flatten(1))
    return Contender(model, make_optimizer(model))


def wrappers(model: nn.Module) -> dict[str, Any]:
    """PEFT's, one around the other, by the parameter that each adapts."""
    return {m.parameter_name: m for m in model.modules() if hasattr(m, "parameter_name")}


def check(name: str, model: nn.Module, block: nn.Module, x_TH: Tensor) -> dict[str, float]:
    """Relative errors of output and gradients against fp64. SystemExit: it computes something else."""
    with torch.no_grad():
        _, routed, index = block.gate(x_TH)
    given = {"x": x_TH.clone().requires_grad_(), "weights": routed.clone().requires_grad_()}
    experts = model.get_submodule("base_model.model.experts" if hasattr(model, "base_model") else "experts")
    y = experts(given["x"], index, given["weights"])
    dy = torch.randn_like(y)
    y.backward(dy)
    leaves = given | trained_of(model)
    wide = {key: leaf.detach().double().requires_grad_() for key, leaf in leaves.items()}
    weights = {key: weight_of(wide, key, W) for key, W in bases_of(model, block).items()}
    want = reference(wide["x"], index, wide["weights"], *weights.values())
    want.backward(dy.double())
    pairs = {"y": (y, want), **{f"d {key}": (leaf.grad, wide[key].grad) for key, leaf in leaves.items()}}
    errors = {key: ((a.double() - b).norm() / b.norm()).item() for key, (a, b) in pairs.items()}
    for leaf in leaves.values():
        leaf.grad = None
    if not max(errors.values()) <= TOLERANCE[x_TH.dtype]:
        raise SystemExit(f"moe: {name} computes something else: {errors}")
    return errors


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of each projection, by its name and kind."""
    theirs = {f"{name}.lora_{kind}": getattr(wrapper, f"lora_{kind}")["default"].weight
              for name, wrapper in wrappers(model).items() for kind in "AB"}  # fmt: skip
    return theirs or {
        f"{name.rpartition('.')[2]}.{kind}": parameter
        for name, layer in adapted(model)
        for kind, parameter in layer.named_parameters()
        if parameter.requires_grad
    }


def bases_of(model: nn.Module, block: nn.Module) -> dict[str, Tensor]:
    """The weights [E, out, in] that are adapted, as the contender computes with them."""
    own = {name.rpartition(".")[2]: layer.matrix[:] for name, layer in adapted(model)}
    given = {name: block.experts.get_parameter(name) for name in NAMES}
    return {name: own.get(name, W).reshape(W.shape).detach().double() for name, W in given.items()}


def weight_of(wide: dict[str, Tensor], name: str, W_EOI: Tensor) -> Tensor:
    """What the adapter makes of each expert's weight."""
    E, O, I = W_EOI.shape  # noqa: E741
    A, B, m = (wide.get(f"{name}.{kind}") for kind in ("lora_A", "lora_B", "magnitude"))
    if A is None or B is None:
        return W_EOI
    B_EOR = B.view(E, O, -1) if len(B) == E * O else B.view(O, -1, E).permute(2, 0, 1)
    V_EOI = W_EOI + SCALING * B_EOR @ A.view(E, -1, I)
    if m is None:
        return V_EOI
    dim = 2 if len(m) == E * O else 1
    return V_EOI * (m.view(E, -1) / V_EOI.detach().norm(dim=dim)).unsqueeze(dim)


def reference(x_TI: Tensor, index_TK: Tensor, weights_TK: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """A plain loop over the experts."""
    y = torch.zeros_like(x_TI)
    for e, (W_OI, W_IH) in enumerate(zip(first, last, strict=True)):
        token, place = torch.where(index_TK == e)
        gate, up = (x_TI[token] @ W_OI.t()).chunk(2, dim=-1)
        y = y.index_add(0, token, (F.silu(gate) * up) @ W_IH.t() * weights_TK[token, place, None])
    return y


def times(kind: str, seconds: Seconds) -> dict[str, Any]:
    return {
        f"{kind}_seconds": {name: spread(values) for name, values in seconds.items()},
        f"{kind}_ratios": ratios(seconds, RATIOS),
    }


if __name__ == "__main__":
    main()
