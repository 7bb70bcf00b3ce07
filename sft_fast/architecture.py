"""The model's architecture as plain numbers, from and to a Hugging Face config.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_fast.config import ShapeConfig


@dataclass(frozen=True)
class Family:
    """What sets a family of models apart from Llama.

    `fixed` are the config.json keys whose other values we would compute wrongly.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    fixed: tuple[tuple[str, Any], ...] = (("attention_bias", False), ("mlp_bias", False))


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(fixed=()),
    "Qwen2ForCausalLM": Family(qkv_bias=True, fixed=(("use_sliding_window", False),)),
    "Qwen3ForCausalLM": Family(
        qk_norm=True, fixed=(("attention_bias", False), ("use_sliding_window", False))
    ),
}
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Architecture:
    """A dense decoder with RMSNorm, rotary positions, grouped queries and a gated SiLU MLP."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    ffn_hidden_size: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling_factor: float | None = None
    """Factor of the Llama 3.1 frequency scaling; None = plain rotary positions."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    qkv_bias: bool = False
    """The projections to queries, keys and values have a bias."""
    qk_norm: bool = False
    """Queries and keys are normalised per head, before the rotary embedding."""
    sliding_window: int | None = None
    """Tokens that a token attends back to; None = all. Rows must not be longer."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a model directory.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path: {folder} has no config.json; expected a Hugging Face model directory "
            "(config.json and *.safetensors)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """Translates a config.json of a supported family.

    Raises:
        ValueError: another architecture, or an option of it that we would compute wrongly.
    """
    names = config.get("architectures") or ["(missing)"]
    if names[0] not in FAMILIES:
        raise ValueError(
            f"config.json: architectures is {names[0]}; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[names[0]]
    for key, expected in (*family.fixed, ("hidden_act", "silu")):
        if config.get(key, expected) != expected:
            raise ValueError(f"config.json: {key} is {config[key]!r}; supported: {expected!r}")
    heads = config["num_attention_heads"]
    theta, scaling_factor = rope_from_hf(config)
    return Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        ffn_hidden_size=config["intermediate_size"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling_factor=scaling_factor,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        # Qwen2 and Qwen3 write the key down even where use_sliding_window turns it off.
        sliding_window=None if "use_sliding_window" in config else config.get("sliding_window"),
    )


def rope_from_hf(config: dict[str, Any]) -> tuple[float, float | None]:
    """Returns (theta, Llama 3.1 scaling factor or None) from either spelling of the rope keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3" or any(rope.get(key) != value for key, value in LLAMA3_ROPE.items()):
        raise ValueError(
            f"config.json: rotary scaling {rope} is not supported; supported: default, and "
            f"llama3 with {LLAMA3_ROPE}"
        )
    return theta, float(rope["factor"])


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The config.json of a model that has no source directory."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling_factor is not None:
        factor = architecture.rope_scaling_factor
        rope.update(LLAMA3_ROPE, rope_type="llama3", factor=factor)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "intermediate_size": architecture.ffn_hidden_size,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.norm_eps,
        "rope_parameters": rope,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "initializer_range": architecture.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def architecture_from_shape(shape: ShapeConfig, vocab_size: int) -> Architecture:
    """The architecture that `model.shape` describes, with the tokenizer's vocabulary."""
    return Architecture(
        vocab_size=vocab_size,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        **shape.model_dump(),
    )
