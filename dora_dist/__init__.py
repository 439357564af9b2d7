"""DoRA fine-tuning that is aware of sharding. See README.md for the command line, docs/ for how it works."""

from dora_dist.adapter import load_adapter, merge_adapter, save_adapter
from dora_dist.config import DoraConfig
from dora_dist.errors import UserError
from dora_dist.inject import inject_dora
from dora_dist.layers import DoraEmbedding, DoraLinear
from dora_dist.norms import attach_norm_refresh, refresh_norms

__version__ = "0.1.0"

__all__ = [
    "DoraConfig",
    "DoraEmbedding",
    "DoraLinear",
    "UserError",
    "attach_norm_refresh",
    "inject_dora",
    "load_adapter",
    "merge_adapter",
    "refresh_norms",
    "save_adapter",
]
