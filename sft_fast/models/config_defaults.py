"""What transformers takes for a key that a config.json does not have, by family.

Only where it matters to what we compute, and only of keys that are absent: null is a value. The
sizes of a model are never guessed.
"""

from typing import Any

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
"""Keys that a config.json must have."""

COMMON: dict[str, Any] = {
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
NO_WINDOW = {"use_sliding_window": False}
QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "num_key_value_heads": 32, **NO_WINDOW}
MISTRAL: dict[str, Any] = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": MISTRAL | {"sliding_window": 4096},
    "Qwen2ForCausalLM": QWEN,
    "Qwen3ForCausalLM": QWEN | {"head_dim": 128},
    "Qwen3MoeForCausalLM": QWEN
    | {
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    "MixtralForCausalLM": MISTRAL
    | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
    },
    "Gemma2ForCausalLM": GEMMA
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": GEMMA
    | {
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
    "Phi3ForCausalLM": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    "SmolLM3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        **NO_WINDOW,
    },
}


def with_defaults(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A config.json of the architecture `name` with the keys that it leaves to transformers.

    Raises:
        ValueError: it has no sizes.
    """
    if missing := [key for key in SIZES if config.get(key) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} is missing, a size of the model")
    return COMMON | DEFAULTS[name] | config
