"""The trainings that benchmarks compare: DoRA and LoRA, ours and PEFT's, over one set of frozen weights.

PEFT keeps its adapters in fp32 beside a 16-bit base by default; there it competes with 16-bit adapters too
("16-bit"), which is faster and rounds the magnitudes. Over a 4-bit base the contenders are called qdora and qlora:
PEFT's on bitsandbytes' layers, with the same codes and fp32 scales.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.models import VOCABULARY, add_shape, llama, random_model, sizes
from benchmarks.common.results import chosen_device, parser_of
from benchmarks.common.timing import growth
from dora_dist import DoraConfig, attach_norm_refresh, inject_dora, refresh_norms
from dora_dist.config import QuantConfig
from dora_dist.dora.layers import DoraLayer
from dora_dist.models.quantize import pack_linears

try:
    import peft
except ImportError:
    peft = None
try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None

DEFAULTS = {
    "cpu": {"hidden": 768, "layers": 4, "tokens": 256, "batch": 2, "dtype": "float32"},
    "cuda": {"hidden": 4096, "layers": 2, "tokens": 4096, "batch": 1, "dtype": "bfloat16"},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the loss, relative
Targets = str | list[str]


@dataclass
class Contender:
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids[:, :-1]).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def step(self, ids: Tensor) -> None:
        self.loss(ids).backward()
        self.optimizer.step()  # with our DoRA, the norms too
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self, work: Callable[[], object], device: torch.device) -> int:
        """The most that `work` holds, were this contender alone on the GPU, with its model and its optimizer's
        state; 0 on a CPU. Runs it."""
        more = growth(work, device)
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        held = sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *state])
        return held + more if device.type == "cuda" else 0


def parse(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options that say which model is trained on what, and those of all benchmarks."""
    parser = parser_of(description)
    add_shape(parser, hidden=None, layers=None, tokens=None, batch=None, rank=16)
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in TOLERANCE])
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--four-bit", action="store_true", help="over a 4-bit base")
    parser.add_argument("--compile", action="store_true", help="every contender's blocks by torch.compile")
    return parser.parse_args(arguments)


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The base model and the rows [batch, tokens + 1] of every step, on the chosen device. Fills up `args`. At
    hidden 4096 blocks have Llama 3 8B's shape."""
    device = chosen_device(args.device)
    for name, default in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    torch.manual_seed(0)
    inner = {768: 2048, 4096: 14336}.get(args.hidden, args.hidden * 8 // 3)
    head = 128 if args.hidden >= 2048 else 64
    config = llama(**sizes(args.hidden, args.layers, args.tokens, head=head, grouped=True, intermediate=inner))
    base = random_model(config, getattr(torch, args.dtype), device, args.checkpointing)
    return base, torch.randint(VOCABULARY, (args.batch, args.tokens + 1), device=device)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of the model."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "device", "rounds")}


def case_name(args: argparse.Namespace) -> str:
    tail = "".join(f" {name}" for name in ("checkpointing", "four_bit", "compile") if getattr(args, name))
    size = f"hidden {args.hidden} rank {args.rank} tokens {args.batch}x{args.tokens} {args.dtype}"
    return size + tail.replace("_", "-")


def make_contenders(
    base: nn.Module, rank: int, names: Sequence[str] = (), four_bit: bool = False, targets: Targets = "all-linear"
) -> dict[str, Contender]:
    """Those of `names`, or all that there are here: with the same A and B, and magnitudes somewhat off the norms,
    over the same frozen weights."""
    contenders = {}
    quantized = bitsandbytes_base(base) if four_bit and peft and bitsandbytes else None
    for method in ("dora", "lora"):
        name = f"q{method}" if four_bit else method
        if names and not any(who.endswith(name) for who in names):
            continue
        contenders[f"ours {name}"] = ours = make_ours(base, method, rank, four_bit, targets)
        theirs = {f"peft {name}": True}
        if base.dtype.itemsize < 4 and not four_bit:
            theirs[f"peft {name} 16-bit"] = False
        for who, wide in theirs.items() if peft and (quantized or not four_bit) else ():
            if not names or who in names:
                contenders[who] = make_peft(quantized or base, method, rank, ours.model, wide, targets)
    return {who: contenders[who] for who in names or contenders if who in contenders}


def make_ours(
    base: nn.Module, method: str, rank: int, four_bit: bool = False, targets: Targets = "all-linear"
) -> Contender:
    config = DoraConfig(method=method, rank=rank, alpha=2 * rank, targets=targets)
    model = inject_dora(copy_sharing_weights(base), config)
    if four_bit:
        pack_linears(model, QuantConfig(scheme="nf4", double_quant=False))
    optimizer = make_optimizer(model)
    attach_norm_refresh(model, optimizer)
    device = next(base.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted(model):
            layer.lora_A.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.lora_B.normal_(0, 0.01, generator=generator)
            if layer.magnitude is not None:
                layer.magnitude.mul_(
                    1 + 0.1 * torch.rand(layer.magnitude.shape, generator=generator, device=device)
                )
    refresh_norms(model)
    return Contender(model, optimizer)


def make_peft(base: nn.Module, method: str, rank: int, ours: nn.Module, wide: bool, targets: Targets) -> Contender:
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy_sharing_weights(base), config, autocast_adapter_dtype=wide).train()
    with torch.no_grad():
        for name, layer in adapted(ours):
            theirs = model.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.magnitude is not None:
                theirs.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return Contender(model, make_optimizer(model))


def bitsandbytes_base(base: nn.Module) -> nn.Module:
    """The same with bitsandbytes' 4-bit layers, as transformers makes them; the output head stays."""
    model = copy_sharing_weights(base)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            made = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=base.dtype, quant_type="nf4"
            )
            made.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made.to(base.device))
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return model


def copy_sharing_weights(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, DoraLayer))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)


def check_losses(losses: dict[str, float], tolerance: float) -> None:
    for name, loss in losses.items():
        ours = losses["ours " + name.split()[1]]
        if not abs(loss - ours) <= tolerance * ours:  # true for NaN too
            raise SystemExit(f"{name} computes something else: its loss is {loss}, ours {ours}")
