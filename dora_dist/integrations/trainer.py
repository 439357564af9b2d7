"""`class MySFT(DoraTrainerMixin, SFTTrainer)`: transformers' Trainer, or one of TRL's, for an injected model.

The mixin overrides what a trainer does with a model that it does not know: it would save the base with the
adapter, and load a second model as a reference. Steps, sharding and the optimizer's state stay the trainer's.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from dora_dist.adapters.adapter import load_adapter, save_adapter
from dora_dist.dora.base_alone import adapters_off
from dora_dist.dora.inject import injection_of
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_cache import attach_norm_refresh, dora_layers, find_shards, refresh_norms
from dora_dist.errors import UserError
from dora_dist.integrations.vllm import send_merged_weights
from dora_dist.quant.modules import BaseWeight
from dora_dist.training.optim import parameter_groups

_Trainer: Any = object  # the trainer that the mixin stands before


class DoraTrainerMixin(_Trainer):
    """Stands before the trainer that it is mixed into: `class MyDPO(DoraTrainerMixin, DPOTrainer)`.

    Args:
        magnitude_lr: the magnitudes' learning rate, where it is not `learning_rate`.
        lora_plus_ratio: the learning rate of B over that of A.

    The other arguments are the trainer's. Its model is one that `inject_dora` or `load_adapter` has prepared; its
    reference model, where it takes one and is given none, is that model without adapters.

    Raises:
        UserError: the model has no DoRA layers, or a setting would round magnitudes or leave layers untrained; the
            message names the setting that works.
    """

    optimizer_cls_and_kwargs: Any  # the trainer's

    def __init__(
        self, *args: Any, magnitude_lr: float | None = None, lora_plus_ratio: float | None = None, **options: Any
    ):
        if args:
            options |= inspect.signature(super().__init__).bind_partial(*args).arguments
        if options.get("peft_config") is not None:
            raise UserError("peft_config: the model has dora_dist's adapters; leave PEFT's out")
        self._rates: dict[str, Any] = {"magnitude_lr": magnitude_lr, "lora_plus_ratio": lora_plus_ratio}
        self._reference: Any = None
        self._followed: Any = None
        self._is_its_own_reference = options.get("ref_model") is None
        config: Any = options.get("args")
        beta = getattr(config, "beta", None) if self._is_its_own_reference else None
        takes_reference = self._is_its_own_reference and _takes_reference(type(self))
        if takes_reference or beta:
            _refuse_trained(options.get("model"))
        if takes_reference:
            options["ref_model"] = _Reference(self)  # without one TRL loads a second model
        elif beta:
            config.beta = 0.0  # the same, where no reference is taken
        try:
            super().__init__(**options)
        finally:
            if beta:
                config.beta = beta
        if beta:
            self.beta = beta
        if self._is_its_own_reference:
            self._reference = _Reference(self)
        if getattr(self, "use_vllm", False):
            send_merged_weights(self.vllm_generation)
        if (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            self.model.enable_input_require_grads()  # checkpoints whose inputs are all frozen would train nothing
        self.add_callback(_Attach(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        _refuse(self)

    @property
    def dora_model(self) -> nn.Module:
        """The injected model, without the trainer's wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def ref_model(self) -> Any:
        """What TRL's trainers call for the reference's log-probabilities. None while they are made: they would
        shard it like a model."""
        return self._reference

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        if not self._is_its_own_reference:
            self._reference = model

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        if not self._is_its_own_reference:
            return super().compute_ref_log_probs(model, inputs)
        with self.base_alone():  # precomputed, while the trainer is made
            return super().compute_ref_log_probs(model, inputs)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """The model without its adapters, and without what training adds to a forward, such as dropout."""
        model = self.dora_model
        training = model.training
        model.eval()
        try:
            with adapters_off(model):
                yield
        finally:
            model.train(training)

    def attach_norms(self) -> None:
        """Called when training begins: the model and the optimizer are sharded, and a checkpoint is loaded."""
        injection_of(self.dora_model)
        stepping = self.model_wrapped if self.is_deepspeed_enabled else self.optimizer
        if stepping is self._followed:  # train() was called again
            refresh_norms(self.dora_model)
        else:
            attach_norm_refresh(self.dora_model, stepping)
            self._followed = stepping

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The trainer's, with no weight decay on magnitudes and with their and B's learning rates."""
        given = self.optimizer_cls_and_kwargs
        shape = find_shards(self.model).shape
        rates = (self.args.learning_rate, self.args.weight_decay)
        groups = parameter_groups(self.model, *rates, **self._rates, shape=shape)
        if self.optimizer is None:
            made, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if {"params", "model", "optimizer_dict"} & set(options):
                raise UserError(f"optim: {self.args.optim} takes no groups of parameters; adamw_torch does")
            self.optimizer_cls_and_kwargs = made, {**options, "params": groups}
        elif hasattr(self.optimizer, "params"):  # a stand-in for what DeepSpeed's configuration names
            self.optimizer.params = groups
        try:
            return super().create_optimizer(*args)
        finally:
            self.optimizer_cls_and_kwargs = given

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        """Called once DeepSpeed's engine is there, before a checkpoint is loaded; also while the engine is made,
        where DeepSpeed's configuration names the optimizer."""
        made = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if made is not None:
            _keep_what_is_trained(made.engine)
        return super().create_scheduler(*args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, in PEFT's format, from shards. Every rank calls it."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        shards = find_shards(self.dora_model)
        shards.is_writer = self.args.should_save
        save_adapter(self.dora_model, directory, shards=shards)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
            torch.save(self.args, directory / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:  # the trainer's would also write the whole model
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.dora_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self.dora_model, self.state.best_model_checkpoint)


class DoraTrainer(DoraTrainerMixin, Trainer):
    """transformers' Trainer for an injected model."""


class _Reference:
    """The model without its adapters, for trainers that call a second model."""

    def __init__(self, trainer: DoraTrainerMixin):
        self._trainer = trainer

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        with self._trainer.base_alone():
            return self._trainer.model(*args, **inputs)


def _takes_reference(trainer: type) -> bool:
    inits = [vars(each)["__init__"] for each in trainer.__mro__ if "__init__" in vars(each)]
    return any("ref_model" in inspect.signature(init).parameters for init in inits if inspect.isfunction(init))


class _Attach(TrainerCallback):
    def __init__(self, trainer: DoraTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self._trainer.attach_norms()


def _keep_what_is_trained(engine: Any) -> None:
    """Have a DeepSpeed engine leave the frozen base out of its checkpoints, and not look for it there."""
    save, load, state_dict = engine.save_checkpoint, engine.load_checkpoint, engine.module_state_dict

    def trained(*args: Any, **options: Any) -> dict[str, Any]:
        """A tied weight has two names, of which DeepSpeed leaves out one."""
        named = engine.module.named_parameters(remove_duplicate=False)
        names = {name for name, parameter in named if parameter.requires_grad}
        return {name: value for name, value in state_dict(*args, **options).items() if name in names}

    engine.module_state_dict = trained
    engine.save_checkpoint = lambda *args, **options: save(*args, **{**options, "exclude_frozen_parameters": True})
    engine.load_checkpoint = lambda *args, **options: load(*args, **{**options, "load_module_strict": False})


def _refuse_trained(model: Any) -> None:
    """Raise a UserError for a model that is not its own reference: it has been trained."""
    for name, layer in dora_layers(model).items() if isinstance(model, nn.Module) else ():
        if not layer.weight.is_meta and _is_trained(layer):
            raise UserError(
                f"model: {name!r} has a trained adapter, and the reference would be the base without it; merge it "
                "first (merge_adapter, then inject_dora), or pass a ref_model"
            )


def _is_trained(layer: DoraLayer) -> bool:
    if layer.lora_A is not None and layer.lora_B is not None:
        return bool(layer.lora_A.any() and layer.lora_B.any())
    return layer.magnitude is not None and not torch.allclose(layer.magnitude, layer.current_norm())


def _refuse(trainer: DoraTrainerMixin) -> None:
    """Raise a UserError for what would train something else than DoRA."""
    model, args, state = trainer.model, trainer.args, trainer.accelerator.state
    plugin, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if model is not None:
        injection_of(model)
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise UserError(f"device_map: the model lies on {len(devices)} devices; shard it with fsdp or deepspeed")
    if plugin is not None and plugin.fsdp_version == 1:
        raise UserError("fsdp_config: version 1 flattens magnitudes into the base's weights; set version to 2")
    policy = getattr(plugin, "mixed_precision_policy", None)
    rounds = policy is not None and policy.param_dtype not in (None, torch.float32)
    sections = [
        name for name in ("bf16", "fp16") if deepspeed and deepspeed.hf_ds_config.is_true(f"{name}.enabled")
    ]
    if rounds or sections:
        raise UserError(
            f"bf16, fp16: with {'FSDP' if rounds else 'DeepSpeed'} they round magnitudes to 16 bits; set both to "
            "False and load the base with dtype=torch.bfloat16: the layers mix precisions by themselves"
        )
    if deepspeed and "scheduler" in deepspeed.deepspeed_config and any(trainer._rates.values()):
        raise UserError(
            "deepspeed: its section scheduler sets one learning rate for all; beside magnitude_lr and "
            "lora_plus_ratio leave it out, and name the schedule in lr_scheduler_type"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, BaseWeight) and any(c.__module__.startswith("trl.") for c in type(trainer).__mro__):
        where = "targets" if isinstance(head, DoraLayer) else "quant.skip"
        raise UserError(
            f"{where}: TRL reads the output embeddings' weight itself, which must be in 16 bits and without an "
            f"adapter; {'leave them out' if where == 'targets' else 'name them there'}"
        )
    if getattr(args, "sync_ref_model", False) and trainer._is_its_own_reference:
        raise UserError("sync_ref_model: the reference is the model without adapters; set it to False")
    sharded = plugin is not None or deepspeed is not None
    if getattr(args, "precompute_ref_log_probs", False) and sharded:
        raise UserError(
            "precompute_ref_log_probs: the model is not sharded yet when it would compute them; set it to False: "
            "the reference needs no memory"
        )
