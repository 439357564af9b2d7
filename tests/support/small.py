"""Every causal model class of transformers, small: its configuration with sizes that a test can hold."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SIZES = {
    "vocab_size": 96, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "top_k_experts": 2, "moe_k": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "head_dim": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "image_size": 32, "patch_size": 16, "state_size": 8,
    "time_step_rank": 4, "first_k_dense_replace": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "kv_channels": 8, "attention_head_dim": 8, "global_head_dim": 8, "mamba_d_state": 8, "mamba_d_head": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "sliding_window": 16, "mm_tokens_per_image": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8,
    "o_lora_rank": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "rotary_dim": 4,
    "num_nextn_predict_layers": 0, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "d_kv": 8,
    "mamba_expand": 2, "n_mamba_heads": 2,
}  # fmt: skip
_UNSET = ("head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
_WIDTHS = (
    "hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embed_dim", "word_embed_proj_dim", "embedding_size",
    "attention_hidden_size", "lru_width", "linear_hidden_size",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)
_KEY_HEADS = (
    "num_key_value_heads",
    "n_head_kv",
    "num_kv_heads",
    "multi_query_group_num",
    "num_global_key_value_heads",
)


def small_config(model_type: str, layers: int = 2) -> Any:
    """Raises whatever a configuration that does not fit these sizes raises."""
    return CONFIG_MAPPING[model_type](**_small(CONFIG_MAPPING[model_type](), layers))


def causal_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_model(model_type: str, sizes: dict[str, Any] | None = None, **options: Any) -> Any:
    """`sizes`: settings of the configuration, where it has them, instead of the small ones."""
    config = small_config(model_type)
    for key, value in (sizes or {}).items():
        if hasattr(config, key):
            setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config, **options)


def _small(config: Any, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        sub = getattr(config, key, None)
        if hasattr(sub, "to_dict"):
            found[key] = {**_small(sub, layers), "model_type": getattr(sub, "model_type", "")}
        elif (key in _SIZES and isinstance(value, int)) or (key in _UNSET and value is None):
            found[key] = _SIZES[key]
        elif key in _WIDTHS and isinstance(value, int):
            found[key] = 32
        elif key in _LAYERS and isinstance(value, int):
            found[key] = layers
        elif key in _HEADS and isinstance(value, int):
            found[key] = 4
        elif key in _KEY_HEADS and isinstance(value, int):
            found[key] = 2
        elif isinstance(value, int) and value > 2 and ("experts" in key):
            found[key] = 4
        elif isinstance(value, int) and (
            "intermediate" in key or "ffn" in key or key in ("n_inner", "d_ff", "d_inner")
        ):
            found[key] = 48
        elif isinstance(value, list) and ("layer" in key or "block" in key) and len(value) > layers:
            found[key] = value[:layers]
    return found
