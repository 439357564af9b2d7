"""The `merge` verb: base and adapter into one Hugging Face directory in 16 bits.

merge_weights.py writes tensor by tensor, in the memory of one output file and one tensor; what transformers
alone can load is loaded whole first. The check that follows holds one whole model at a time: first base and
adapter, then what was merged.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_dist.adapters.files import CONFIG, TENSORS
from dora_dist.config import ParallelConfig, QuantConfig, RunConfig
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.device import free_host_memory
from dora_dist.errors import UserError
from dora_dist.io.headers import check_link, read_header, read_json
from dora_dist.models.build import Blueprint, build, describe_loading, make_blueprint
from dora_dist.models.files import LoadedWeights, Weights
from dora_dist.models.huggingface import load_with_transformers, resolve_model
from dora_dist.models.merge_weights import read_plan, write_weights
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Single

_ROWS_TO_CHECK, _TOKENS_TO_CHECK = 4, 256
# The norm of the difference of all logits over their own that rounding explains: merged weights are rounded once
# more than those of the run, and their products are summed in another order.
_ROUNDING = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 1e-4}
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "*.index.json", "adapter_*")


def run_merge(
    config: RunConfig,
    out: str | Path,
    adapter: str | Path | None = None,
    base: str = "dequantized",
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Write base and adapter as one model to the new directory `out`, which appears once it has been checked.

    Args:
        adapter: default: the one in the run's output_dir.
        base: of a 4-bit run "dequantized", the weights that the adapter was trained on, or "original".
        max_shard_bytes: of one output file; a larger tensor has a file of its own.

    Raises:
        UserError: `out` exists or cannot be written, or adapter, base and configuration do not fit together.
        RuntimeError: the merged model's logits differ from the run's by more than rounding explains.
    """
    out, adapter = Path(out), Path(config.output_dir) / "adapter" if adapter is None else Path(adapter)
    processes = _one_process()
    _refuse_existing(out)
    config = _alone(config)
    directory = resolve_model(config.model.path, config.model.allow_pickle)
    blueprint = make_blueprint(config, directory)
    if base == "original" and blueprint.files is not None and blueprint.files.four_bit:
        raise UserError(f"--base original: {str(directory)!r} is in 4 bits itself; leave --base out")
    weights = _weights(blueprint)
    entries, unties = read_plan(blueprint, adapter, weights)
    _compare_base(adapter, config.model.path)
    if base == "original":
        blueprint = make_blueprint(replace(config, quant=QuantConfig()), directory)
    check = Check(blueprint, adapter, load_tokenizer(directory), processes)
    with _new_directory(out) as partial:
        written = write_weights(entries, weights, partial, base, max_shard_bytes)
        del weights
        _copy_files(directory, partial)
        _write_config(blueprint, directory, partial, unties, check.pad_id)
        check.run(partial)
    print(f"merged: {out} ({written})")


