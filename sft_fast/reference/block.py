"""Oracles of a transformer layer's kernels, as a textbook would write them, for autograd."""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False) -> Tensor:
    """Each row of x [..., h] divided by its root-mean-square and multiplied by weight [h].

    Source: Zhang & Sennrich 2019, arXiv 1910.07467. With is_zero_centered the factor is 1 + weight.
    """
    factor = 1 + weight if is_zero_centered else weight
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * factor


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Multiplies channels (i, i + n) of each head, as one complex number, by turn i.

    Source: Su et al. 2021, arXiv 2104.09864.

    Args:
        heads: [tokens, heads, head_dim].
        turns: complex [tokens, n], exp(i angle) times what else scales the channels; channels from
            2 n on do not change.
    """
    n = turns.shape[1]
    turned = torch.complex(heads[..., :n], heads[..., n : 2 * n]) * turns[:, None]
    return torch.cat([turned.real, turned.imag, heads[..., 2 * n :]], dim=-1)


def split_qkv(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Takes megatron's fused projection apart, head by head.

    Args:
        qkv: [tokens, size]: for each group its queries, its key, its value.
        num_groups: key heads.
        head_dim: channels of a head.

    Returns: [tokens, queries, head_dim], [tokens, groups, head_dim], [tokens, groups, head_dim].
    """
    queries, keys, values = [], [], []
    for group in qkv.chunk(num_groups, dim=1):
        *own_queries, key, value = group.split(head_dim, dim=1)
        queries += own_queries
        keys.append(key)
        values.append(value)
    return torch.stack(queries, 1), torch.stack(keys, 1), torch.stack(values, 1)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """activation(gate) * partner of [..., 2 n]: gates, then partners.

    Source: Shazeer 2020, arXiv 2002.05202; clamped_silu: gpt-oss.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if kind == "clamped_silu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        return up * gate / (1 + torch.exp(-1.702 * gate))
    if kind == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return up * 0.5 * gate * (1 + torch.tanh(inner))
    assert kind == "silu"
    return up * gate / (1 + torch.exp(-gate))
