"""The two files of a PEFT adapter: read with every doubt, and tied to their base.

What an adapter was trained on stands in the metadata of the tensors' file, which PEFT ignores: `base_fingerprint`
and `base_quantization`.
"""

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dora_dist.adapters.peft_format import OWN_TYPE
from dora_dist.errors import UserError
from dora_dist.io.fingerprint import Base
from dora_dist.io.headers import check_link, read_header, read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_REQUIRED: dict[str, Any] = {"peft_type": str, "r": int, "lora_alpha": int | float}
_OPTIONAL: dict[str, Any] = {
    "use_dora": bool, "use_rslora": bool, "fan_in_fan_out": bool, "lora_dropout": int | float, "bias": str,
    "target_modules": str | list, "target_parameters": list, "modules_to_save": list, "rank_pattern": dict,
    "alpha_pattern": dict, "magnitude_axis": str, "init_lora_weights": bool | str,
}  # fmt: skip


class AdapterFiles(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # mapped: read where they are used
    metadata: dict[str, str]


def check_replaceable(directory: Path) -> None:
    """Raise an OSError where a directory goes by the name of one of the two files."""
    for name in (TENSORS, CONFIG):
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(directory / name))


def base_metadata(base: Base) -> dict[str, str]:
    return {"base_fingerprint": base.fingerprint, "base_quantization": base.quantization}


def read_adapter(directory: Path) -> AdapterFiles:
    """Raises UserError: a file is missing, damaged or contradicts the other; it is named."""
    config_path, weights_path = directory / CONFIG, directory / TENSORS
    for path in (config_path, weights_path):
        if not path.is_file():
            pickle = directory / "adapter_model.bin"
            hint = f" ({pickle.name} is a pickle, which is not read: convert it)" if pickle.is_file() else ""
            raise UserError(f"{directory}: not a PEFT adapter: {path.name} is missing{hint}")
        check_link(path)
    config, header = read_json(config_path), read_header(weights_path)
    _check_config(config_path, config)
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights_path}: not a readable safetensors file: {error}") from None
    has_magnitudes = any(key.endswith("lora_magnitude_vector") for key in tensors)
    if has_magnitudes != bool(config.get("use_dora")):
        raise UserError(
            f"{config_path}: use_dora is {config.get('use_dora')}, but {weights_path.name} holds "
            f"{'magnitudes' if has_magnitudes else 'no magnitudes'}"
        )
    return AdapterFiles(config, tensors, header.metadata)


def check_base(
    directory: Path, metadata: dict[str, str], base: Base | None, accept_other: bool, tell: bool
) -> None:
    """That an adapter was trained on `base`, where both are known. Another quantization is usual (QLoRA's adapters
    are served on 16-bit weights), so it is only told, where `tell` says so.

    Raises:
        UserError: it was trained on another model, and `accept_other` is not set.
    """
    trained_on = metadata.get("base_fingerprint")
    if base is None or trained_on is None:
        return
    if trained_on != base.fingerprint and not accept_other:
        raise UserError(
            f"{directory / TENSORS}: was trained on another base (fingerprint {trained_on[:12]}, this model's is "
            f"{base.fingerprint[:12]}); set dora.accept_other_base=true (load_adapter: accept_other_base=True) if "
            "that is meant"
        )
    quantization = metadata.get("base_quantization", base.quantization)
    if tell and quantization != base.quantization:
        print(
            f"warning: {directory}: was trained on a base with quantization {quantization}, this one's is "
            f"{base.quantization}",
            file=sys.stderr,
        )


def _check_config(path: Path, config: Any) -> None:
    for key, kind in _REQUIRED.items():
        if not isinstance(config, dict) or not _is(config.get(key), kind):
            raise UserError(f"{path}: {key!r} is missing or of the wrong type")
    for key, kind in _OPTIONAL.items():
        if config.get(key) is not None and not _is(config[key], kind):
            raise UserError(f"{path}: {key!r} is of the wrong type")
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config.get(key), list) and not all(isinstance(name, str) for name in config[key]):
            raise UserError(f"{path}: {key!r} is of the wrong type; valid would be a list of names")
    if config["peft_type"] not in ("LORA", OWN_TYPE):
        raise UserError(f"{path}: peft_type {config['peft_type']!r} is not supported; LORA is")
    patterns = {f"{kind}_pattern": config.get(f"{kind}_pattern") or {} for kind in ("rank", "alpha")}
    values = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
    values |= {f"{key}.{name}": value for key, pattern in patterns.items() for name, value in pattern.items()}
    for key, value in values.items():
        if not _is(value, int if key.startswith("r") else int | float) or value <= 0:
            raise UserError(f"{path}: {key!r} is {value!r}; valid would be a number greater than 0")
    expressions = [*patterns["rank_pattern"], *patterns["alpha_pattern"]]
    if isinstance(config.get("target_modules"), str):
        expressions.append(config["target_modules"])
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{path}: {expression!r} is not a valid expression: {error}") from None


def _is(value: Any, kind: Any) -> bool:
    """isinstance, but true and false are no numbers."""
    return isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, int | float))
