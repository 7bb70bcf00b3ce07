"""The kernels of a transformer layer in plain PyTorch, differentiated by autograd.

What runs on a CPU, and what a GPU falls back to. The functions say what those of block_triton do.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "clamped_silu": lambda gate: gate * torch.sigmoid(1.702 * gate),
}
LIMIT = 7.0
"""Of clamped_silu, Source: gpt-oss."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False) -> Tensor:
    """x / sqrt(mean of x**2 + eps) * weight.

    Args:
        x: [..., h].
        weight: [h].
        eps: added to the mean of the squares.
        is_zero_centered: the factor is 1 + weight, in fp32 as Gemma does.
    """
    if not is_zero_centered:
        return functional.rms_norm(x, weight.shape, weight, eps)
    factor = 1.0 + weight.float()
    return functional.rms_norm(x.float(), weight.shape, factor, eps).type_as(x)


def write_rms_norm(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False
) -> None:
    """Writes what `rms_norm` returns, without a gradient, into out, which is contiguous."""
    out.copy_(rms_norm(x, weight, eps, is_zero_centered))


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, is_zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (norm of x + residual, x + residual), each [..., h]; no residual is one of zeros.

    The sum may be x itself: neither may be written to.
    """
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps, is_zero_centered), total


def rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False
) -> Tensor:
    """Returns residual + norm of x, [..., h]."""
    return residual + rms_norm(x, weight, eps, is_zero_centered)


def rotate_qkv(
    qkv: Tensor,
    cos_sin: Tensor | None,
    num_groups: int,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    is_zero_centered: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of megatron's fused projection, ready for attention.

    Queries and keys are normalised per head, where there are weights, and then rotated.

    Args:
        qkv: [..., groups * (queries per group + 2) * head_dim], for each group its queries, its key
            and its value. The caller must not use it again: the result may be a view of it.
        cos_sin: [tokens, rotated channels] fp32, cosines then sines of half of the channels; the
            others are not rotated. None: no channel is.
        num_groups: key heads.
        head_dim: channels of a head.
        q_weight: [head_dim], of the norm of queries; None = no norm.
        k_weight: [head_dim], of the norm of keys.
        eps: of the norm.
        is_zero_centered: as for `rms_norm`.

    Returns:
        [..., heads, head_dim], [..., groups, head_dim], [..., groups, head_dim]; strided in any way
        but with last stride 1.
    """
    grouped = qkv.unflatten(-1, (num_groups, -1, head_dim))
    query, key, value = (
        grouped[..., :-2, :].flatten(-3, -2),
        grouped[..., -2, :],
        grouped[..., -1, :],
    )
    if q_weight is not None and k_weight is not None:
        query = rms_norm(query, q_weight, eps, is_zero_centered)
        key = rms_norm(key, k_weight, eps, is_zero_centered)
    if cos_sin is not None:
        angles = cos_sin.view(*qkv.shape[:-1], 1, -1)
        query, key = rotate(query, angles), rotate(key, angles)
    return query, key, value


def rotate(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Turns the pairs (channel i, channel i + half) of [..., heads, head_dim]."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    half = cos.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.type_as(heads), rest], dim=-1)


def gated_activation(
    gate_up: Tensor, kind: str, scale: Tensor | None = None, may_overwrite: bool = False
) -> Tensor:
    """The activated gate times its partner.

    Args:
        gate_up: [..., 2 n]: gates, then their partners.
        kind: silu, gelu_tanh, or clamped_silu: gate * sigmoid(1.702 gate) of gates up to 7, and
            partners between -7 and 7 plus 1.
        scale: [...], any floating dtype, multiplies the result of each row.
        may_overwrite: the backward pass may write the gradient over gate_up, which nobody else
            needs then.

    Returns: [..., n], dtype of gate_up.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if kind == "clamped_silu":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT) + 1
    output = ACTIVATIONS[kind](gate) * up
    return output if scale is None else (output * scale.unsqueeze(-1)).type_as(gate_up)


def write_gated_activation(
    out: Tensor, gate_up: Tensor, kind: str, scale: Tensor | None = None
) -> None:
    """Writes what `gated_activation` returns, without a gradient, into out, which is contiguous."""
    out.copy_(gated_activation(gate_up, kind, scale))
