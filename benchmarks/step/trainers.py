"""Time of a step of TRL's SFTTrainer, sharded by accelerate's FSDP2 with activation checkpointing: DoRA and LoRA,
ours with DoraTrainerMixin and PEFT's.

Each round makes every contender's trainer anew over the same base and rows, in rotating order, and takes a few
steps, the first of which is not timed. A step lies between two of the trainer's callbacks: all micro-batches,
clipping, AdamW, and the norms of our DoRA. Adapters are fresh, so that the first losses must be equal.

    torchrun --nproc-per-node 2 -m benchmarks.step.trainers [--accumulation 4 ...]
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.common.contenders import check_losses
from benchmarks.common.models import VOCABULARY, add_shape, count, llama, random_model, sizes
from benchmarks.common.results import ROOT, chosen_device, default_path, parser_of, ratios, save, spread
from benchmarks.common.timing import Seconds
from dora_dist import DoraConfig, inject_dora
from dora_dist.integrations import DoraTrainerMixin

RATIOS = [("ours dora", "peft dora"), ("ours dora", "peft lora"), ("ours dora", "ours lora")]
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "activation_checkpointing": True}


class TheirSft(SFTTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        if self.args.device.type == "cpu":  # accelerate's FSDP takes GPUs alone; gloo serves
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class OurSft(DoraTrainerMixin, TheirSft): ...


class Clock(TrainerCallback):
    """Seconds of this process in each step, and by the wall."""

    def __init__(self, device: torch.device):
        self.device, self.process, self.wall = device, [], []

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        process, wall = (now - start for now, start in zip(self._now(), self._start, strict=True))
        self.process.append(process)
        self.wall.append(wall)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time(), time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = chosen_device(args.device)
    if "RANK" not in os.environ:
        raise SystemExit("start it on several ranks: torchrun --nproc-per-node 2 -m benchmarks.step.trainers")
    torch.manual_seed(0)
    config = llama(**sizes(args.hidden, args.layers, args.tokens, grouped=True))
    base = random_model(config, torch.float32, torch.device("cpu"))
    ids = torch.randint(VOCABULARY, (64, args.tokens)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    contenders: dict[str, Callable[[SFTConfig], SFTTrainer]] = {}
    for method in ("dora", "lora"):
        contenders[f"ours {method}"] = lambda config, method=method: ours(base, method, args.rank, config, rows)
        contenders[f"peft {method}"] = lambda config, method=method: theirs(base, method, args.rank, config, rows)
    names, seconds, wall, losses = list(contenders), Seconds(), Seconds(), {}
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found, by_wall, losses[name] = measure(contenders[name], args, device)
            seconds.setdefault(name, []).append(found)
            wall.setdefault(name, []).append(by_wall)
    check_losses(losses, 1e-5)
    if dist.get_rank() == 0:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "rounds")}
        record = {
            "settings": {**settings, "ranks": dist.get_world_size()},
            "rounds": args.rounds,
            "seconds": {name: spread(found) for name, found in seconds.items()},
            "ratios": ratios(seconds, RATIOS),
            "wall_seconds": {name: spread(found) for name, found in wall.items()},
            "wall_ratios": ratios(wall, RATIOS),
            "first_loss": losses,
        }
        case = (
            f"hidden {args.hidden} layers {args.layers} rank {args.rank} tokens {args.accumulation}x{args.tokens}"
        )
        case += f" on {dist.get_world_size()} ranks"
        save(args.out or default_path(device), "trainers", case, device, record)
    dist.destroy_process_group()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_shape(parser, hidden=512, layers=4, tokens=256, rank=16)
    parser.add_argument("--accumulation", type=count, default=4, help="micro-batches of one row in a step")
    parser.add_argument("--steps", type=count, default=3, help="timed ones of each round")
    return parser.parse_args(arguments)


def ours(base: nn.Module, method: Any, rank: int, config: SFTConfig, rows: Dataset) -> SFTTrainer:
    adapted = DoraConfig(method=method, rank=rank, alpha=2 * rank, targets="all-linear")
    return OurSft(model=inject_dora(copy.deepcopy(base), adapted), args=config, train_dataset=rows, **tokenizer())


def theirs(base: nn.Module, method: str, rank: int, config: SFTConfig, rows: Dataset) -> SFTTrainer:
    adapted = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    return TheirSft(model=copy.deepcopy(base), args=config, peft_config=adapted, train_dataset=rows, **tokenizer())


def tokenizer() -> dict[str, Any]:
    """Some; the rows have been tokenized."""
    return {"processing_class": AutoTokenizer.from_pretrained(ROOT / "launch/quickstart/model")}


def measure(
    make: Callable[[SFTConfig], SFTTrainer], args: argparse.Namespace, device: torch.device
) -> tuple[float, float, float]:
    """(a step's median seconds, the ranks' mean: of the process, on GPUs by the wall; by the wall; first loss)"""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            output_dir=directory, max_steps=args.steps + 1, per_device_train_batch_size=1, bf16=False,
            gradient_accumulation_steps=args.accumulation, learning_rate=1e-4, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
            save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
            activation_checkpointing=False, dataloader_pin_memory=False, use_cpu=device.type == "cpu",
            fsdp=True, fsdp_config=FSDP, ddp_backend="gloo" if device.type == "cpu" else None,
        )  # fmt: skip
        trainer, clock = make(config), Clock(device)
        trainer.add_callback(clock)
        trainer.train()
    process, wall = (statistics.median(seconds[1:]) for seconds in (clock.process, clock.wall))
    both = torch.tensor([process if device.type == "cpu" else wall, wall], device=device)
    dist.all_reduce(both)
    found = (both / dist.get_world_size()).tolist()
    return found[0], found[1], trainer.state.log_history[0]["loss"]


if __name__ == "__main__":
    main()
