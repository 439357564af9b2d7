"""DoRA fine-tuning that is aware of sharding. See README.md for the command line, docs/ for how it works."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_dist.adapters.adapter import load_adapter, merge_adapter, save_adapter
    from dora_dist.config import DoraConfig, QuantConfig
    from dora_dist.dora.base_alone import adapters_off
    from dora_dist.dora.inject import inject_dora
    from dora_dist.dora.layers import DoraEmbedding, DoraLinear
    from dora_dist.dora.norm_cache import attach_norm_refresh, refresh_norms
    from dora_dist.errors import UserError
    from dora_dist.models.merged import iter_merged_weights
    from dora_dist.models.quantized import load_quantized

__version__ = "0.1.0"

# Imported when they are asked for: the command line answers --help and a mistake in a YAML without torch.
_HOMES = {
    "adapters.adapter": ("load_adapter", "merge_adapter", "save_adapter"),
    "config": ("DoraConfig", "QuantConfig"),
    "errors": ("UserError",),
    "dora.base_alone": ("adapters_off",),
    "dora.inject": ("inject_dora",),
    "dora.layers": ("DoraEmbedding", "DoraLinear"),
    "dora.norm_cache": ("attach_norm_refresh", "refresh_norms"),
    "models.merged": ("iter_merged_weights",),
    "models.quantized": ("load_quantized",),
}

__all__ = [
    "DoraConfig",
    "DoraEmbedding",
    "DoraLinear",
    "QuantConfig",
    "UserError",
    "adapters_off",
    "attach_norm_refresh",
    "inject_dora",
    "iter_merged_weights",
    "load_adapter",
    "load_quantized",
    "merge_adapter",
    "refresh_norms",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"dora_dist.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
