"""Rotary angles of packed positions, and attention layers that choose theirs.

Source: Su et al. 2021, arXiv 2104.09864; scaling as transformers' modeling_rope_utils.
"""

import math
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from sft_fast.architecture import LLAMA3_ROPE, Architecture


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """fp32 [kinds, rotated channels / 2], radians per position: of the layers that see the whole
    sample, and second, where those differ, of the layers with a sliding window."""
    frequencies = [scaled(plain_frequencies(architecture, architecture.rope_theta), architecture)]
    if architecture.local_rope_theta is not None:
        frequencies.append(plain_frequencies(architecture, architecture.local_rope_theta))
    return torch.stack(frequencies)


def plain_frequencies(architecture: Architecture, theta: float) -> Tensor:
    channels = int(architecture.head_dim * architecture.rotary_fraction)
    return 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)


def scaled(frequencies: Tensor, architecture: Architecture) -> Tensor:
    """Lowers the frequencies for samples longer than those of the first training."""
    if architecture.rope_scaling is None:
        return frequencies
    low = frequencies / architecture.rope_scaling_factor
    if architecture.rope_scaling == "linear":
        return low
    # Llama 3.1: long waves are lowered, short ones are not, and those between them in part.
    turns = LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    from_turns, to_turns = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    kept = ((turns - from_turns) / (to_turns - from_turns)).clamp(0, 1)
    return (1 - kept) * low + kept * frequencies


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    """position_ids [b, s], frequencies [kinds, n] -> fp32 [s, b, 1, kinds * 2n], radians."""
    angles = position_ids.t()[:, :, None, None] * frequencies  # [s, b, kinds, n]
    return torch.cat([angles, angles], dim=-1).flatten(2).unsqueeze(2)


def rotary_kind(architecture: Architecture, layer: int) -> int | None:
    """Which of the rotary frequencies `layer` (from 0) uses; None = it knows no positions."""
    if layer in architecture.layers_without_rope:
        return None
    has_window = architecture.window(layer) is not None
    return int(has_window and architecture.local_rope_theta is not None)


class ChoosingAttention(SelfAttention):
    """megatron-core's self-attention with the rotary angles of this layer's kind, or none."""

    def __init__(self, *args: Any, architecture: Architecture, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rotary_kind = rotary_kind(architecture, self.layer_number - 1)
        self.num_kinds = 1 if architecture.local_rope_theta is None else 2

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        angles = None
        if self.rotary_kind is not None:
            angles = rotary_pos_emb.chunk(self.num_kinds, dim=-1)[self.rotary_kind]
        return super().forward(*args, rotary_pos_emb=angles, **kwargs)
