"""Run on ranks: TRL's SFTTrainer with the mixin under each sharding, beside our own loop on the same batches.

usage: trl_runs.py MODEL_DIR ROWS OUT_DIR SETTING...       SETTING: of SETTINGS, or "dpo: fsdp": trl_preferences;
"vllm: fsdp": trl_vllm
"""

import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from dora_dist import UserError, load_adapter, load_quantized, save_adapter
from dora_dist.cli import leave
from dora_dist.config import load_config
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.dora.norm_cache import dora_layers, find_shards
from dora_dist.integrations import DoraTrainerMixin
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.parallel.zero import import_deepspeed
from dora_dist.quant.modules import BaseWeight
from dora_dist.quant.nf4 import dequantize
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer
from tests.ranks import trl_others
from tests.support.rounding import MODEL, TRAINED, assert_near

STEPS, SAVED, GLOBAL_BATCH = 10, 6, 4
POISONED = 4  # the step whose loss is infinite
RATES = {"magnitude_lr": 0.01, "lora_plus_ratio": 2.0}
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}  # fmt: skip
ITS_ADAM = {
    "type": "AdamW",
    "params": {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
CONFIGURED = {"use_configured_state": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "single": {"use_cpu": True},
    "ddp": {"use_cpu": True},
    "fsdp": {"use_cpu": True, "fsdp": True, "fsdp_config": FSDP},
    "fsdp, loaded by one rank": {
        "use_cpu": True, "fsdp": True, "fsdp_config": {**FSDP, "cpu_ram_efficient_loading": True},
        "activation_checkpointing": True,
    },
    "fsdp, checkpointed": {
        "use_cpu": True, "fsdp": True, "fsdp_config": {**FSDP, "activation_checkpointing": True}
    },
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}, "accelerator_config": CONFIGURED},
    "zero3": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}, "accelerator_config": CONFIGURED},
    "zero3, checkpointed": {
        "deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}, "accelerator_config": CONFIGURED,
        "activation_checkpointing": True,
    },
    "zero2, its optimizer": {
        "deepspeed": {**ZERO, "zero_optimization": {"stage": 2}, "optimizer": ITS_ADAM},
        "accelerator_config": CONFIGURED,
    },
}  # fmt: skip


class Own(NamedTuple):
    """Our own loop, which the trainers are held against."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]  # the first step's, of the magnitudes
    rows: Dataset  # in the order in which they came
    initial: Path  # the adapter before the first step, and after the last
    final: Path


def own_loop(directory: str, rows: str, out: Path, scheme: str = "none") -> Own:
    out.mkdir()
    config = {
        "model": {"path": directory, "dtype": "float32"},
        "dora": {"rank": 2, "alpha": 6, "targets": ["q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens"]},
        "quant": {"scheme": scheme},
        "data": {"train": rows, "seq_len": 64},
        "train": {
            "steps": STEPS, "micro_batch_size": GLOBAL_BATCH, "lr": 0.02, "schedule": "constant",
            "weight_decay": 0.1, **RATES,
        },
        "parallel": {"strategy": "single"},
    }  # fmt: skip
    trainer, data = own_trainer(config, out)
    built = trainer.built
    save_adapter(built.model, out / "initial")
    losses, seen, gradients = [], [], {}
    take_step, sum_losses = built.engine.step, trainer.objective.forward.summed

    def note_and_step():
        found = {name: layer.magnitude.grad.clone() for name, layer in dora_layers(built.model).items()}
        gradients.update(gradients or found)
        return take_step()

    def poisoned(*args):
        loss = sum_losses(*args)
        return loss * torch.inf if trainer.progress.step == POISONED else loss

    built.engine.step, trainer.objective.forward.summed = note_and_step, poisoned
    for step in range(STEPS):
        batch = data.plan.global_batch(step)
        (micro,) = batch.micro_batches
        for ids, targets in zip(micro["input_ids"].tolist(), micro["targets"].tolist(), strict=True):
            seen.append({"input_ids": ids, "labels": [-100, *targets[:-1]]})
        losses.append(trainer.train_step(batch)[0].item())
    save_adapter(built.model, out / "final")
    return Own(losses, gradients, Dataset.from_list(seen), out / "initial", out / "final")


def own_trainer(config: dict[str, Any], out: Path) -> tuple[Trainer, RunData]:
    (out / "run.yaml").write_text(yaml.safe_dump(config))
    config, processes = load_config(out / "run.yaml", []), Processes()
    directory = Path(config.model.path)
    blueprint = make_blueprint(config, directory, 1)
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    tokenizer = load_tokenizer(directory)
    data = RunData(config.data, config.train, config.model.task, blueprint.model, tokenizer, processes)
    built = build_to_train(blueprint, strategy)
    return Trainer(built, config.model, config.train, False, data.steps), data


class Case(NamedTuple):
    setting: str
    directory: str
    own: Own
    out: Path
    ranks: int
    environment: dict[str, str]
    four_bit: bool = False


class Noting:
    """Before a trainer: it notes its losses and its magnitudes' first gradients."""

    skips = False

    def create_accelerator_and_postprocess(self):
        if self.args.fsdp:
            assert self.args.device.type == "cpu"
            PartialState._shared_state["distributed_type"] = (
                DistributedType.MULTI_GPU
            )  # accelerate's FSDP has no CPUs
        super().create_accelerator_and_postprocess()
        self.losses, self.micro_losses, self.gradients = [], [], {}
        if self.skips and not self.is_deepspeed_enabled:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def _load_scaler(self, checkpoint):
        pass  # a checkpoint has one, but accelerate's FSDP cannot load an optimizer beside it

    def training_step(self, *args, **options):
        self.micro_losses.append(super().training_step(*args, **options))
        return self.micro_losses[-1]

    def _clip_grad_norm(self, model):
        if not self.is_deepspeed_enabled:
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.unscale_(self.optimizer.optimizer)  # accelerate does so on GPUs alone
            shards = find_shards(self.dora_model)
            self.note(lambda m: shards.gather([m.grad])[0])
        return super()._clip_grad_norm(model)

    def note(self, gradient):
        if not self.gradients:
            for name, layer in dora_layers(self.dora_model).items():
                plain = name.replace("_checkpoint_wrapped_module.", "")
                self.gradients[plain] = gradient(layer.magnitude).clone()


