"""FlexAttention as a backend: PyTorch writes the kernel, which knows windows and soft caps.

On a GPU the kernel and the block mask are compiled once for each number of tokens, so tokens are
padded to few lengths. Without a GPU there is no backward pass, and the forward pass is for tests.

Source: Dong et al. 2024, arXiv 2412.05496; torch.nn.attention.flex_attention.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.constants import round_up
from sft_fast.megatron.attention.library_errors import from_library
from sft_fast.megatron.attention.packed_samples import (
    AttentionFn,
    PackedSamples,
    ScoreOptions,
    size_class,
)

# FlexAttention skips a block of queries and keys where no query sees a key.
BLOCK = 128
MOST_KERNELS = 128
"""One for each number of tokens, window, and whether there are gradients."""


def load_flex() -> AttentionFn:
    """Loads FlexAttention, compiled where there is a GPU."""
    from torch._dynamo import config as compiler
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Beyond it the plain version would run, which holds the scores of all pairs of tokens.
    compiler.recompile_limit = max(compiler.recompile_limit, MOST_KERNELS)
    plain = from_library(create_block_mask), from_library(flex_attention)
    compiled = (
        from_library(torch.compile(create_block_mask, dynamic=False)),
        from_library(torch.compile(flex_attention, dynamic=False)),
    )

    def attend(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        """[T, heads, head_dim]; see `AttentionFn`."""
        make_mask, attention = compiled if query.is_cuda else plain
        num_tokens = len(query)
        query, key, value = (pad_tokens(tensor) for tensor in (query, key, value))
        if scoring.window not in samples.flex_masks:  # the same for all such layers
            visible = visibility(samples, scoring.window, len(query), len(key))
            samples.flex_masks[scoring.window] = make_mask(
                visible, None, None, len(query), len(key), device=query.device
            )
        output = attention(  # [1, heads, T, head_dim]
            *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)),
            score_mod=None if scoring.softcap is None else capped(scoring.softcap),
            block_mask=samples.flex_masks[scoring.window],
            scale=scoring.scale,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1)[:num_tokens]

    return attend


def pad_tokens(tensor: Tensor) -> Tensor:
    """[T, heads, head_dim] -> [one of few lengths, heads, head_dim], with zeros at the end."""
    length = round_up(size_class(len(tensor)), BLOCK)
    return functional.pad(tensor, (0, 0, 0, 0, 0, length - len(tensor)))


def visibility(
    samples: PackedSamples, window: int | None, num_queries: int, num_keys: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask_mod, of 0-d indices: whether a query sees a key; padding is a sample.

    Args:
        samples: queries and keys of the samples, as cumulative lengths.
        window: keys that a query sees, the last of them its own; None = all before it.
        num_queries: tokens of the padded queries.
        num_keys: tokens of the padded keys.
    """
    query_ends, key_ends = samples.cu_seqlens_q[1:], samples.cu_seqlens_kv[1:]  # int32 [samples]
    queries = torch.arange(num_queries, device=query_ends.device, dtype=torch.int32)
    keys = torch.arange(num_keys, device=query_ends.device, dtype=torch.int32)
    query_samples = torch.searchsorted(query_ends, queries, right=True, out_int32=True)
    key_samples = torch.searchsorted(key_ends, keys, right=True, out_int32=True)
    # The last query of a sample sees its last key.
    shifts = functional.pad(key_ends - query_ends, (0, 1), value=num_keys - num_queries)
    last_keys = queries + shifts[query_samples]
    width = num_keys if window is None else window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """bool, 0-d; so are the arguments, int32 indices."""
        last = last_keys[query]
        is_near = (key <= last) & (key > last - width)
        return is_near & (query_samples[query] == key_samples[key])

    return sees


@cache
def capped(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's score_mod of a soft cap, for 0-d scores.

    One function for each soft cap: every new function object would be compiled anew.
    """

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The capped score, 0-d; so are the arguments."""
        return softcap * torch.tanh(score / softcap)

    return cap
