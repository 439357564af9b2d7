"""A model of transformers: its directory, its meta version, and weights that only transformers can read."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_dist.config import ModelConfig
from dora_dist.errors import UserError
from dora_dist.io.headers import check_path
from dora_dist.models.attention import has_windows
from dora_dist.models.files import SafetensorsFiles


def resolve_model(path: str, allow_pickle: bool = False, config_only: bool = False) -> Path:
    """A local directory for `model.path`, downloading a hub id; pickles only where they are allowed, and no
    weights at all with `config_only`.

    Raises:
        UserError: neither a directory with a config.json nor a hub id that can be fetched.
    """
    directory = Path(path)
    check_path(path, "model.path")
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"model.path: {path!r} has no config.json; expected a model in Hugging Face layout")
        return directory
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: there is no directory {path!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    wanted = ["config.json"] if config_only else ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
    wanted += ["pytorch_model*.bin"] * (allow_pickle and not config_only)
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, GatedRepoError):
            reason = "its owner must let you in, and you log in by `hf auth login`"
        raise UserError(
            f"model.path: {path!r} is no directory, and as a hub id it cannot be fetched: {reason}; valid is a "
            "directory in Hugging Face layout, or an open id such as 'Qwen/Qwen3-8B'"
        ) from None


def meta_model(config: ModelConfig, directory: Path) -> nn.Module:
    """The model of a config.json with its parameters on the meta device.

    Raises:
        UserError: there is none that such a file describes.
    """
    arguments = _model_arguments(config, directory)
    try:
        model = _from_config(config, arguments)
    except Exception as error:  # whatever a model's code makes of a wrong config.json
        raise _bad_attention(config, directory, error) or _bad_config(directory, error) from None
    _widen_as_transformers_does(model, arguments["dtype"])
    model.config.use_cache = False
    return model


def _from_config(config: ModelConfig, arguments: dict[str, Any]) -> Any:
    with _parameters_on_meta():
        return _auto_class(config).from_config(**arguments)


def _bad_attention(config: ModelConfig, directory: Path, error: Exception) -> UserError | None:
    """Where the model can be made with its own attention, the one that was asked for is what is wrong."""
    if config.attention == "eager":
        return None
    try:
        _from_config(config, {**_model_arguments(config, directory), "attn_implementation": "eager"})
    except Exception:
        return None
    reason = " ".join(str(error).split()).split(". ")[0]
    return UserError(f"model.attention: {config.attention} does not work here, eager does: {reason}")


def _widen_as_transformers_does(model: Any, dtype: torch.dtype) -> None:
    """Hold in fp32 what transformers loads in fp32 into a model of 16 bits and from_config leaves in 16: tensors
    whose names hold a pattern of `_keep_in_fp32_modules_strict` or, for fp16 alone, `_keep_in_fp32_modules`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    wide = re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
    names = {name for name in model.state_dict(keep_vars=True) if wide.search(name)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and f"{prefix}.{key}".removeprefix(".") in names:
                tensor.data = tensor.data.float()


def load_with_transformers(config: ModelConfig, files: SafetensorsFiles, head: tuple[str, ...]) -> nn.Module:
    """The whole model, on the host. The modules in `head` may be new to the files.

    Raises:
        UserError: the files cannot be read, or do not hold all of it.
    """
    directory = files.directory
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"model.path: {str(directory)!r} holds an adapter_config.json, which would have transformers load the "
            "base that it names; remove it"
        )
    try:
        model, info = _auto_class(config).from_pretrained(
            directory,
            output_loading_info=True,
            use_safetensors=not files.pickled,
            weights_only=True,  # pickles of anything but tensors are refused
            **_model_arguments(config, directory),
        )
    except Exception as error:  # torch, safetensors and transformers share no base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model.path: the weights in {str(directory)!r} cannot be loaded: {reason}") from None
    missing = [name for name in info["missing_keys"] if not name.startswith(tuple(f"{h}." for h in head))]
    if missing:
        raise UserError(
            f"model.path: {str(directory)!r} holds no weights for {sorted(missing)[0]!r} ({len(missing)} missing)"
        )
    return model


def _model_arguments(config: ModelConfig, directory: Path) -> dict[str, Any]:
    """What transformers is told, the same for the meta model and for its own loading."""
    from transformers import AutoConfig

    labels = 1 if config.task == "reward_model" else config.num_labels
    extra = {"num_labels": labels} if labels is not None else {}
    try:
        hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **extra)
    except Exception as error:  # transformers' own validation raises many kinds
        raise _bad_config(directory, error) from None
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config  # what can be read of such weights, bitsandbytes_files.py reads
    if config.task == "preference":
        _without_dropout(hf_config)
    return {
        "config": hf_config,
        "trust_remote_code": False,  # said, because unsaid it is asked for on the terminal
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attention,
    }


def _without_dropout(config: Any) -> None:
    """Policy and reference are compared: what one of them drops at random would be taken for a preference."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            _without_dropout(value)


def _bad_config(directory: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"model.path: {str(directory / 'config.json')!r} cannot be used: {reason}")


def check_model(model: nn.Module, task: str, packing: bool, checkpointing: bool) -> None:
    """UserError: the run asks for what this model cannot do. `checkpointing`: of activations."""
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"train.activation_checkpointing: {type(model).__name__} does not support it")
    for name, module in model.named_modules():
        empty = [b for b in module._non_persistent_buffers_set if getattr(module._buffers[b], "is_meta", False)]
        if empty:  # no file holds it, and what it was to be made from was not there
            buffer = ".".join(filter(None, (name, empty[0])))
            raise UserError(
                f"model.path: {type(model).__name__} makes its buffer {buffer!r} from weights, before they are "
                "loaded; only models whose buffers follow from config.json can be used"
            )
    hf_config: Any = model.config
    if task == "sequence_classification":
        if hf_config.num_labels < 2:
            raise UserError(f"model.num_labels: {hf_config.num_labels}; a classifier needs at least 2")
    elif task != "reward_model" and any(
        "MaskedLM" in name for name in getattr(hf_config, "architectures", None) or ()
    ):
        raise UserError(
            f"model.task: {task} does not fit {hf_config.architectures[0]}, which sees the tokens it predicts; "
            "sequence_classification does"
        )
    if packing and (problem := _packing_undone_by(model)):
        raise UserError(f"data.packing: {type(model).__name__} {problem}; valid would be data.packing: false")
    if packing and "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"data.packing: {type(model).__name__} takes no position_ids, by which rows are told apart"
        )


def _packing_undone_by(model: nn.Module) -> str | None:
    """Why a row in a pack would not be what it is alone, or None."""
    hf_config: Any = model.config
    kinds = set(getattr(hf_config.get_text_config(), "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds & {"linear_attention", "conv", "mamba", "hybrid"}:
        return "keeps a state from token to token, which would flow from one row of a pack into the next"
    if has_windows(hf_config):
        return "has windowed attention, which packing would undo"
    return None


def _auto_class(config: ModelConfig) -> Any:
    import transformers

    if config.causal:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside go to the meta device; buffers, which modules compute, stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one is there already
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers need not draw numbers
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def classifier_head(model: nn.Module) -> tuple[str, ...]:
    """A classifier's modules outside its base model: new to most checkpoints, so they are trained in full."""
    base = getattr(model, "base_model_prefix", "")
    return tuple(n for n, m in model.named_children() if n != base and any(True for _ in m.parameters()))