class Sft(Noting, DoraTrainerMixin, SFTTrainer):
    """The loss of one step is infinite."""

    skips = True  # by a loss scale, where DeepSpeed does not

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        return loss * torch.inf if self.state.global_step == POISONED else loss


class Watch(TrainerCallback):
    def __init__(self, trainer: Sft):
        self.trainer = trainer

    def on_train_begin(self, *args, **options):
        check_norms(self.trainer.dora_model)
        if self.trainer.is_deepspeed_enabled:  # whose steps are inside of backward()
            from deepspeed.utils import safe_get_full_grad

            engine = self.trainer.model_wrapped
            step = engine.step

            def note_and_step(*args, **options):
                self.trainer.note(safe_get_full_grad)
                return step(*args, **options)

            engine.step = note_and_step

    def on_step_end(self, *args, **options):
        loss = self.trainer.accelerator.reduce(torch.stack(self.trainer.micro_losses).sum(), "mean")
        self.trainer.losses.append(loss.item())
        self.trainer.micro_losses.clear()
        check_norms(self.trainer.dora_model)


def check_norms(model: torch.nn.Module) -> None:
    """Every layer's cached norm against its definition, in fp64."""
    shards = find_shards(model)
    shards.reshard(model)
    for name, layer in dora_layers(model).items():
        assert layer.norm_is_cached and not layer._norm_is_stale, name
        *parts, A, B = shards.gather([*layer.weight_parts, layer.lora_A, layer.lora_B])
        W = parts[0] if layer.layout is None else dequantize(parts, layer.layout)
        W, A, B = W.double(), A.double(), B.double()
        if layer.transposed:
            W = W.t()
        assert_near(layer.norm, (W + layer.spec.scaling * B @ A).norm(dim=1), MODEL, about=name)


