"""vLLM beside TRL's GRPO and RLOO: it generates with the merged weights of the model that is trained."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dora_dist.dora.norm_cache import find_shards
from dora_dist.errors import UserError
from dora_dist.models.merge_weights import base_entries
from dora_dist.models.merged import iter_merged_weights


def send_merged_weights(generation: Any) -> None:
    """Have TRL's VLLMGeneration send `iter_merged_weights` of its model, one weight at a time: what training or 4
    bits change, and all of them where vLLM forgets its weights when it sleeps.

    Raises:
        UserError: the adapters part tied weights, which vLLM holds as one.
    """
    model = generation.accelerator.unwrap_model(generation.model, keep_torch_compile=False)
    if base_entries(model, (), find_shards(model))[1]:
        raise UserError(
            "use_vllm: an adapted embedding shares its weight with the output head, and vLLM has one for both; "
            "leave it out of targets, or untie the base (tie_word_embeddings=False)"
        )
    changed_only = not (generation.mode == "colocate" and generation.enable_sleep_mode)

    def merged() -> Iterator[tuple[str, Tensor]]:
        return iter_merged_weights(model, changed_only)

    generation._iter_named_params = merged
