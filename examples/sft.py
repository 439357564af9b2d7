"""DoRA in TRL's SFTTrainer, on the small model of this repository. From the repository's root:

python examples/sft.py
torchrun --nproc-per-node 2 examples/sft.py --max_steps 40     # takes all of SFTConfig
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from dora_dist import DoraConfig, inject_dora
from dora_dist.integrations import DoraTrainerMixin

MODEL, ROWS = "launch/quickstart/model", "launch/quickstart/data/train.jsonl"


class MySFT(DoraTrainerMixin, SFTTrainer): ...


def main() -> None:
    parser = HfArgumentParser(SFTConfig)
    parser.set_defaults(
        output_dir="runs/sft", max_steps=20, per_device_train_batch_size=8, learning_rate=5e-3,
        logging_steps=5, bf16=False, report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    (args,) = parser.parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model = inject_dora(model, DoraConfig(rank=16, alpha=32, targets="all-linear"))
    trainer = MySFT(
        model=model,
        args=args,
        train_dataset=load_dataset("json", data_files=ROWS, split="train"),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )
    trainer.train()
    trainer.save_model()  # the adapter, in PEFT's format


if __name__ == "__main__":
    main()
