"""Two published timings of DoRA, taken again with ours beside PEFT's: models of the same shapes, random weights.

- `kernels`: arXiv 2603.22276, an 8B model (the text part of Qwen3-VL-8B: Qwen3 8B's shape), all linear layers at
  rank 384, 8 micro-batches of one row of 4096 tokens with activation checkpointing, the loss of the last 1024
  positions. A cycle is the gradient alone, without the optimizer; ours has its norms in it all the same.
- `metamathqa`: PEFT's method comparison, a 3B model (Llama 3.2 3B's shape), q_proj and v_proj at rank 32, 4 rows
  of 384 tokens (PEFT's vary, up to 768), with AdamW's step.

The contenders share one set of frozen weights and take turns; every round is written as it is measured. Fewer
layers than the model has are named in the record: times fall with them, ratios hardly change.

    python benchmarks/published.py kernels metamathqa [--layers 9] [--seconds 60] [--contenders "ours dora" ...]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from _contenders import TOLERANCE, Contender, check_losses, make_ours, make_peft, peft
from _results import add_arguments, chosen_device, default_path, ratios, save, spread
from step_time import time_once
from torch import Tensor, nn

from dora_dist import refresh_norms

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 64,
}  # fmt: skip
CONTENDERS = ["ours dora", "peft dora", "ours lora", "peft lora"]
RATIOS = [("peft dora", "ours dora"), ("ours dora", "ours lora"), ("ours dora", "peft lora")]


@dataclass(frozen=True)
class Case:
    kind: str  # as transformers calls it
    shape: dict[str, Any]
    layers: int  # of them, as measured by default
    rank: int
    targets: str | list[str]
    rows: int
    tokens: int
    loss_tokens: int  # at the end of each row
    micro_batches: int
    checkpointing: bool
    optimizer: bool
    rounds: int
    published: dict[str, Any]


CASES = {
    "kernels": Case(
        "qwen3", QWEN3_8B, 9, 384, "all-linear", 1, 4096, 1024, 8, checkpointing=True, optimizer=False,
        rounds=3, published={
            "source": "arXiv 2603.22276", "device": "H200", "layers": 36,
            "ms": {"PEFT DoRA": 13653, "dense B A": 10762, "their kernels": 9104},
        },
    ),
    "metamathqa": Case(
        "llama", LLAMA_3B, 28, 32, ["q_proj", "v_proj"], 4, 384, 384, 1, checkpointing=False, optimizer=True,
        rounds=9, published={
            "source": "PEFT's method comparison on MetaMathQA", "layers": 28,
            "seconds": {"PEFT LoRA": 942, "PEFT DoRA": 1191}, "steps": 5000,
            "gigabytes": {"PEFT LoRA": 22.3, "PEFT DoRA": 24.5},
        },
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    for name in args.cases:
        case = CASES[name]
        if args.layers:
            case = replace(case, layers=args.layers)
        if args.tiny:
            case = replace(case, shape=case.shape | TINY, layers=1, rank=4, tokens=16, loss_tokens=8)
        measure(name, case, args, device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--layers", type=int, help="how many of the model's to build")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--seconds", type=float, default=300, help="after which no further round begins")
    parser.add_argument("--tiny", action="store_true", help="to try the script, not to measure")
    add_arguments(parser)
    parser.set_defaults(rounds=None)
    return parser.parse_args(arguments)


def measure(name: str, case: Case, args: argparse.Namespace, device: torch.device) -> None:
    end = time.monotonic() + args.seconds
    torch.manual_seed(0)
    base = make_base(case, device)
    contenders = make_contenders(base, case, args.contenders)
    ids = torch.randint(case.shape["vocab_size"], (case.micro_batches, case.rows, case.tokens + 1), device=device)
    losses = {who: loss_of(c, ids[0], case).item() for who, c in contenders.items()}
    check_losses(losses, TOLERANCE[base.dtype])
    memory = {who: peak_bytes(c, ids[:1], case) for who, c in contenders.items()}  # and a first, slower step
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    names = list(contenders)
    for turn in range(args.rounds or case.rounds):
        if turn and time.monotonic() > end:
            break
        for who in names[turn % len(names) :] + names[: turn % len(names)]:
            work: Callable[[], None] = lambda who=who: cycle(contenders[who], ids, case)  # noqa: E731
            seconds[who].append(time_once(work, device))
        record = {
            "settings": {k: v for k, v in asdict(case).items() if k not in ("rounds", "published")},
            "rounds": turn + 1,
            "seconds": {who: spread(values) for who, values in seconds.items()},
            "ratios": ratios(seconds, RATIOS),
            "peak_memory_bytes": memory if device.type == "cuda" else {},
            "first_loss": losses,
            "published": case.published,
        }
        save(args.out or default_path(device), "published", title(name, case), device, record)
    print_table(title(name, case), record)


def title(name: str, case: Case) -> str:
    of = case.shape["num_hidden_layers"]
    batches = f"{case.micro_batches} x {case.rows} x {case.tokens} tokens"
    return f"{name}: {case.layers} of {of} layers, rank {case.rank}, {batches}"


def make_base(case: Case, device: torch.device) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = case.shape | {"num_hidden_layers": case.layers, "max_position_embeddings": case.tokens}
    config = AutoConfig.for_model(case.kind, **settings, use_cache=False)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_contenders(base: nn.Module, case: Case, names: list[str]) -> dict[str, Contender]:
    made: dict[str, Contender] = {}
    for method in ("dora", "lora"):
        if any(name.endswith(method) for name in names):
            made[f"ours {method}"] = ours = make_ours(base, method, case.rank, targets=case.targets)
            if f"peft {method}" in names and peft is not None:
                made[f"peft {method}"] = make_peft(base, method, case.rank, ours.model, targets=case.targets)
    return {who: made[who] for who in names if who in made}


def loss_of(contender: Contender, ids: Tensor, case: Case) -> Tensor:
    logits = contender.model(input_ids=ids[:, :-1], logits_to_keep=case.loss_tokens).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, -case.loss_tokens :].flatten())


def cycle(contender: Contender, ids: Tensor, case: Case) -> None:
    """The gradient over all micro-batches, and what follows it until the next."""
    for micro_batch in ids:
        (loss_of(contender, micro_batch, case) / len(ids)).backward()
    if case.optimizer:
        contender.optimizer.step()  # with our DoRA, the norms too
    else:
        refresh_norms(contender.model)  # of PEFT's nothing is found
    contender.optimizer.zero_grad(set_to_none=True)


def peak_bytes(contender: Contender, ids: Tensor, case: Case) -> int:
    """The most that a cycle holds, were this contender alone on the GPU. Runs two."""
    cycle(contender, ids, case)  # the optimizer makes its state
    if not ids.is_cuda:
        return 0
    torch.cuda.synchronize(ids.device)
    torch.cuda.reset_peak_memory_stats(ids.device)
    before = torch.cuda.memory_allocated(ids.device)
    cycle(contender, ids, case)
    return contender.held_bytes() + torch.cuda.max_memory_allocated(ids.device) - before


def print_table(case: str, record: dict[str, Any]) -> None:
    print(f"{case}, {record['rounds']} rounds: a cycle")
    for who, values in record["seconds"].items():
        memory = record["peak_memory_bytes"].get(who)
        median, low, high = (values[key] * 1e3 for key in ("median", "min", "max"))
        line = f"  {who:12} {median:9.1f} ms   ({low:.1f} .. {high:.1f})"
        print(line + (f"   peak {memory / 1e9:.1f} GB" if memory else ""))
    for pair, values in record["ratios"].items():
        print(f"  {pair:24} {values['median']:.3f}   ({values['min']:.3f} .. {values['max']:.3f})")
    print(f"  published: {record['published']}", flush=True)


if __name__ == "__main__":
    main()
