"""Context-parallel attention over packed samples, without Transformer Engine.

Each padded sample is cut into 2 * cp_size chunks, and rank r has chunks r and
2 * cp_size - 1 - r of each (micro_batch.SequenceLayout): causal attention then costs every rank the
same. Keys and values are gathered from all ranks; the queries of a chunk see the keys of their
sample up to their own chunk's end. So each chunk is a segment whose keys end where its
queries end, which
varlen kernels know as causal attention aligned at the bottom right. The backward pass adds up the
ranks' gradients of keys and values, and gives each rank those of its own tokens (reduce-scatter).

Source: Llama 3 herd of models, 2024 (arXiv 2407.21783), section 3.3.2; the cutting into 2 * cp_size
chunks is megatron-core's (get_batch_on_this_cp_rank).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.megatron.attention.packed_samples import (
    AttentionFn,
    PackedSamples,
    ScoreOptions,
    pack_samples,
)
from sft_fast.megatron.attention.self_test import (
    AttentionShape,
    WrongResult,
    run_with_gradients,
)
from sft_fast.megatron.collectives import all_gather_single, reduce_scatter_single
from sft_fast.megatron.parallel import Parallel


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share a sequence."""

    size: int
    rank: int
    group: dist.ProcessGroup


SELF_TEST_CHUNK = 17


def context_group(parallel: Parallel) -> ContextGroup | None:
    """The ranks that share this rank's sequences; None where it has them alone."""
    if parallel.cp_size == 1:
        return None
    return ContextGroup(parallel.cp_size, parallel.cp_rank, parallel.cp_group)


@dataclass(frozen=True)
class ContextShare:
    """This rank's part of the attention over one sequence."""

    segments: PackedSamples
    """Chunks of queries, each with the keys that it sees."""
    places: Tensor
    """int64 [keys of all segments]: where they are among the gathered keys of all ranks."""
    first: Tensor
    """int64: which of them belong to the first chunk of a sample; no place is there twice."""
    second: Tensor
    """int64: which of them belong to the second chunk; likewise."""


def share_sequence(
    seqlens: tuple[int, ...], num_tokens: int, context: ContextGroup, device: torch.device
) -> ContextShare:
    """What rank `context.rank` computes.

    Args:
        seqlens: padded samples of the whole sequence, multiples of 2 * cp_size.
        num_tokens: of each rank's tensors, padding included.
        context: the ranks that share.
        device: of the result.
    """
    size, rank = context.size, context.rank
    lengths = np.array(seqlens, dtype=np.int64)
    assert (lengths % (2 * size) == 0).all(), (seqlens, size)
    chunks = lengths // (2 * size)  # tokens of a chunk of each sample
    query_lengths = np.repeat(chunks, 2)
    # A sample's first and second segment see the chunks up to r and up to 2 * size - 1 - r.
    key_lengths = np.outer(chunks, [rank + 1, 2 * size - rank]).ravel()
    segment = np.repeat(np.arange(len(key_lengths)), key_lengths)
    # Of each key of the segments: position in its sample, the sample, its chunk, the chunk's rank.
    position = np.arange(len(segment)) - (np.cumsum(key_lengths) - key_lengths)[segment]
    sample = segment // 2
    chunk, within = np.divmod(position, chunks[sample])
    owner = np.minimum(chunk, 2 * size - 1 - chunk)
    start = (np.cumsum(lengths) - lengths)[sample] // size
    start += np.where(chunk < size, 0, chunks[sample])
    places = owner * num_tokens + start + within
    is_first = segment % 2 == 0
    return ContextShare(
        segments(query_lengths, key_lengths, device),
        torch.from_numpy(places).to(device, non_blocking=True),
        torch.from_numpy(np.flatnonzero(is_first)).to(device, non_blocking=True),
        torch.from_numpy(np.flatnonzero(~is_first)).to(device, non_blocking=True),
    )


def segments(query_lengths: Any, key_lengths: Any, device: torch.device) -> PackedSamples:
    """Describes segments whose keys end where their queries end; lengths int64 [segments]."""
    edges = [
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        for lengths in (query_lengths, key_lengths)
    ]
    query_edges, key_edges = (edge.to(device, non_blocking=True) for edge in edges)
    return PackedSamples(
        qkv_format="sbhd",
        cu_seqlens_q=query_edges,
        cu_seqlens_kv=key_edges,
        max_seqlen_q=int(query_lengths.max()),
        max_seqlen_kv=int(key_lengths.max()),
        seqlens=tuple(query_lengths.tolist()),
        key_lengths=tuple(key_lengths.tolist()),
    )