def fresh_accelerate(case: Case) -> None:
    """accelerate and transformers keep a process's setting in their classes and in the environment."""
    os.environ.clear()
    os.environ.update(case.environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # it would shard the model while that is loaded
    if case.setting.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")  # on CPUs the arguments would leave it without


def made(case: Case, **changes: Any) -> Sft:
    fresh_accelerate(case)
    load = load_quantized if case.four_bit else AutoModelForCausalLM.from_pretrained
    model = load_adapter(load(case.directory, dtype=torch.float32), case.own.initial)
    settings = {
        "output_dir": str(case.out), "max_steps": STEPS, "per_device_train_batch_size": 1, "bf16": False,
        "gradient_accumulation_steps": GLOBAL_BATCH // case.ranks, "learning_rate": 0.02, "max_length": None,
        "lr_scheduler_type": "constant", "weight_decay": 0.1, "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True}, "save_strategy": "steps", "save_steps": SAVED,
        "report_to": "none", "disable_tqdm": True, "activation_checkpointing": False,
        "dataloader_pin_memory": False, "ddp_backend": "gloo" if case.ranks > 1 else None,
    }  # fmt: skip
    return Sft(
        model=model,
        args=SFTConfig(**{**settings, **SETTINGS[case.setting], **changes}),
        train_dataset=case.own.rows,
        processing_class=AutoTokenizer.from_pretrained(case.directory),
        **RATES,
    )


def train(case: Case, resume: bool = False) -> Sft:
    Sft.skips = not resume
    trainer = made(case)
    trainer.add_callback(Watch(trainer))
    trainer.train(resume_from_checkpoint=str(case.out / f"checkpoint-{SAVED}") if resume else None)
    return trainer


def check_setting(case: Case) -> None:
    trainer = train(case)
    losses, want = list(trainer.losses), list(case.own.losses)
    assert losses.pop(POISONED) == want.pop(POISONED) == float("inf")
    assert losses == pytest.approx(want, rel=TRAINED)
    for layer, gradient in case.own.gradients.items():
        assert_near(trainer.gradients[layer], gradient, MODEL, about=layer)
    if case.four_bit and case.setting.startswith(("fsdp", "zero3")):
        check_share(trainer.dora_model, case.ranks)
    trainer.save_model(str(case.out / "saved"))
    trainer.accelerator.wait_for_everyone()
    check_adapter(case.out / "saved", case.own.final)
    check_no_base(case.out, case.directory)
    if case.setting == "single" and not case.four_bit:
        check_in_peft(trainer, case)
    resumed = train(case, resume=True)
    assert resumed.losses == pytest.approx(trainer.losses[SAVED:], rel=TRAINED)


def check_refusals(case: Case) -> None:
    """Settings that round magnitudes, before anything is trained."""
    rounding = {"bf16": {"enabled": True}}
    for word, setting, changes in (
        ("bf16, fp16: with FSDP", "fsdp", {"bf16": True}),
        ("bf16, fp16: with DeepSpeed", "zero3", {"deepspeed": {**SETTINGS["zero3"]["deepspeed"], **rounding}}),
    ):
        with pytest.raises(UserError, match=word):
            made(case._replace(setting=setting), **changes)


def check_in_peft(trainer: Sft, case: Case) -> None:
    base = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(base, case.out / "saved").eval()
    ids = torch.tensor(case.own.rows[0]["input_ids"])[None]
    with torch.no_grad():
        assert_near(other(input_ids=ids).logits, trainer.dora_model.eval()(input_ids=ids).logits, MODEL)


def check_share(model: torch.nn.Module, ranks: int) -> None:
    """Of each packed weight a rank holds its rows alone."""
    shards = find_shards(model)
    layers = [module for module in model.modules() if isinstance(module, BaseWeight) and module.layout is not None]
    assert len(layers) == 14
    for part in (part for layer in layers for part in layer.weight_parts):
        rows, *columns = shards.shape(part)
        held = sum(own.values.numel() for own in shards.rectangles(part))
        assert held <= -(-rows // ranks) * math.prod(columns), (held, rows, columns)


def check_adapter(got: Path, want: Path) -> None:
    has, needs = (load_file(directory / "adapter_model.safetensors") for directory in (got, want))
    assert has.keys() == needs.keys()
    error = torch.cat([(has[key] - tensor).flatten() for key, tensor in needs.items()]).norm()
    assert error <= TRAINED * torch.cat([tensor.flatten() for tensor in needs.values()]).norm()


def check_no_base(out: Path, directory: str) -> None:
    """No file holds the first bytes of a matrix of the base."""
    base = load_file(Path(directory) / "model.safetensors")
    begins = {name: t.flatten()[:8].numpy().tobytes() for name, t in base.items() if t.dim() == 2}
    for path in (path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [name for name, begin in begins.items() if begin in content], path


def main(directory: str, rows: str, out: str, *settings: str) -> None:
    placed = {key: os.environ.pop(key) for key in PLACES if key in os.environ}
    rank, ranks = placed.get("RANK", "0"), int(placed.get("WORLD_SIZE", 1))
    alone = Path(out) / f"alone-{rank}"
    alone.mkdir()
    own = {"sft": own_loop(directory, rows, alone / "sft"), "nf4": own_loop(directory, rows, alone / "nf4", "nf4")}
    import_deepspeed(Processes())  # without what it would compile
    from tests.ranks import trl_preferences, trl_vllm  # which import this module

    bare_environment = dict(os.environ)
    for setting in settings:
        print(setting, flush=True)
        if setting == "others":
            trl_others.run(directory, alone)
            continue
        kind, _, bare = setting.rpartition(": ")
        place, count = (alone, 1) if bare == "single" else (Path(out), ranks)
        environment = {**bare_environment, **(placed if count > 1 else {})}
        held = own["nf4" if kind == "nf4" else "sft"]
        case = Case(bare, directory, held, place / setting, count, environment, kind == "nf4")
        if kind == "vllm":
            trl_vllm.check_vllm(case)
        elif kind == "refusals":
            check_refusals(case)
        elif kind in ("", "nf4"):
            check_setting(case)
        else:
            trl_preferences.check(kind, case, alone / kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
