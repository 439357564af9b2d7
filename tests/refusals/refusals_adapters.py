"""Adapters that do not fit: damaged files, wrong settings, another base."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dora_dist import load_adapter
from tests.refusals.refusals_files import Bomb, adapter, edit, injected, place, saved
from tests.support.peft import CASES, ours
from tests.support.refusals import CANARY, Case
from tests.unit.adapters.test_adapter import DAMAGES, ONLY_INJECTED


def _adapter_bomb(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(path.parents[1] / CANARY)}, path / "adapter_model.bin")


def _adapter_link(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    shutil.move(file, path.parents[1] / f"outside-{path.parent.name}.safetensors")
    file.symlink_to(path.parents[1] / f"outside-{path.parent.name}.safetensors")


SETTINGS: dict[str, tuple[Any, str]] = {  # of adapter_config.json, one wrong at a time
    "r": (True, "'r' is missing or of the wrong type"),
    "r ": (0, "'r' is 0"),
    "lora_alpha": (-7, "'lora_alpha' is -7"),
    "lora_alpha ": ("7", "'lora_alpha' is missing or of the wrong type"),
    "peft_type": ("LOHA", "peft_type 'LOHA' is not supported"),
    "use_dora": (False, "use_dora is False, but"),
    "use_dora ": ("yes", "'use_dora' is of the wrong type"),
    "use_rslora": (1, "'use_rslora' is of the wrong type"),
    "target_modules": (5, "'target_modules' is of the wrong type"),
    "target_modules ": ([5], "'target_modules' is of the wrong type"),
    "target_modules  ": ("(", "'(' is not a valid expression"),
    "modules_to_save": ("classifier", "'modules_to_save' is of the wrong type"),
    "rank_pattern": ([1], "'rank_pattern' is of the wrong type"),
    "rank_pattern ": ({"q_proj": "2"}, "'rank_pattern.q_proj' is '2'"),
    "rank_pattern  ": ({"(": 2}, "'(' is not a valid expression"),
    "alpha_pattern": ({"q_proj": 0}, "'alpha_pattern.q_proj' is 0"),
    "lora_dropout": ("0.1", "'lora_dropout' is of the wrong type"),
}
CONFIGS = {
    "NaN": ('{"peft_type": "LORA", "r": 3, "lora_alpha": NaN}', "NaN is not JSON"),
    "too large": ('{"peft_type": "LORA", "r": 3, "lora_alpha": 1e999}', "the number 1e999 is too large"),
    "a key twice": ('{"peft_type": "LORA", "r": 3, "r": 4}', "the key 'r' stands twice"),
    "a list": ("[]", "'peft_type' is missing"),
    "too deep": ("[" * 100_000, "nested too deeply"),
}


def cases() -> Iterator[Case]:
    saved("adapter")  # made now, not while a case is watched
    for name, (damage, message) in DAMAGES.items():
        for bare in (False, True):
            if not (bare and name in ONLY_INJECTED):
                run = partial(adapter, damage, bare=bare)
                kind = "a bare" if bare else "an injected"
                yield Case(f"adapter for {kind} model, {name}", run, ("{d}/adapter", message))
    for key, (value, message) in SETTINGS.items():
        change = partial(edit, "adapter_config.json", **{key.strip(): value})
        run = partial(adapter, change, bare=True)
        yield Case(f"adapter, {key} {value}", run, ("adapter_config.json", message))
    for name, (text, message) in CONFIGS.items():
        run = partial(adapter, lambda path, t=text: (path / "adapter_config.json").write_text(t))
        yield Case(f"adapter's configuration, {name}", run, ("adapter_config.json", message))
    yield Case("a bomb for an adapter", partial(adapter, _adapter_bomb), ("adapter_model.bin is a pickle",))
    yield Case("an adapter's link out", partial(adapter, _adapter_link), ("a link that leads out of",))
    yield Case("another base", _other_base, ("was trained on another base", "dora.accept_other_base=true"))
    yield Case("another architecture", _other_modules, ("belongs to no adapted module",))


def _other_base(directory: Path) -> object:
    return load_adapter(injected("b" * 64), place("adapter", directory / "adapter"))


def _other_modules(directory: Path) -> object:
    return load_adapter(ours(CASES["llama one layer"]), place("adapter", directory / "adapter"))
