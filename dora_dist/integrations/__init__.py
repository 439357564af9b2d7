"""Other people's loops. Only users import this room; it may import the rooms from training down.

trainer: DoraTrainerMixin for transformers' Trainer and TRL's trainers, and DoraTrainer.
vllm: the weights that TRL sends to vLLM, merged.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_dist.integrations.trainer import DoraTrainer, DoraTrainerMixin

# Imported when they are asked for: one integration's packages are not another's.
_HOMES = {"DoraTrainer": "trainer", "DoraTrainerMixin": "trainer"}
__all__ = ["DoraTrainer", "DoraTrainerMixin"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