class Check:
    """Compares a merged directory with the adapter's run, on rows of its data. All but the weights is read at
    once, so that mistakes are told before anything is written."""

    def __init__(self, blueprint: Blueprint, adapter: Path, tokenizer: Any, processes: Processes):
        config = blueprint.config
        local = Path(config.data.train).exists() and config.train.objective != "kto"  # which is not streamed
        config = replace(
            config,
            dora=replace(config.dora, init_from=str(adapter)),
            data=replace(config.data, eval=None, packing=False, streaming=config.data.streaming or local),
            train=replace(config.train, micro_batch_size=1, accumulation=1, steps=_ROWS_TO_CHECK),
        )
        self.config, self.processes = config, processes
        self.blueprint = replace(blueprint, config=config)
        data = RunData(config.data, config.train, config.model.task, blueprint.model, tokenizer, processes)
        self.pad_id: int = data.pad_id
        self.batches = [
            {n: t[:, :_TOKENS_TO_CHECK] for n, t in micro.items() if n not in ("targets", "labels")}
            for step in range(_ROWS_TO_CHECK)
            for micro in data.plan.global_batch(step).micro_batches
        ]

    def run(self, merged: Path) -> None:
        """Print the largest difference of the logits. RuntimeError: rounding does not explain it."""
        kind: Any = type(self.blueprint.model)
        built = build(self.blueprint, Single(self.processes)).model
        wanted = self._logits(built)
        built.to("meta")  # frees it, whoever still knows it
        dtype = self.config.model.dtype
        model, info = kind.from_pretrained(
            merged,
            dtype=getattr(torch, dtype),
            attn_implementation=self.config.model.attention,
            output_loading_info=True,
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise RuntimeError(f"the merged model does not load whole, so it was removed: {info}")
        found = self._logits(model)
        error = torch.cat([(a - b).flatten() for a, b in zip(wanted, found, strict=True)])
        scale = torch.cat([logits.flatten() for logits in wanted])
        differ = (error.norm() / scale.norm()).item()
        told = f"their logits differ by {differ:.2g} of their norm, by {error.abs().max():.2g} at most"
        if not differ <= _ROUNDING[dtype]:
            raise RuntimeError(
                f"the merged model does not compute what base and adapter do, so it was removed: {told}; "
                f"rounding to {dtype} explains {_ROUNDING[dtype]:g} of their norm"
            )
        print(f"merged model against base and adapter, on {len(wanted)} rows: {told}")

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> list[Tensor]:
        model.eval()
        return [model(**batch).logits.float() for batch in self.batches]


def _weights(blueprint: Blueprint) -> Weights:
    """The base's tensors: its files, or what transformers makes of them where it alone can read them.

    Raises:
        UserError: that does not fit in memory.
    """
    files, told = blueprint.files, describe_loading(blueprint)
    assert files is not None
    if not told:
        return files
    if files.bytes > free_host_memory():
        raise UserError(f"{told[0]}; merge on a larger machine")
    print(*told, sep="\n")
    loaded = LoadedWeights(load_with_transformers(blueprint.config.model, files, blueprint.head))
    loaded.take_stacks(blueprint.model)
    return loaded


def _one_process() -> Processes:
    processes = Processes()
    if processes.world_size > 1:
        raise UserError(f"merge runs in one process, but {processes.world_size} were launched")
    processes.device = torch.device("cpu")
    return processes


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name at the end of the block; an error removes it."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield partial
        _refuse_existing(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _alone(config: RunConfig) -> RunConfig:
    """The run's configuration without what concerns training alone."""
    if config.model.init == "random":
        raise UserError("model.init: random leaves no base to merge into; merge needs pretrained weights")
    return replace(
        config,
        parallel=ParallelConfig(strategy="single"),
        dora=replace(config.dora, init_from=None),
        train=replace(config.train, activation_checkpointing=False, compile=False, eval_every=None),
        log=replace(config.log, sample_prompts=[]),
    )


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; merge writes a new directory")


def _compare_base(adapter: Path, path: str) -> None:
    """Tell where an adapter that holds no fingerprint of its base names another path. Directories get moved."""
    known = "base_fingerprint" in read_header(adapter / TENSORS).metadata
    trained_on = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not known and trained_on and Path(trained_on).resolve() != Path(path).resolve():
        print(f"warning: {adapter} says that it was trained on {trained_on!r}; merging it into {path!r}")


def _copy_files(directory: Path, out: Path) -> None:
    """Tokenizer, generation_config and the like."""
    for path in sorted(directory.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in _COPIED)
        if path.is_file() and wanted and not any(fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(check_link(path), out / path.name)


def _write_config(blueprint: Blueprint, directory: Path, out: Path, unties: bool, pad_id: int) -> None:
    """config.json of the base, with what the run and the merge have changed."""
    model_config: Any = blueprint.model.config
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # older name of dtype
    config.pop("quantization_config", None)  # of a base in 4 bits
    config |= {"architectures": [type(blueprint.model).__name__], "dtype": blueprint.config.model.dtype}
    if not blueprint.config.model.causal:
        config.pop("num_labels", None)
        labels = {"id2label": model_config.id2label, "label2id": model_config.label2id}
        config |= {**labels, "pad_token_id": pad_id}  # by which decoders find a row's last token
    if unties:
        for section in (config, *(v for v in config.values() if isinstance(v, dict))):
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
