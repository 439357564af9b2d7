"""DoRA in transformers' Trainer, on the small model of this repository. From the repository's root:

python examples/trainer.py
torchrun --nproc-per-node 2 examples/trainer.py --max_steps 40     # takes all of TrainingArguments
"""

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
)

from dora_dist import DoraConfig, inject_dora
from dora_dist.integrations import DoraTrainer

MODEL, ROWS = "launch/quickstart/model", "launch/quickstart/data/train.jsonl"


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        output_dir="runs/trainer", max_steps=20, per_device_train_batch_size=8, learning_rate=5e-3,
        lr_scheduler_type="cosine", logging_steps=5, report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    (args,) = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model = inject_dora(model, DoraConfig(rank=16, alpha=32, targets="all-linear"))
    rows = load_dataset("json", data_files=ROWS, split="train").map(
        lambda row: tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token, truncation=True),
        remove_columns=["prompt", "completion"],
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = DoraTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model()  # the adapter, in PEFT's format


if __name__ == "__main__":
    main()
