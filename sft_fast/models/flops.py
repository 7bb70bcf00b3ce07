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


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of a layer.

    Attributes:
        matrices: weights of matrices, those of experts left out.
        vectors: norm weights and biases, but for those of experts, which are no parameters.
        expert: weights of one expert; 0 = the layer has none.
        mlp: those of the matrices that are an MLP.
    """

    matrices: int
    vectors: int
    expert: int
    mlp: int


def layer_parameters(architecture: Architecture, layer: int) -> LayerParameters:
    """Counts the parameters of `layer` (from 0)."""
    matrices, vectors, expert, mlp = 0, 0, 0, 0
    for name, rule in architecture.layer_rules(layer).items():
        for dims in rule.sources.values():
            shape = architecture.shape_of(dims)
            count = math.prod(shape)
            if rule.is_expert:
                expert += count
            elif len(shape) == 1:
                vectors += 0 if rule.is_buffer else count
            else:
                matrices += count
                mlp += count if name.startswith("mlp.linear_fc") else 0
    return LayerParameters(matrices, vectors, expert, mlp)


def all_layers(architecture: Architecture) -> Iterator[LayerParameters]:
    """Counts the parameters of each layer."""
    kinds: dict[bool, LayerParameters] = {}
    for layer in range(architecture.num_layers):
        is_dense = layer in architecture.dense_layers
        if is_dense not in kinds:
            kinds[is_dense] = layer_parameters(architecture, layer)
        yield kinds[is_dense]


def active_matrix_parameters(architecture: Architecture) -> int:
    """Weights of the matrices of all layers that one token meets."""
    chosen = architecture.experts_per_token
    return sum(layer.matrices + chosen * layer.expert for layer in all_layers(architecture))


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the model as it is published: no padding of the vocabulary."""
    a = architecture
    ends = a.num_vocab_matrices * a.vocab_size * a.hidden_size + a.num_head_parameters
    layers = sum(
        layer.matrices + layer.vectors + a.num_experts * layer.expert for layer in all_layers(a)
    )
    return ends + layers + a.hidden_size


def adapter_parameters(
    architecture: Architecture, rank: int, targets: str | list[str], of_experts: bool = False
) -> int:
    """Parameters of LoRA adapters of `rank` on the projections that `targets` selects, of experts
    or of all else."""
    copies = architecture.num_experts if of_experts else 1
    sides = [
        {
            source.removesuffix(".weight"): copies * sum(architecture.shape_of(dims))
            for rule in architecture.layer_rules(layer).values()
            for source, dims in rule.sources.items()
            if rule.is_expert is of_experts
        }
        for layer in range(architecture.num_layers)
    ]
    adapted = [name.split(".", 3) for name in adapted_projections(architecture, targets)]
    return rank * sum(sides[int(layer)].get(name, 0) for _, _, layer, name in adapted)


def forward_flops(architecture: Architecture, workload: Workload) -> float:
    """FLOPs of one forward pass."""
    a = architecture
    layers = 2 * active_matrix_parameters(a) * workload.tokens
    # Scores and sums of values, each 2 * s^2 * width; the causal mask halves them.
    attention = (a.query_size + a.value_size) * workload.squares
    head = 2 * (a.num_head_parameters or a.hidden_size * a.vocab_size) * workload.supervised
    return layers + a.num_layers * attention + head


def training_flops(architecture: Architecture, workload: Workload, lora: bool = False) -> float:
    """FLOPs of forward and backward; recomputation is not counted, it is no progress.

    The backward pass costs twice the forward pass. With LoRA the weights of the matrices are
    frozen, so their half of the backward products is not computed; attention has no weights.
    """
    forward = forward_flops(architecture, workload)
    if not lora:
        return 3 * forward
    a = architecture
    attention = a.num_layers * (a.query_size + a.value_size) * workload.squares
    return 2 * forward + attention
