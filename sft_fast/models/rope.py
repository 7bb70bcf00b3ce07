"""Rotary positions as a Hugging Face config.json describes them, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies change for samples longer than those of the first training.

    Sources: transformers' modeling_rope_utils; yarn: Peng et al. 2023 (arXiv 2309.00071); longrope:
    Ding et al. 2024 (arXiv 2402.13753).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    """linear: all are divided by the factor; llama3 and yarn: those that turn often are kept, those
    that turn rarely are divided; longrope: each is divided by a number of its own."""
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Longest sample of the first training, in tokens."""
    low_freq_factor: float = 1.0
    """Within original_max_position_embeddings; frequencies below it are divided by the factor."""
    high_freq_factor: float = 4.0
    """Frequencies above it are kept; between the two they are mixed."""
    has_whole_bounds: bool = True
    """yarn: the mixing begins and ends at whole channels."""
    attention_factor: float = 1.0
    """Multiplies cosine and sine."""
    short_factors: tuple[float, ...] = ()
    """longrope: the divisors, for samples of up to original_max_position_embeddings tokens."""
    long_factors: tuple[float, ...] = ()
    """longrope: the divisors, for longer samples."""


def rope_scaling(rope: dict[str, Any], config: dict[str, Any]) -> RopeScaling | None:
    """The scaling of one entry of `rope_parameters` or `rope_scaling`; None = there is none.

    Args:
        rope: the entry.
        config: all of config.json.

    Raises:
        ValueError: a kind that we do not know, or a key is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # its old names
    readers = {"linear": linear, "llama3": llama3, "yarn": yarn, "longrope": longrope}
    if kind == "default":
        return None
    if kind not in readers:
        raise ValueError(
            f"config.json: rotary scaling {kind!r} is not supported; supported: default, "
            f"{', '.join(readers)}"
        )
    try:
        scaling = readers[kind](rope, config)
    except KeyError as error:
        raise ValueError(f"config.json: rotary scaling {kind} lacks {error}") from None
    if scaling.attention_factor < 1.0:
        raise ValueError(
            f"config.json: the attention_factor of rotary scaling {kind} is "
            f"{scaling.attention_factor}; supported: 1 and more"
        )
    return scaling


def original_length(rope: dict[str, Any], config: dict[str, Any]) -> int:
    """The longest sequence, in tokens, before the positions were scaled."""
    key = "original_max_position_embeddings"
    found = config.get(key) or rope.get(key) or config["max_position_embeddings"]
    return int(found)


def linear(rope: dict[str, Any], config: dict[str, Any]) -> RopeScaling:
    """All frequencies divided by one factor."""
    return RopeScaling("linear", float(rope["factor"]))


def llama3(rope: dict[str, Any], config: dict[str, Any]) -> RopeScaling:
    """Low frequencies divided, high ones kept, as Llama 3.1 does."""
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        original_length(rope, config),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
    )


def yarn(rope: dict[str, Any], config: dict[str, Any]) -> RopeScaling:
    """YaRN: low frequencies divided, attention sharpened. Source: arXiv 2309.00071."""
    original = original_length(rope, config)
    factor = float(rope.get("factor") or config["max_position_embeddings"] / original)

    def strength(multiplier: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        attention = strength()
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = strength(rope["mscale"]) / strength(rope["mscale_all_dim"])
    return RopeScaling(
        "yarn",
        factor,
        original,
        float(rope.get("beta_slow") or 1),
        float(rope.get("beta_fast") or 32),
        bool(rope.get("truncate", True)),
        float(attention),
    )


def longrope(rope: dict[str, Any], config: dict[str, Any]) -> RopeScaling:
    """A factor for each frequency, other ones for long sequences, as Phi-3 has."""
    original = original_length(rope, config)
    factor = float(rope.get("factor") or config["max_position_embeddings"] / original)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=float(attention),
        short_factors=tuple(map(float, rope["short_factor"])),
        long_factors=tuple(map(float, rope["long_factor"])),
    )
