"""Time and peak memory of a whole training step: DoRA and LoRA, ours and PEFT's, in the same model.

A step is forward, cross-entropy, backward, AdamW and, for our DoRA, the refresh of the norms. The contenders share
one set of frozen weights and take turns within a process; every round times each of them once, in rotating order,
so that what disturbs the machine disturbs all. The ratios are medians over rounds of each round's own ratio. A CPU
is timed by the process's CPU time in one thread, a GPU by events.

Before anything is timed, ours and PEFT's must give the same loss from the same A, B and m. PEFT keeps its adapters
in fp32 beside a 16-bit base by default; there it competes with 16-bit adapters too ("16-bit"), which is faster and
rounds the magnitudes.

    python benchmarks/step_time.py [--hidden 768 --layers 4 --tokens 256 --batch 2 --rank 16 ...]
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _results import add_arguments, chosen_device, default_path, ratios, save, spread
from torch import Tensor, nn

from dora_dist import DoraConfig, attach_norm_refresh, inject_dora, refresh_norms
from dora_dist.layers import DoraLayer

try:
    import peft
except ImportError:
    peft = None

VOCABULARY = 2048  # small, so that the output head does not hide the adapted layers
DEFAULTS = {
    "cpu": {"hidden": 768, "layers": 4, "tokens": 256, "batch": 2, "dtype": "float32"},
    "cuda": {"hidden": 4096, "layers": 2, "tokens": 4096, "batch": 1, "dtype": "bfloat16"},
}
RATIOS = [
    ("ours dora", "ours lora"), ("ours dora", "peft lora"), ("ours dora", "peft dora"), ("ours lora", "peft lora"),
    ("ours dora", "peft lora 16-bit"), ("ours dora", "peft dora 16-bit"),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the loss, relative


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

    def held_bytes(self) -> int:
        """The model with the shared weights, and the optimizer's state."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *state])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    for name, default in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    torch.manual_seed(0)
    base = make_base(args, device)
    ids = torch.randint(VOCABULARY, (args.batch, args.tokens + 1), device=device)
    contenders = make_contenders(base, args)
    losses = {name: contender.loss(ids).item() for name, contender in contenders.items()}
    check_losses(losses, TOLERANCE[base.dtype])
    seconds, memory = measure(contenders, ids, args.rounds)
    record = summarize(seconds, memory, losses)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "rounds")}
    save(args.out or default_path(device), "step_time", case_name(args), device, {"settings": settings, **record})
    print_table(case_name(args), record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, help="per row")
    parser.add_argument("--batch", type=int, help="rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in TOLERANCE])
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    add_arguments(parser)
    return parser.parse_args(arguments)


def case_name(args: argparse.Namespace) -> str:
    tail = " checkpointing" if args.checkpointing else ""
    return f"hidden {args.hidden} rank {args.rank} tokens {args.batch}x{args.tokens} {args.dtype}{tail}"


def make_base(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A Llama with random weights; at hidden 4096, blocks of Llama 3 8B's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, args.hidden // (128 if args.hidden >= 2048 else 64))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size={768: 2048, 4096: 14336}.get(args.hidden, args.hidden * 8 // 3),
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=args.tokens,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device:
        model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_contenders(base: nn.Module, args: argparse.Namespace) -> dict[str, Contender]:
    """All with the same A and B, and magnitudes somewhat off the norms; over the same frozen weights."""
    contenders = {}
    for method in ("dora", "lora"):
        contenders[f"ours {method}"] = ours = make_ours(base, method, args.rank)
        if peft is not None:
            contenders[f"peft {method}"] = make_peft(base, method, args.rank, ours.model)
            if base.dtype.itemsize < 4:
                contenders[f"peft {method} 16-bit"] = make_peft(base, method, args.rank, ours.model, wide=False)
    return contenders


def make_ours(base: nn.Module, method: str, rank: int) -> Contender:
    config = DoraConfig(method=method, rank=rank, alpha=2 * rank, targets="all-linear")
    model = inject_dora(copy_sharing_weights(base), config)
    optimizer = make_optimizer(model)
    attach_norm_refresh(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted(model):
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator) / layer.in_features**0.5)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.01)
            if layer.magnitude is not None:
                layer.magnitude.mul_(
                    1 + 0.1 * torch.rand(layer.magnitude.shape, generator=generator).to(base.device)
                )
    refresh_norms(model)
    return Contender(model, optimizer)


def make_peft(base: nn.Module, method: str, rank: int, ours: nn.Module, wide: bool = True) -> Contender:
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
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
            raise SystemExit(f"step_time: {name} computes something else: its loss is {loss}, ours {ours}")


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
        "rounds": len(seconds["ours dora"]),
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
