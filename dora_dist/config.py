"""The typed settings: one frozen dataclass per section of the YAML, strictly checked, never rewritten.

Defaults < YAML < `key.sub=value` on the command line. A `DoraConfig(...)` written in Python is held to the same
rules as one read from a file (schema.py).
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dora_dist.errors import UserError
from dora_dist.schema import (
    Section,
    apply_override,
    build_section,
    check_range,
    describe_value,
    parse_yaml,
    setting,
)


@dataclass(frozen=True)
class ModelConfig(Section):
    path: str  # a directory in Hugging Face layout, or a hub id
    task: Literal["causal_lm", "sequence_classification", "preference", "reward_model"] = "causal_lm"
    num_labels: int | None = setting(None, low=2)  # sequence_classification; None: what config.json says
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"  # of the frozen base and of compute
    init: Literal["pretrained", "random"] = "pretrained"  # random: weights from config.json alone
    attention: Literal["sdpa", "eager"] = "sdpa"
    allow_pickle: bool = False  # read .bin weights, by torch's weights_only, where there are no safetensors

    @property
    def causal(self) -> bool:
        """Whether the model predicts tokens; else it has a head for labels or rewards."""
        return self.task in ("causal_lm", "preference")


@dataclass(frozen=True)
class DoraConfig(Section):
    """What is adapted and how (arXiv 2402.09353).

    `targets`, `magnitude_only` and `modules_to_save` hold module names, dotted suffixes of them, globs, or `^` and
    a whole name; `targets="all-linear"` takes every linear layer but the output head, and experts. `alpha /
    rank` (rslora: `alpha / sqrt(rank)`) scales the low-rank product. The patterns map such names to an own rank or
    alpha.
    """

    method: Literal["dora", "lora"] = "dora"
    rank: int = setting(16, low=1)
    alpha: float = setting(32, positive=True)
    dropout: float = setting(0.0, low=0, high=0.99)
    targets: list[str] | str = field(
        default_factory=lambda: "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    magnitude_only: list[str] = field(default_factory=list)
    magnitude_axis: Literal["out", "in"] = "out"
    norm_gradient: Literal["detached", "exact"] = "detached"
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    init: Literal["kaiming", "gaussian"] = "kaiming"
    init_from: str | None = None  # a PEFT adapter directory to continue from
    accept_other_base: bool = False  # also one that was trained on another base; for the merge, too

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in self.rank_pattern.items():
            check_range(f"dora.rank_pattern.{name}", rank, {"low": 1})
        for name, alpha in self.alpha_pattern.items():
            check_range(f"dora.alpha_pattern.{name}", alpha, {"positive": True})
        if self.method == "lora" and self.magnitude_only:
            raise UserError("dora.magnitude_only needs dora.method: dora (lora has no magnitude)")

    def target_list(self) -> list[str]:
        return [self.targets] if isinstance(self.targets, str) else self.targets


@dataclass(frozen=True)
class QuantConfig(Section):
    """4-bit storage of the frozen linear layers (QLoRA, arXiv 2305.14314)."""

    scheme: Literal["none", "nf4"] = "none"
    skip: list[str] = field(default_factory=lambda: ["lm_head"])  # kept in 16 bits: names, suffixes or globs
    block_size: int = setting(64, low=32, high=4096)  # weights that share a scale
    double_quant: bool = True  # scales in 8 bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size & (self.block_size - 1):
            raise UserError(f"quant.block_size: {self.block_size} is not a power of two")

    def __str__(self) -> str:
        if self.scheme == "none":
            return "none"
        return f"{self.scheme} (block_size {self.block_size}, double_quant {str(self.double_quant).lower()})"


@dataclass(frozen=True)
class DataConfig(Section):
    train: str  # json, jsonl, parquet, csv, text file or directory, or a hub id
    eval: str | None = None
    format: Literal[
        "auto", "alpaca", "chat", "prompt_completion", "text", "labels", "preference", "unpaired_preference"
    ] = "auto"
    seq_len: int = setting(1024, low=2)
    packing: bool = False
    loss_on: Literal["completion", "all"] = "completion"
    streaming: bool = False
    on_bad_row: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class TrainConfig(Section):
    steps: int | None = setting(None, low=1)  # optimizer steps; None: `epochs` over the data
    epochs: float = setting(1, positive=True)
    micro_batch_size: int = setting(1, low=1)  # rows per rank and forward
    accumulation: int = setting(1, low=1)  # micro-batches per optimizer step
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # 8bit: through bitsandbytes
    lr: float = setting(2.0e-4, positive=True)
    magnitude_lr: float | None = setting(None, positive=True)
    lora_plus_ratio: float | None = setting(None, positive=True)  # lr of B over lr of A (LoRA+)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = setting(0, low=0)
    weight_decay: float = setting(0.0, low=0)
    max_grad_norm: float | None = setting(1.0, positive=True)  # None: no clipping
    max_skipped_steps: int = setting(10, low=0)  # in a row, for gradients that are not finite; then the run ends
    seed: int = setting(0, low=0, high=2**63 - 1)
    activation_checkpointing: bool = False
    compile: bool = False  # each block by torch.compile
    eval_every: int | None = setting(None, low=1)
    objective: Literal["dpo", "ipo", "kto", "orpo", "simpo"] | None = None  # of model.task: preference; None: dpo
    beta: float | None = setting(None, positive=True)  # the objective's; None: 0.1, or 2 for simpo
    gamma: float | None = setting(None, low=0)  # simpo's margin; None: 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and self.objective != "simpo":
            raise UserError("train.gamma needs train.objective: simpo")


@dataclass(frozen=True)
class ParallelConfig(Section):
    strategy: Literal["auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    replicas: int = setting(1, low=1)  # > 1: hybrid sharding, one full copy per replica group
    cpu_offload: bool = False
    timeout_s: int = setting(300, low=1, high=10_000_000)
    force: bool = False  # train although `plan` says that it does not fit
    deepspeed: dict[str, Any] = field(default_factory=dict)  # extra DeepSpeed keys, laid over what we make

    def __post_init__(self) -> None:
        super().__post_init__()
        zero = self.strategy.startswith("zero")
        if self.replicas > 1 and self.strategy not in ("auto", "fsdp"):
            hint = "; ZeRO-3 has parallel.deepspeed.zero_optimization.zero_hpz_partition_size" if zero else ""
            raise UserError(f"parallel.replicas needs parallel.strategy: fsdp, not {self.strategy}{hint}")
        if self.cpu_offload and not zero and self.strategy not in ("auto", "fsdp"):
            raise UserError(
                f"parallel.cpu_offload needs parallel.strategy: fsdp, zero1, zero2 or zero3, not {self.strategy}"
            )
        if self.deepspeed and not zero:
            raise UserError(
                f"parallel.deepspeed needs parallel.strategy: zero1, zero2 or zero3, not {self.strategy}"
            )


@dataclass(frozen=True)
class CheckpointConfig(Section):
    every: int | None = setting(None, low=1)  # steps; None: only where a signal ends the run
    keep: int = setting(2, low=1)  # the newest of them
    resume: str = "auto"  # the newest in output_dir; none; or the directory of a checkpoint or of a run
    force: bool = False  # resume although the model, the data or their settings have changed
    on_failure: Literal["continue", "stop"] = "continue"  # where a checkpoint cannot be written


@dataclass(frozen=True)
class LogConfig(Section):
    every: int = setting(1, low=1)
    tensorboard: bool = False
    wandb: bool = False
    sample_prompts: list[str] = field(default_factory=list)  # completed greedily before and after training
    sample_tokens: int = setting(48, low=1)


@dataclass(frozen=True)
class RunConfig(Section):
    """The whole YAML."""

    model: ModelConfig
    data: DataConfig
    dora: DoraConfig = field(default_factory=DoraConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: str = "runs/my-run"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.eval_every is not None and self.data.eval is None:
            raise UserError("train.eval_every needs data.eval")
        if self.data.packing and self.model.task != "causal_lm":
            raise UserError(
                f"data.packing needs model.task: causal_lm ({self.model.task} is about rows, not about tokens)"
            )
        self._check_preference()
        if self.train.magnitude_lr is not None and self.dora.method == "lora":
            raise UserError("train.magnitude_lr needs dora.method: dora (lora has no magnitude)")
        if self.model.num_labels is not None and self.model.task != "sequence_classification":
            raise UserError("model.num_labels needs model.task: sequence_classification")
        if self.train.optimizer != "adamw" and self.parallel.strategy == "fsdp":
            raise UserError(
                f"train.optimizer: {self.train.optimizer} does not work with parallel.strategy: fsdp "
                "(bitsandbytes cannot update its sharded parameters); use adamw, or zero1, zero2 or zero3"
            )

    @property
    def sequences(self) -> int:
        """In a micro-batch: a pair of preferences has two."""
        pairs = self.model.task in ("preference", "reward_model") and self.train.objective != "kto"
        return self.train.micro_batch_size * (1 + pairs)

    def _check_preference(self) -> None:
        train = self.train
        if self.model.task != "preference":
            for key in ("objective", "beta"):
                if getattr(train, key) is not None:
                    raise UserError(f"train.{key} needs model.task: preference, not {self.model.task}")
        if self.data.loss_on == "all" and self.model.task in ("preference", "reward_model"):
            raise UserError("data.loss_on: all needs model.task: causal_lm (a preference is between completions)")
        if self.model.task != "preference":
            return
        if self.data.streaming and train.objective == "kto":
            raise UserError(
                "data.streaming does not work with train.objective: kto, which compares each row of a step with "
                "another one"
            )
        if self.dora.modules_to_save and train.objective not in ("orpo", "simpo"):
            raise UserError(
                f"dora.modules_to_save: {', '.join(self.dora.modules_to_save)} would be lost as the reference of "
                f"train.objective: {train.objective or 'dpo'}; valid would be none, or the objective orpo or simpo"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, lay `key.sub=value` overrides over it, and check everything.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is not valid.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config: there is no file {str(path)!r}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'model:' and 'data:', found {describe_value(tree)}")
    for override in overrides:
        apply_override(tree, override)
    return build_section("", RunConfig, tree)
