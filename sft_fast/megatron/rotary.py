"""Rotary tables of packed positions.

Source: Su et al. 2021, arXiv 2104.09864; scaling as transformers' modeling_rope_utils.
"""

import math

import torch
from torch import Tensor

from sft_fast.models.architecture import Architecture
from sft_fast.models.rope import RopeScaling


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """fp32 [kinds, rotated channels / 2], radians per position.

    The kinds, where there are two: layers that see the whole sample and layers with a sliding
    window; or, with longrope, samples of up to original_max_position_embeddings tokens and longer.
    """
    plain = plain_frequencies(architecture, architecture.rope_theta)
    scaling = architecture.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        factors = torch.tensor([scaling.short_factors, scaling.long_factors])
        if factors.shape[1] != len(plain):
            raise ValueError(
                f"config.json: longrope has {factors.shape[1]} factors, the model {len(plain)} "
                "rotary frequencies"
            )
        return plain / factors
    frequencies = [scaled_frequencies(plain, architecture)]
    if architecture.local_rope_theta is not None:
        frequencies.append(plain_frequencies(architecture, architecture.local_rope_theta))
    return torch.stack(frequencies)


def plain_frequencies(architecture: Architecture, theta: float) -> Tensor:
    """fp32 [channels / 2], radians per position of each pair of channels."""
    channels = rotated_channels(architecture)
    return 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)


def rotated_channels(architecture: Architecture) -> int:
    """How many channels of a head are rotated."""
    return architecture.rope_dim or int(architecture.head_dim * architecture.rotary_fraction)


def scaled_frequencies(frequencies: Tensor, architecture: Architecture) -> Tensor:
    """Frequencies [n], lowered for samples longer than those of the pretraining."""
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    low = frequencies / scaling.factor
    if scaling.kind == "linear":
        return low
    few, many = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - few) / (many - few)).clamp(0, 1)
    else:
        # yarn mixes by the number of the channel, which is linear in the logarithm of the turns.
        first, last = (channel_of(turns, architecture, scaling) for turns in (many, few))
        if scaling.has_whole_bounds:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated_channels(architecture) - 1)
        width = last - first or 0.001
        kept = 1 - ((torch.arange(len(frequencies)) - first) / width).clamp(0, 1)
    return (1 - kept) * low + kept * frequencies


def channel_of(turns: float, architecture: Architecture, scaling: RopeScaling) -> float:
    """Channel of the frequency that makes so many turns within the original positions."""
    positions = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    channels = rotated_channels(architecture)
    return channels * math.log(positions) / (2 * math.log(architecture.rope_theta))


def longest_short_sample(architecture: Architecture) -> int | None:
    """Tokens of the longest sample that a longrope model calls short; None for other models."""
    scaling = architecture.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return None
    return scaling.original_max_position_embeddings


def frequencies_by_length(
    frequencies: Tensor,
    longest_short: int,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    cp_size: int,
) -> Tensor:
    """Frequencies of a longrope model for each token: of short samples, or of long ones.

    Args:
        frequencies: [2, n], of short and of long samples.
        longest_short: tokens of the longest sample that is short.
        cu_seqlens: int32 [samples + 1], of the whole sequence; None: it is one sample.
        num_tokens: of this context-parallel rank.
        cp_size: context-parallel ranks.

    Returns: [num_tokens, 1, n].
    """
    if cu_seqlens is None:
        return frequencies[int(num_tokens * cp_size > longest_short)].expand(num_tokens, 1, -1)
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    ends = cu_seqlens[1:] // cp_size  # of each sample on this rank
    # Padding at the end of the sequence counts to the last sample.
    sample = torch.searchsorted(ends, tokens, right=True).clamp_(max=len(ends) - 1)
    is_long = (cu_seqlens.diff() > longest_short)[sample]
    return frequencies[is_long.long()].unsqueeze(1)


def rotary_tables(position_ids: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Cosines, then sines, of every token's angles, times a factor: what the kernels rotate with.

    Args:
        position_ids: [b, s].
        frequencies: [kinds, n], or of each token [s, 1, n], one kind.
        factor: the scaling's attention_factor.

    Returns: fp32 [kinds, s * b, 2 n].
    """
    frequencies = frequencies if frequencies.dim() == 3 else frequencies[:, None, None]
    angles = position_ids.t()[..., None] * frequencies  # [kinds, s, b, n] or [s, b, n]
    tables = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if factor != 1.0:
        tables *= factor
    return tables.view(-1, position_ids.numel(), tables.shape[-1])


def rotary_factor(architecture: Architecture) -> float:
    """What multiplies cosines and sines."""
    scaling = architecture.rope_scaling
    return 1.0 if scaling is None else scaling.attention_factor


def rotary_kind(architecture: Architecture, layer: int) -> int | None:
    """Which of the rotary frequencies `layer` (from 0) uses; None = it knows no positions."""
    if layer in architecture.layers_without_rope:
        return None
    has_window = architecture.window(layer) is not None
    return int(has_window and architecture.local_rope_theta is not None)
