"""DoRA in TRL's GRPOTrainer, on the small model of this repository; a rule rewards answers of 20 characters.
From the repository's root:

    python examples/grpo.py
    torchrun --nproc-per-node 2 examples/grpo.py --beta 0.04     # takes all of GRPOConfig
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from dora_dist import DoraConfig, inject_dora
from dora_dist.integrations import DoraTrainerMixin

MODEL, ROWS = "launch/quickstart/model", "launch/quickstart/data/train.jsonl"
WANTED_LENGTH = 20


class MyGRPO(DoraTrainerMixin, GRPOTrainer): ...


def length_reward(completions: list[str], **_: object) -> list[float]:
    """0 for an answer of the wanted length, less for each character too many or too few."""
    return [-abs(len(text) - WANTED_LENGTH) / WANTED_LENGTH for text in completions]


def main() -> None:
    parser = HfArgumentParser(GRPOConfig)
    parser.set_defaults(
        output_dir="runs/grpo", max_steps=20, per_device_train_batch_size=32, num_generations=8,
        max_completion_length=24, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, bf16=False,
        report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    (args,) = parser.parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model = inject_dora(model, DoraConfig(rank=16, alpha=32, targets="all-linear"))
    trainer = MyGRPO(
        model=model,
        args=args,
        reward_funcs=length_reward,
        train_dataset=load_dataset("json", data_files=ROWS, split="train").select_columns(["prompt"]),
        processing_class=AutoTokenizer.from_pretrained(MODEL, padding_side="left"),
    )
    trainer.train()
    trainer.save_model()  # the adapter, in PEFT's format


if __name__ == "__main__":
    main()
