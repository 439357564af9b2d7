"""Two published timings of DoRA, taken again with ours beside PEFT's: models of the same shapes, random weights.

- `kernels`: arXiv 2603.22276, Qwen3 8B's shape, all linear layers at rank 384, 8 micro-batches of one row of 4096
  tokens with activation checkpointing, the loss of the last 1024 positions. A cycle is the gradient, and our
  norms.
- `metamathqa`: PEFT's method comparison, Llama 3.2 3B's shape, q_proj and v_proj at rank 32, 4 rows of 384 tokens
  (PEFT's vary, up to 768), with AdamW's step.

Fewer layers than the model has are named in the record: times fall with them, ratios hardly change.

    python -m benchmarks.step.published kernels metamathqa [--layers 9] [--seconds 60] ...
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.contenders import TOLERANCE, Contender, check_losses, make_contenders
from benchmarks.common.models import random_model
from benchmarks.common.results import chosen_device, default_path, parser_of, ratios, save, show, spread
from benchmarks.common.timing import take_turns
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
    parser = parser_of(__doc__)
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--layers", type=int, help="how many of the model's to build")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--seconds", type=float, default=300, help="after which no further round begins")
    parser.add_argument("--tiny", action="store_true", help="to try the script, not to measure")
    parser.set_defaults(rounds=None)
    return parser.parse_args(arguments)


def measure(name: str, case: Case, args: argparse.Namespace, device: torch.device) -> None:
    from transformers import AutoConfig

    end = time.monotonic() + args.seconds
    torch.manual_seed(0)
    settings = case.shape | {"num_hidden_layers": case.layers, "max_position_embeddings": case.tokens}
    config = AutoConfig.for_model(case.kind, **settings, use_cache=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = random_model(config, dtype, device, case.checkpointing)
    contenders = make_contenders(base, case.rank, args.contenders, targets=case.targets)
    ids = torch.randint(case.shape["vocab_size"], (case.micro_batches, case.rows, case.tokens + 1), device=device)
    losses = {who: loss_of(c, ids[0], case).item() for who, c in contenders.items()}
    check_losses(losses, TOLERANCE[base.dtype])
    works = {who: lambda c=contender: cycle(c, ids, case) for who, contender in contenders.items()}
    memory = {}
    for who, contender in contenders.items():
        cycle(contender, ids[:1], case)  # the optimizer makes its state, and the first step is slower
        memory[who] = contender.peak_bytes(lambda c=contender: cycle(c, ids[:1], case), device)
    for seconds in take_turns(works, args.rounds or case.rounds, device, end):
        record = {
            "settings": {k: v for k, v in asdict(case).items() if k not in ("rounds", "published")},
            "rounds": len(seconds[next(iter(works))]),
            "seconds": {who: spread(values) for who, values in seconds.items()},
            "ratios": ratios(seconds, RATIOS),
            "peak_memory_bytes": memory if device.type == "cuda" else {},
            "first_loss": losses,
            "published": case.published,
        }
        save(args.out or default_path(device), "published", title(name, case), device, record, shown=False)
    show(title(name, case), record)


def title(name: str, case: Case) -> str:
    of = case.shape["num_hidden_layers"]
    batches = f"{case.micro_batches} x {case.rows} x {case.tokens} tokens"
    return f"{name}: {case.layers} of {of} layers, rank {case.rank}, {batches}"


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


if __name__ == "__main__":
    main()
