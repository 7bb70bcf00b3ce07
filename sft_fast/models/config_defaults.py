"""What transformers takes for a key that a config.json does not have.

Only where it matters to what we compute, and only of keys that are absent: null is a value. The
sizes of a model are never guessed.
"""

from typing import Any

from sft_fast.models.families import Family

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


def with_defaults(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """A config.json with the keys that its family leaves to transformers.

    Raises:
        ValueError: it has no sizes.
    """
    if missing := [key for key in SIZES if config.get(key) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} is missing, a size of the model")
    return COMMON | dict(family.defaults) | config
