"""Parameters and FLOPs of a decoder, counted the way the trainer computes.

A matrix product of [m, k] and [k, n] is 2 m k n FLOPs. Norms, activations, softmax and the
embedding look-up are left out, as is usual (Chowdhery et al. 2022, PaLM, appendix B,
arXiv 2204.02311). Two things are counted as they happen here and not as a dense trainer would:
attention within samples and under the causal mask, and the LM head on supervised rows only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft_fast.config.layout import adapted_projections

if TYPE_CHECKING:
    from sft_fast.models.architecture import Architecture


@dataclass(frozen=True)
class Workload:
    """What is computed on; sums over samples.

    Attributes:
        tokens: tokens of samples, without padding.
        squares: sum of squared sample lengths.
        supervised: tokens that are a target.
    """

    tokens: int
    squares: int
    supervised: int


def layer_shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(megatron's name of the parameter, shape) of each Hugging Face tensor of a layer; of experts,
    those of one expert."""
    for name, rule in architecture.layer.items():
        for dims in rule.sources.values():
            yield name, architecture.shape_of(dims)


def mlp_parameters(architecture: Architecture) -> int:
    """Weights of one MLP, or of one expert."""
    parts = ("mlp.linear_fc", "mlp.experts.")
    return sum(
        math.prod(shape) for name, shape in layer_shapes(architecture) if name.startswith(parts)
    )


def layer_matrix_parameters(architecture: Architecture) -> int:
    """Weights of the matrices of one layer, all experts and their router included."""
    num_experts = architecture.num_experts
    return sum(
        math.prod(shape) * (num_experts if architecture.layer[name].is_expert else 1)
        for name, shape in layer_shapes(architecture)
        if len(shape) > 1
    )


def active_matrix_parameters(architecture: Architecture) -> int:
    """Those that one token meets."""
    a = architecture
    idle = a.num_experts - a.experts_per_token
    return layer_matrix_parameters(a) - idle * mlp_parameters(a)


def layer_vector_parameters(architecture: Architecture) -> int:
    """Norm weights and biases of one layer."""
    return sum(shape[0] for _, shape in layer_shapes(architecture) if len(shape) == 1)


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the model as it is published: no padding of the vocabulary."""
    a = architecture
    ends = a.num_vocab_matrices * a.vocab_size * a.hidden_size + a.num_head_parameters
    layers = layer_matrix_parameters(a) + layer_vector_parameters(a)
    return ends + a.num_layers * layers + a.hidden_size


def adapter_parameters(architecture: Architecture, rank: int, targets: list[str]) -> int:
    """Parameters of LoRA adapters of `rank` on the projections that `targets` selects."""
    sides = {
        source.removesuffix(".weight"): sum(architecture.shape_of(dims))
        for rule in architecture.layer.values()
        for source, dims in rule.sources.items()
    }
    adapted = adapted_projections(architecture, targets)
    return rank * sum(sides[name.split(".", 3)[3]] for name in adapted)


def forward_flops(architecture: Architecture, workload: Workload) -> float:
    """FLOPs of one forward pass."""
    a = architecture
    layers = 2 * active_matrix_parameters(a) * workload.tokens
    # Scores and values, each 2 * s^2 * width; the causal mask halves them.
    attention = 2 * a.num_attention_heads * a.head_dim * workload.squares
    head = 2 * (a.num_head_parameters or a.hidden_size * a.vocab_size) * workload.supervised
    return a.num_layers * (layers + attention) + head


def training_flops(architecture: Architecture, workload: Workload, lora: bool = False) -> float:
    """FLOPs of forward and backward; recomputation is not counted, it is no progress.

    The backward pass costs twice the forward pass. With LoRA the weights of the matrices are
    frozen, so their half of the backward products is not computed; attention has no weights.
    """
    forward = forward_flops(architecture, workload)
    if not lora:
        return 3 * forward
    a = architecture
    attention = 2 * a.num_layers * a.num_attention_heads * a.head_dim * workload.squares
    return 2 * forward + attention
