"""DoRA in TRL's DPOTrainer, on the small model of this repository; the reference is that without adapters.
From the repository's root:

    python examples/dpo.py
    torchrun --nproc-per-node 2 examples/dpo.py --beta 0.2     # takes all of DPOConfig
"""

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer

from dora_dist import DoraConfig, inject_dora
from dora_dist.integrations import DoraTrainerMixin

MODEL, ROWS = "launch/quickstart/model", "launch/quickstart/data/train.jsonl"


class MyDPO(DoraTrainerMixin, DPOTrainer): ...


def make_pairs(rows: Dataset) -> Dataset:
    """Each prompt with its own answer and, rejected, another prompt's."""
    answers = rows["completion"]
    others = [*answers[1:], answers[0]]
    return rows.rename_column("completion", "chosen").add_column("rejected", others)


def main() -> None:
    parser = HfArgumentParser(DPOConfig)
    parser.set_defaults(
        output_dir="runs/dpo", max_steps=20, per_device_train_batch_size=8, learning_rate=2e-3,
        logging_steps=5, bf16=False, report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    (args,) = parser.parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model = inject_dora(model, DoraConfig(rank=16, alpha=32, targets="all-linear"))
    trainer = MyDPO(
        model=model,
        args=args,
        train_dataset=make_pairs(load_dataset("json", data_files=ROWS, split="train")),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )
    trainer.train()
    trainer.save_model()  # the adapter, in PEFT's format


if __name__ == "__main__":
    main()
