"""A part of trl_runs.py: TRL's other trainers in one process, references, the best model, refusals."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from dora_dist import DoraConfig, UserError, inject_dora
from dora_dist.adapters.files import TENSORS
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.integrations import DoraTrainer, DoraTrainerMixin
from dora_dist.integrations.trainer import _keep_what_is_trained, _refuse
from tests.support.models import make_pairs

TOKENS = Dataset.from_list([{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 4)
TARGETS = ["q_proj", "down_proj"]
COMMON = {
    "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
    "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no", "learning_rate": 0.02,
    "logging_steps": 1,
}  # fmt: skip


class Dpo(DoraTrainerMixin, trl.DPOTrainer): ...


class Kto(DoraTrainerMixin, trl.KTOTrainer): ...


class Reward(DoraTrainerMixin, trl.RewardTrainer): ...


class Grpo(DoraTrainerMixin, trl.GRPOTrainer): ...


class Sft(DoraTrainerMixin, trl.SFTTrainer): ...


def injected(
    directory: str, targets: list[str] = TARGETS, kind: Any = AutoModelForCausalLM, **options: Any
) -> Any:
    torch.manual_seed(0)
    return inject_dora(kind.from_pretrained(directory, **options), DoraConfig(rank=2, targets=targets))


def move(model: Any) -> Any:
    """Have the adapters change what the model computes."""
    for layer in dora_layers(model).values():
        layer.lora_B.data.normal_(std=0.3)
    return model


class Others:
    def __init__(self, directory: str, out: Path):
        self.directory, self.out = directory, out
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.pairs = Dataset.from_json(str(make_pairs(out / "pairs.jsonl", 6)))

    def made(
        self, trainer: type, model: Any = None, data: Any = None, args: dict | None = None, **more: Any
    ) -> Any:
        config = {
            Dpo: trl.DPOConfig,
            Kto: trl.KTOConfig,
            Reward: trl.RewardConfig,
            Grpo: trl.GRPOConfig,
            Sft: trl.SFTConfig,
        }
        settings = config.get(trainer, TrainingArguments)(
            str(self.out / trainer.__name__), **{**COMMON, **(args or {})}
        )
        return trainer(
            model=model or injected(self.directory, attention_dropout=0.5), args=settings,
            processing_class=self.tokenizer, train_dataset=self.pairs if data is None else data, **more,
        )  # fmt: skip

    def check_reference(self, trainer: Any) -> None:
        """What it calls for a second model is the base, to the bit, and no second one was loaded."""
        move(trainer.model)
        base = AutoModelForCausalLM.from_pretrained(self.directory)
        temperature = getattr(trainer, "temperature", 1.0)
        add_fused_lm_head(base, temperature=temperature)
        ids = torch.arange(1, 15).view(2, 7)
        with torch.no_grad():
            want = base(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            own = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            trainer.model.train()
            got = trainer.ref_model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        assert trainer.model.training  # and the reference was not: it has no dropout
        assert torch.equal(got, want) and not torch.equal(own, want)

    def check_trainers(self) -> None:
        completions = [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for row in self.pairs
            for kind in ("chosen", "rejected")
        ]
        prompts = self.pairs.remove_columns(["chosen", "rejected"])

        def length(completions, **_):
            return [float(len(text)) for text in completions]

        rewards = injected(self.directory, kind=AutoModelForSequenceClassification, num_labels=1)
        for trainer in (
            self.made(Dpo),
            self.made(Kto, data=Dataset.from_list(completions)),
            self.made(
                Grpo,
                data=prompts,
                reward_funcs=length,
                args={"beta": 0.1, "num_generations": 2, "max_completion_length": 4},
            ),
            self.made(Dpo, args={"precompute_ref_log_probs": True}),
            self.made(Reward, model=rewards, args={"pad_token": self.tokenizer.eos_token}),
        ):
            if not isinstance(trainer, Reward):
                self.check_reference(trainer)
            if isinstance(trainer, Grpo):
                assert trainer.beta == trainer.args.beta == 0.1
            trainer.train()
            assert math.isfinite(trainer.state.log_history[0]["loss"])


def run(directory: str, out: Path) -> None:
    def second_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a second model is loaded")

    for module in (trl.trainer.dpo_trainer, trl.trainer.kto_trainer, trl.trainer.grpo_trainer):
        module.create_model_from_path = second_model
    others = Others(directory, out)
    others.check_trainers()
    check_best(others)
    check_refusals(others)
    check_checkpoints_of_tied_weights(others)


def check_best(others: Others) -> None:
    """The best checkpoint's adapter is back at the end, and its norms with it. Inputs are frozen and checkpointed;
    the learning rates are those asked for."""
    args = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True},
        "weight_decay": 0.1, "metric_for_best_model": "loss", "greater_is_better": True,  # the first, that is
    }  # fmt: skip
    more = {"eval_dataset": TOKENS, "magnitude_lr": 0.1, "lora_plus_ratio": 3.0}
    trainer = others.made(DoraTrainer, data=TOKENS, args=args, **more)
    trainer.train()
    names = {p: name.rpartition(".")[2] for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    rates = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates == {"lora_A": (0.05, 0.1), "lora_B": (pytest.approx(0.15), 0.1), "magnitude": (0.1, 0.0)}
    assert trainer.state.best_global_step == 1
    best = load_file(Path(trainer.state.best_model_checkpoint) / TENSORS)
    for name, layer in dora_layers(trainer.model).items():
        assert torch.equal(best[f"base_model.model.{name}.lora_B.weight"], layer.lora_B)
        assert torch.equal(layer.norm, layer.current_norm())


def check_refusals(others: Others) -> None:
    plain, head = AutoModelForCausalLM.from_pretrained(others.directory), injected(others.directory, ["lm_head"])
    trained = move(injected(others.directory))
    rescaled = AutoModelForCausalLM.from_pretrained(others.directory)
    inject_dora(rescaled, DoraConfig(targets=[], magnitude_only=["q_proj"]))
    others.made(Dpo, model=rescaled)  # magnitudes that are the norms have not been trained
    for layer in dora_layers(rescaled).values():
        layer.magnitude.data.mul_(1.01)
    settings = trl.GRPOConfig(str(others.out / "args"), **COMMON, beta=0.1, num_generations=2)
    with pytest.raises(UserError, match="inject_dora"):
        Grpo(model=plain, args=settings, processing_class=others.tokenizer, train_dataset=TOKENS, reward_funcs=len)
    assert settings.beta == 0.1  # for the next one that takes them
    for word, trainer, more in (
        ("has a trained adapter", Dpo, {"model": trained}),
        ("has a trained adapter", Dpo, {"model": rescaled}),
        ("inject_dora", DoraTrainer, {"model": plain}),
        ("peft_config", Dpo, {"peft_config": peft.LoraConfig()}),
        ("output embeddings", Sft, {"model": head, "data": TOKENS}),
        ("sync_ref_model", Dpo, {"args": {"sync_ref_model": True}}),
        ("optim", DoraTrainer, {"data": TOKENS, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": []})}),
    ):
        with pytest.raises(UserError, match=word):
            others.made(trainer, **more).train()
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))  # which takes no CPUs
    refused = SimpleNamespace(model=head, args=None, accelerator=SimpleNamespace(state=state))
    with pytest.raises(UserError, match="version 1"):
        _refuse(refused)
    sections = SimpleNamespace(is_true=lambda _: False)
    state.fsdp_plugin = None
    state.deepspeed_plugin = SimpleNamespace(hf_ds_config=sections, deepspeed_config={"scheduler": {}})
    refused._rates = {"magnitude_lr": 0.1}
    with pytest.raises(UserError, match="section scheduler"):
        _refuse(refused)


def check_checkpoints_of_tied_weights(others: Others) -> None:
    """DeepSpeed leaves frozen parameters out by one name each."""
    model = injected(others.directory)
    model.lm_head.weight = model.model.embed_tokens.weight
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}

    def state_dict() -> dict:
        return {name: value for name, value in model.state_dict().items() if name not in frozen}

    engine = SimpleNamespace(
        module=model, save_checkpoint=None, load_checkpoint=None, module_state_dict=state_dict
    )
    assert "lm_head.weight" in state_dict()
    _keep_what_is_trained(engine)
    assert set(engine.module_state_dict()) == {n for n, p in model.named_parameters() if p.requires_grad}
