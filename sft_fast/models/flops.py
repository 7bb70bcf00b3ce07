"""Parameters and FLOPs of a decoder, counted the way the trainer computes.

A matrix product of [m, k] and [k, n] is 2 m k n FLOPs. Norms, activations, softmax and the
embedding look-up are left out, as is usual (Chowdhery et al. 2022, PaLM, appendix B,
arXiv 2204.02311). Two things are counted as they happen here and not as a dense trainer would:
attention within samples and under the causal mask, and the LM head on supervised rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def attention_parameters(architecture: Architecture) -> int:
    """Weights of the four attention matrices of a layer."""
    a = architecture
    return a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_key_value_heads)


def mlp_parameters(architecture: Architecture) -> int:
    """Weights of one gated MLP, or of one expert."""
    return 3 * architecture.hidden_size * architecture.ffn_hidden_size


def layer_matrix_parameters(architecture: Architecture) -> int:
    """Weights of the matrices of one layer, all experts and their router included."""
    a = architecture
    router = a.num_experts * a.hidden_size
    return attention_parameters(a) + router + max(a.num_experts, 1) * mlp_parameters(a)


def active_matrix_parameters(architecture: Architecture) -> int:
    """Those that one token meets."""
    a = architecture
    idle = a.num_experts - a.experts_per_token
    return layer_matrix_parameters(a) - idle * mlp_parameters(a)


def layer_vector_parameters(architecture: Architecture) -> int:
    """Norm weights and biases of one layer."""
    a = architecture
    biases = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim if a.qkv_bias else 0
    norms = (4 if a.is_gemma else 2) * a.hidden_size
    return norms + biases + (2 * a.head_dim if a.qk_norm else 0)


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the model as it is published: no padding of the vocabulary."""
    a = architecture
    embeddings = (1 if a.tie_word_embeddings else 2) * a.vocab_size * a.hidden_size
    layers = layer_matrix_parameters(a) + layer_vector_parameters(a)
    return embeddings + a.num_layers * layers + a.hidden_size


def adapter_parameters(architecture: Architecture, rank: int, targets: list[str]) -> int:
    """Parameters of LoRA adapters of `rank` on every layer's `targets`."""
    a = architecture
    query, key = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    h, f = a.hidden_size, a.ffn_hidden_size
    sides = {
        "q_proj": h + query,
        "k_proj": h + key,
        "v_proj": h + key,
        "o_proj": query + h,
        "gate_proj": h + f,
        "up_proj": h + f,
        "down_proj": f + h,
    }
    return a.num_layers * rank * sum(sides.get(name, 0) for name in targets)


def forward_flops(architecture: Architecture, workload: Workload) -> float:
    """FLOPs of one forward pass."""
    a = architecture
    layers = 2 * active_matrix_parameters(a) * workload.tokens
    # Scores and values, each 2 * s^2 * width; the causal mask halves them.
    attention = 2 * a.num_attention_heads * a.head_dim * workload.squares
    head = 2 * a.hidden_size * a.vocab_size * workload.supervised
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
