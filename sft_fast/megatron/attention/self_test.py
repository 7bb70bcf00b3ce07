"""The test that a backend passes before a run uses it: packed samples against dense attention."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sft_fast.megatron.attention.dense import dense_attention
from sft_fast.megatron.attention.library_errors import noting_library
from sft_fast.megatron.attention.packed_samples import (
    AttentionFn,
    PackedSamples,
    ScoreOptions,
    pack_samples,
)

SEQLENS = (1, 70, 7, 33)
# Small, so that they matter to such short samples.
WINDOW = 20
SOFTCAP = 1.0


class WrongResult(Exception):
    """A backend computes something else than dense attention."""


@dataclass(frozen=True)
class AttentionShape:
    """What the layers of this rank give to attention."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    """Channels of a value; head_dim but for latent attention."""

    def random_inputs(self, num_tokens: int) -> list[Tensor]:
        """Query and key [num_tokens, heads, head_dim], value and gradient of the output
        [num_tokens, heads, value_dim]."""
        generator = torch.Generator().manual_seed(0)
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads
        channels = self.head_dim, self.head_dim, self.value_dim, self.value_dim
        return [
            torch.randn(num_tokens, *sizes, generator=generator).to(self.device, self.dtype)
            for sizes in zip(heads, channels, strict=True)
        ]


def check_attention(attend: AttentionFn, shape: AttentionShape, scoring: ScoreOptions) -> None:
    """Compares output and gradients with dense attention of each sample alone.

    The error against fp32 may be twice that of dense attention in the same dtype.

    Raises:
        WrongResult: the error is larger.
    """
    edges = torch.tensor((0, *SEQLENS), dtype=torch.int32, device=shape.device)
    samples = pack_samples(SEQLENS, edges.cumsum(0, dtype=torch.int32))
    scoring = replace(
        scoring,
        window=scoring.window and min(scoring.window, WINDOW),
        softcap=scoring.softcap and min(scoring.softcap, SOFTCAP),
    )
    inputs = shape.random_inputs(sum(SEQLENS))

    def alone(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        """[T, heads, head_dim] of [T, heads or kv_heads, head_dim]."""
        parts = (tensor.unsqueeze(1).split(SEQLENS) for tensor in (query, key, value))
        outputs = [dense_attention(q, k, v, scoring) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs).squeeze(1)

    truth = list(run_with_gradients(alone, [part.float() for part in inputs], samples, scoring))
    plain = run_with_gradients(alone, inputs, samples, scoring)
    results = run_with_gradients(attend, inputs, samples, scoring)
    names = ("output", "query gradient", "key gradient", "value gradient")
    for name, expected, same_dtype, result in zip(names, truth, plain, results, strict=True):
        if result.shape != expected.shape:
            raise WrongResult(f"its {name} is {list(result.shape)}, not {list(expected.shape)}")
        limit = 2 * float((same_dtype.float() - expected).abs().max()) + 1e-5
        error = float((result.float() - expected).abs().max())
        if not error <= limit:  # also true for NaN
            raise WrongResult(f"its {name} is off by {error:.2g}, more than {limit:.2g}")


def run_with_gradients(
    attend: AttentionFn, inputs: list[Tensor], samples: PackedSamples, scoring: ScoreOptions
) -> Iterator[Tensor]:
    """Output, then the gradients of query, key and value, in their shapes.

    Args:
        attend: what is run.
        inputs: query, key, value and gradient of the output, each [T, heads, head_dim].
        samples: of the T tokens.
        scoring: of the layer.
    """
    *leaves, grad_output = [tensor.detach().clone() for tensor in inputs]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query, key, value = leaves
    output = attend(query, key, value, samples, scoring)
    yield output.detach()
    # The backward pass of `attend` is the library's own; ours calls nothing of its own there.
    with noting_library():
        gradients = torch.autograd.grad(output, leaves, grad_output)
    yield from gradients
