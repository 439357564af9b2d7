"""A run's rows, as the model and the processes need them: tokenizer, global batches, evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dora_dist.config import DataConfig, TrainConfig
from dora_dist.data.batches import BatchPlan, evaluation_batches
from dora_dist.data.encode import Task, begins_with_bos
from dora_dist.data.examples import load_examples
from dora_dist.data.streaming import StreamPlan
from dora_dist.errors import UserError
from dora_dist.io.fingerprint import tokenizer_fingerprint
from dora_dist.parallel.process import Processes


class RunData:
    """A run's tokenizer, its global batches and its evaluation rows."""

    def __init__(
        self,
        config: DataConfig,
        train: TrainConfig,
        task: Task,
        model: nn.Module,
        tokenizer: Any,
        processes: Processes,
    ):
        model_config: Any = model.config
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id or 0
        model_config.pad_token_id = self.pad_id  # classifiers on decoders find a row's last token by it
        causal = task == "causal_lm"
        about: dict[str, Any] = {
            "task": task,
            "label2id": None if causal else model_config.label2id,
            "num_labels": None if causal else model_config.num_labels,
            "vocab_size": model_config.get_text_config().vocab_size,
        }
        split: dict[str, Any] = {
            "micro_batch_size": train.micro_batch_size,
            "rank": processes.rank,
            "world_size": processes.world_size,
            "pad_id": self.pad_id,
        }
        sizes: dict[str, Any] = {"seq_len": config.seq_len, "causal": causal}
        train_split = {**split, "accumulation": train.accumulation, "seed": train.seed}
        self.plan: BatchPlan | StreamPlan
        if config.streaming:
            if train.steps is None:
                raise UserError("train.steps: needed with data.streaming, because a stream's length is unknown")
            exchange = processes.all_gather_bytes
            self.plan = StreamPlan(config.train, config, tokenizer, exchange=exchange, **about, **train_split)
            self.steps, self._report = train.steps, "streaming"
        else:
            examples = load_examples(config.train, config, tokenizer, **about)
            self.plan = BatchPlan(examples, **train_split, **sizes, packing=config.packing)
            self.steps = train.steps or math.ceil(train.epochs * self.plan.steps_per_epoch)
            self._report = str(examples.report)
        self.evaluation = None
        if config.eval is not None:
            rows = load_examples(config.eval, config, tokenizer, **about, key="data.eval")
            self._report += f"\nevaluation data: {rows.report}"
            self.evaluation = evaluation_batches(rows, **split, **sizes)
        if isinstance(self.plan, StreamPlan):
            self.plan.start()  # now that nothing else renders chats

    def encode_prompt(self, text: str) -> Any:
        """A text to be continued, as a batch of one."""
        return _encode_prompt(self.tokenizer, text)

    def news(self, last: bool = False) -> list[str]:
        """What to tell the user of a stream's rows, now that more of them are known; `last`: that was all."""
        return self.plan.news(last) if isinstance(self.plan, StreamPlan) else []

    def fingerprints(self) -> dict[str, str]:
        """What identifies tokenizer, training and evaluation rows ("none" where there are none)."""
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "train": self.plan.fingerprint,
            "eval": "none" if self.evaluation is None else self.evaluation.fingerprint,
        }

    def describe(self) -> str:
        return f"data: {self._report}"


def check_lengths(model: nn.Module, tokenizer: Any, seq_len: int, prompts: Sequence[str], tokens: int) -> None:
    """UserError: rows, or prompts with `tokens` of a completion, are longer than the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    for name, module in model.named_modules():  # RoBERTa's positions begin behind the padding's
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    if seq_len > limit:
        raise UserError(f"data.seq_len: {seq_len} exceeds the model's {limit} positions")
    for prompt in prompts:
        length = _encode_prompt(tokenizer, prompt)["input_ids"].shape[1] + tokens
        if length > limit:
            raise UserError(
                f"log.sample_prompts: {prompt!r} and its completion need {length} of {limit} positions"
            )


def _encode_prompt(tokenizer: Any, text: str) -> Any:
    special = not begins_with_bos(tokenizer, text)
    return tokenizer(text, add_special_tokens=special, return_tensors="pt", return_token_type_ids=False)


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"model.path: {str(directory)!r} has no usable tokenizer: {reason}") from None
