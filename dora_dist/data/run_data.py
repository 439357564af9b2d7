"""A run's rows, as the model and the processes need them: tokenizer, global batches, evaluation."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from dora_dist.config import DataConfig, TrainConfig
from dora_dist.data.batches import BatchPlan, Collate, EvaluationBatches, Split
from dora_dist.data.encode import Encoder
from dora_dist.data.examples import Examples, load_examples
from dora_dist.data.formats import Labels
from dora_dist.data.sources import Source, find_source
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
        task: str,
        model: nn.Module,
        tokenizer: Any,
        processes: Processes,
    ):
        self.tokenizer, about = tokenizer, cast("Any", model.config)
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id or 0
        about.pad_token_id = self.pad_id  # classifiers on decoders find a row's last token by it
        labels = Labels(about.num_labels, about.label2id) if task == "sequence_classification" else None
        needed = _needed_format(task, train.objective)
        encoder = partial(
            Encoder, config, labels=labels, vocab_size=about.get_text_config().vocab_size, needed=needed
        )
        split = Split(train.micro_batch_size, train.accumulation, processes.rank, processes.world_size)
        collate = Collate(
            config.seq_len, self.pad_id, config.packing, task in ("causal_lm", "preference"),
            pairs=needed == "preference", others=needed == "unpaired_preference",
        )  # fmt: skip
        self.plan: BatchPlan | StreamPlan
        self._rows: dict[str, Source | Examples | None]
        if config.streaming:
            if train.steps is None:
                raise UserError("train.steps: needed with data.streaming, because a stream's length is unknown")
            source = find_source(config.train, streaming=True)
            own = encoder(copy.deepcopy(tokenizer))  # none can be used by two threads at once
            self.plan = StreamPlan(source, own, split, collate, train.seed, processes.all_gather_bytes)
            self.steps, self.report, self._rows = train.steps, "streaming", {"train": source, "eval": None}
        else:
            examples = load_examples(config.train, encoder(tokenizer))
            self.plan = BatchPlan(examples, split, collate, train.seed)
            self.steps = train.steps or math.ceil(train.epochs * self.plan.steps_per_epoch)
            self.report, self._rows = str(examples.report), {"train": examples, "eval": None}
        self.evaluation = None
        if config.eval is not None:
            examples = load_examples(config.eval, encoder(tokenizer), "data.eval")
            self.report += f"\nevaluation data: {examples.report}"
            self._rows["eval"] = examples
            self.evaluation = EvaluationBatches(examples, split, collate)
        if isinstance(self.plan, StreamPlan):
            self.plan.start()  # now that nothing else renders chats

    def news(self, last: bool = False) -> list[str]:
        """What to tell the user of a stream's rows, now that more of them are known; `last`: that was all."""
        return self.plan.news(last) if isinstance(self.plan, StreamPlan) else []

    def fingerprints(self) -> dict[str, str]:
        """What identifies tokenizer, training and evaluation rows ("none" where there are none)."""
        rows = {name: "none" if rows is None else rows.fingerprint for name, rows in self._rows.items()}
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer), **rows}


def _needed_format(task: str, objective: str | None) -> str | None:
    if task in ("preference", "reward_model"):
        return "unpaired_preference" if objective == "kto" else "preference"
    return "labels" if task == "sequence_classification" else None


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
        length = encode_prompt(tokenizer, prompt)["input_ids"].shape[1] + tokens
        if length > limit:
            raise UserError(
                f"log.sample_prompts: {prompt!r} and its completion need {length} of {limit} positions"
            )


def encode_prompt(tokenizer: Any, text: str) -> Any:
    """A text to be continued, as a batch of one."""
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # none is to be added
    return tokenizer(text, add_special_tokens=not begun, return_tensors="pt", return_token_type_ids=False)


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"model.path: {str(directory)!r} has no usable tokenizer: {reason}") from None
