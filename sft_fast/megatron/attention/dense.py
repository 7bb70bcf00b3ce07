"""PyTorch's dense attention: of whole samples, and of packed ones in groups of similar length.

It is what every other backend is compared with, and runs on every device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.megatron.attention.packed_samples import PackedSamples, ScoreOptions, size_class


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scoring: ScoreOptions) -> Tensor:
    """Causal attention where every column is one sample.

    Args:
        query: [s, b, heads, head_dim].
        key: [s, b, kv_heads, head_dim].
        value: [s, b, kv_heads, head_dim].
        scoring: of the layer.

    Returns: [s, b, heads, head_dim].
    """
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
    length = query.shape[2]
    is_whole = scoring.window is None or scoring.window >= length
    mask = None if is_whole else window_mask(length, scoring.window, query.device)
    if scoring.softcap is None:
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_whole,
            scale=scoring.scale,
            enable_gqa=True,
        )
    else:
        if mask is None:
            mask = window_mask(length, None, query.device)
        output = capped_attention(query, key, value, mask, scoring)
    return output.permute(2, 0, 1, 3)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: which keys (columns) a query (row) attends to."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: ScoreOptions
) -> Tensor:
    """Attention with a soft cap, which PyTorch's own does not have.

    The weights are computed in fp32, and all of them are in memory.

    Args:
        query: [b, heads, q, head_dim].
        key: [b, kv_heads, k, head_dim].
        value: [b, kv_heads, k, head_dim].
        mask: bool, broadcast to [b, heads, q, k]: which keys a query attends to.
        scoring: of the layer; has a soft cap.

    Returns: [b, heads, q, head_dim].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scoring.scale  # [b, heads, q, k]
    assert scoring.softcap is not None
    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.masked_fill_(~mask, -math.inf).softmax(dim=-1)
    return weights.to(value.dtype) @ value


def attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
) -> Tensor:
    """The `AttentionFn` of PyTorch's dense attention, over groups of samples of similar length.

    Args:
        query: [T, heads, head_dim].
        key: [keys, kv_heads, head_dim].
        value: [keys, kv_heads, head_dim].
        samples: which tokens belong together.
        scoring: of the layer.

    Returns: [T, heads, head_dim].
    """
    if samples.key_lengths is not None:
        return attend_prefixes(query, key, value, samples, scoring)
    groups, order = samples.groups
    outputs = []
    for tokens in groups:  # [samples, longest]
        index = tokens.t().flatten().to(query.device, non_blocking=True)
        parts = [tensor.index_select(0, index) for tensor in (query, key, value)]
        columns = [part.unflatten(0, tokens.t().shape) for part in parts]
        output = dense_attention(columns[0], columns[1], columns[2], scoring)
        outputs.append(output.transpose(0, 1).flatten(0, 1))  # sample by sample
    return torch.cat(outputs).index_select(0, order.to(query.device, non_blocking=True))


def attend_prefixes(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
) -> Tensor:
    """`attend_sdpa` where samples have more keys than queries, under context parallelism.

    Shapes as there: queries [T, heads, head_dim], keys and values [keys, kv_heads, head_dim].
    """
    outputs, order = [], []
    for members, query_tokens, key_tokens, mask in prefix_groups(samples, scoring.window):
        columns = [
            tensor.index_select(0, tokens.flatten().to(query.device)).unflatten(0, tokens.shape)
            for tensor, tokens in ((query, query_tokens), (key, key_tokens), (value, key_tokens))
        ]
        q, k, v = (column.transpose(1, 2) for column in columns)  # [n, heads, q or k, head_dim]
        mask = mask.to(query.device)[:, None]  # [n, 1, q, k]
        if scoring.softcap is None:
            output = functional.scaled_dot_product_attention(
                q, k, v, mask, scale=scoring.scale, enable_gqa=True
            )
        else:
            output = capped_attention(q, k, v, mask, scoring)
        outputs.append(output.transpose(1, 2).flatten(0, 1)[members.to(query.device)])
        order.append(query_tokens.flatten()[members])
    places = torch.cat(order).argsort().to(query.device)
    return torch.cat(outputs).index_select(0, places)


def prefix_groups(
    samples: PackedSamples, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Groups of n samples that have similar numbers of queries and of keys, on the CPU.

    Yields:
        The places of the samples' own queries in the flattened query tokens, int64; query tokens
        int64 [n, q] and key tokens int64 [n, k], where a shorter sample repeats its first token;
        mask bool [n, q, k].
    """
    assert samples.key_lengths is not None
    lengths = torch.tensor([samples.seqlens, samples.key_lengths])  # [2, samples]
    starts = lengths.cumsum(1) - lengths
    classes = torch.tensor([[size_class(n) for n in row.tolist()] for row in lengths])
    for pair in classes.unique(dim=1).t():
        chosen = (classes == pair[:, None]).all(0)
        queries, keys = lengths[:, chosen, None]  # [n, 1] each
        steps = [torch.arange(int(length.max())) for length in (queries, keys)]
        is_own = steps[0] < queries
        query_tokens = starts[0, chosen, None] + torch.where(is_own, steps[0], 0)
        key_tokens = starts[1, chosen, None] + torch.where(steps[1] < keys, steps[1], 0)
        # The last query sees the last key; repeated queries see what that one sees.
        last_key = (keys - queries + steps[0]).clamp(max=keys - 1)[..., None]  # [n, q, 1]
        mask = steps[1] <= last_key
        if window is not None:
            mask &= steps[1] > last_key - window
        yield is_own.flatten().nonzero()[:, 0], query_tokens, key_tokens, mask
