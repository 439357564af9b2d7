"""A run's rows, as the model and the processes need them: tokenizer, global batches, evaluation."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from dora_dist.config import RunConfig
from dora_dist.data.batches import BatchPlan, evaluation_batches
from dora_dist.data.encode import begins_with_bos
from dora_dist.data.examples import load_examples
from dora_dist.data.streaming import StreamPlan
from dora_dist.errors import UserError
from dora_dist.io.fingerprint import tokenizer_fingerprint
from dora_dist.parallel.process import Processes


class RunData:
    """A run's tokenizer, its global batches and its evaluation rows."""

    def __init__(self, config: RunConfig, model: nn.Module, tokenizer: Any, processes: Processes):
        model_config: Any = model.config
        self.tokenizer = tokenizer
        self.causal = config.model.task == "causal_lm"
        self.pad_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        )
        model_config.pad_token_id = self.pad_id  # classifiers on decoders find a row's last token by it
        self._check_lengths(config, model)
        about: dict[str, Any] = {
            "task": config.model.task,
            "label2id": None if self.causal else model_config.label2id,
            "num_labels": None if self.causal else model_config.num_labels,
            "vocab_size": model_config.get_text_config().vocab_size,
        }
        split: dict[str, Any] = {
            "micro_batch_size": config.train.micro_batch_size,
            "rank": processes.rank,
            "world_size": processes.world_size,
            "pad_id": self.pad_id,
        }
        train_split = {**split, "accumulation": config.train.accumulation, "seed": config.train.seed}
        self.plan: BatchPlan | StreamPlan
        if config.data.streaming:
            if config.train.steps is None:
                raise UserError("train.steps: needed with data.streaming, because a stream's length is unknown")
            exchange = processes.all_gather_bytes
            self.plan = StreamPlan(
                config.data.train, config.data, tokenizer, exchange=exchange, **about, **train_split
            )
            self.steps = config.train.steps
            self._report = "streaming"
        else:
            examples = load_examples(config.data.train, config.data, tokenizer, **about)
            self.plan = BatchPlan(
                examples,
                **train_split,
                seq_len=config.data.seq_len,
                packing=config.data.packing,
                causal=self.causal,
            )
            self.steps = config.train.steps or math.ceil(config.train.epochs * self.plan.steps_per_epoch)
            self._report = str(examples.report)
        self.evaluation = None
        if config.data.eval is not None:
            rows = load_examples(config.data.eval, config.data, tokenizer, **about, key="data.eval")
            self._report += f"\nevaluation data: {rows.report}"
            self.evaluation = evaluation_batches(rows, **split, seq_len=config.data.seq_len, causal=self.causal)

        if isinstance(self.plan, StreamPlan):
            self.plan.start()  # now that nothing else renders chats

    def encode_prompt(self, text: str) -> Any:
        """A text to be continued, as a batch of one."""
        special = not begins_with_bos(self.tokenizer, text)
        return self.tokenizer(text, add_special_tokens=special, return_tensors="pt", return_token_type_ids=False)

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

    def _check_lengths(self, config: RunConfig, model: nn.Module) -> None:
        model_config: Any = model.config
        limit = getattr(model_config, "max_position_embeddings", None)
        if limit is None:
            return
        for name, module in model.named_modules():  # RoBERTa's positions begin behind the padding's
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limit -= module.padding_idx + 1
        if config.data.seq_len > limit:
            raise UserError(f"data.seq_len: {config.data.seq_len} exceeds the model's {limit} positions")
        for prompt in config.log.sample_prompts if self.causal else ():
            length = self.encode_prompt(prompt)["input_ids"].shape[1] + config.log.sample_tokens
            if length > limit:
                raise UserError(
                    f"log.sample_prompts: {prompt!r} and its completion need {length} of {limit} positions"
                )


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"model.path: {str(directory)!r} has no usable tokenizer: {reason}") from None