class GatherKeys(torch.autograd.Function):
    """key, value [T / cp_size, kv_heads, head_dim] -> those that each segment sees, one after
    another: [sum of key_lengths, kv_heads, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, share: ContextShare, context: ContextGroup
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, kv_heads, head_dim] of all ranks, in the order of this rank's
        share.
        """
        own = torch.cat([key, value], dim=-1)  # values may have another width
        gathered = own.new_empty(context.size * len(own), *own.shape[1:])
        all_gather_single(gathered, own, group=context.group)
        ctx.share, ctx.context, ctx.own_shape = share, context, own.shape
        ctx.widths = key.shape[-1], value.shape[-1]
        keys, values = gathered.split(ctx.widths, dim=-1)
        return keys.index_select(0, share.places), values.index_select(0, share.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Any, ...]:
        """The gradients [T / cp_size, kv_heads, head_dim], summed over all ranks."""
        share, context, shape = ctx.share, ctx.context, ctx.own_shape
        total = grad_key.new_zeros(context.size * shape[0], *shape[1:])
        for of_both, grad in zip(
            total.split(ctx.widths, dim=-1), (grad_key, grad_value), strict=True
        ):
            # Within one of the two parts no place is there twice: no sum depends on an order.
            for part in (share.second, share.first):
                of_both.index_add_(0, share.places[part], grad[part])
        own = total.new_empty(shape)
        reduce_scatter_single(own, total, group=context.group)
        return *own.split(ctx.widths, dim=-1), None, None


def check_context(
    context: ContextGroup, shape: AttentionShape, scoring: ScoreOptions, attend: AttentionFn
) -> None:
    """Lets the ranks share a sample, and compares with attention of all of it on each of them.

    Raises:
        WrongResult: output or gradients differ by more than rounding; on every rank if on one.
    """
    length = 2 * context.size * SELF_TEST_CHUNK
    inputs = shape.random_inputs(length)
    chunks = torch.arange(length, device=shape.device).chunk(2 * context.size)
    own = torch.cat([chunks[context.rank], chunks[-1 - context.rank]])
    edges = torch.tensor([0, length], dtype=torch.int32, device=shape.device)
    pack = partial(pack_samples, (length,), edges)

    def shared(query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, _: Any) -> Tensor:
        """[tokens of this rank, heads, head_dim], by all ranks together."""
        return attend_in_context(attend, query, key, value, samples, scoring, context)

    whole = list(run_with_gradients(attend, inputs, pack(), scoring))
    parts = list(run_with_gradients(shared, [tensor[own] for tensor in inputs], pack(), scoring))
    errors = [
        (part - full[own]).abs().max() / full.abs().max()
        for part, full in zip(parts, whole, strict=True)
    ]
    worst = torch.stack(errors).float().nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=context.group)
    error, tolerance = float(worst.max()), 100 * torch.finfo(shape.dtype).eps
    if error > tolerance:
        raise WrongResult(
            f"with parallel.context {context.size} its output or gradient is off by {error:.2g} "
            f"of the largest value, more than {tolerance:.2g}"
        )


def attend_in_context(
    attend: AttentionFn,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    samples: PackedSamples,
    scoring: ScoreOptions,
    context: ContextGroup,
) -> Tensor:
    """Attention of this rank's tokens.

    Args:
        attend: the backend.
        query: [T / cp_size, heads, head_dim].
        key: [T / cp_size, kv_heads, head_dim].
        value: like key.
        samples: of the whole sequence.
        scoring: what the layer does with its scores.
        context: the ranks that share.

    Returns: [tokens of this rank, heads, head_dim], without the padding at the end.
    """
    if samples.share is None:  # the same for all layers
        samples.share = share_sequence(samples.seqlens, len(query), context, query.device)
    share: ContextShare = samples.share
    keys, values = GatherKeys.apply(key, value, share, context)
    query = query[: sum(share.segments.seqlens)]
    return attend(query, keys, values, share.segments, scoring)
