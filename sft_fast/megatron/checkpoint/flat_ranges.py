"""A flat range of a rank's tensor as blocks of the global tensor.

It is a few rectangles: the rest of its first row, its full rows, the start of its last row, and so
on inwards.
"""

import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from sft_fast.constants import ceil_div
from sft_fast.megatron.checkpoint.shards import Sizes

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


def rectangles(shape: Sizes, begin: int, end: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Offsets and shapes of the at most 2 * ndim - 1 blocks that are elements begin..end-1, in
    order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row, inner = math.prod(shape[1:]), shape[1:]
    first, last = ceil_div(begin, row), end // row
    if first > last:
        yield from in_row(last, inner, begin - last * row, end - last * row)
        return
    yield from in_row(first - 1, inner, begin - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    yield from in_row(last, inner, 0, end - last * row)


def in_row(row: int, inner: Sizes, begin: int, end: int) -> Iterator[tuple[Sizes, Sizes]]:
    """The blocks of a range within one entry of the first dimension."""
    for offset, shape in rectangles(inner, begin, end):
        yield (row, *offset), (1, *shape)


def flat_blocks(sharded: Sharded) -> Iterator[tuple[int, ShardedTensor]]:
    """The blocks that consecutive elements of a local tensor are, each with its first element."""
    if isinstance(sharded, ShardedTensor):
        yield 0, sharded
        return
    local = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    build = (sharded.key, local, sharded.replica_id, sharded.flattened_range)
    num_elements = 0
    for block in nested_values({"built": sharded.build_fn(*build)}):
        data = block.data
        assert data.is_contiguous(), f"{sharded.key}: a part of it is not consecutive in memory"
        num_elements += data.numel()
        yield data.storage_offset(), block
    assert num_elements == local.numel(), f"{sharded.key}: its parts are not the whole"


def as_rectangles(
    sharded: Sharded, begin: int, end: int, prefix: str, values: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[int, int, ShardedTensor]]:
    """Elements begin..end-1 of a local tensor as blocks of the global tensor.

    Args:
        sharded: the local tensor's place in the global one.
        begin: first element.
        end: last element + 1.
        prefix: added to the tensor's key.
        values: [end - begin], those elements; None for a request.
        dtype: of the elements.

    Returns: for each block its first and last + 1 element, counted from `begin`.
    """
    for start, block in flat_blocks(sharded):
        local = tuple(block.local_shape)
        first, last = max(begin - start, 0), min(end - start, math.prod(local))
        lead = (1,) * block.prepend_axis_num
        for offset, shape in rectangles(local, first, last):
            place = (*block.global_offset[: len(lead)], *offset)
            base = (0,) * len(lead) + tuple(block.global_offset[len(lead) :])
            at = start + first - begin
            after = at + math.prod(shape)
            first += math.prod(shape)
            rectangle = ShardedTensor(
                key=f"{prefix}{block.key}",
                data=None if values is None else values[at:after].view((*lead, *shape)),
                dtype=dtype,
                local_shape=(*lead, *shape),
                global_shape=tuple(block.global_shape),
                global_offset=tuple(a + b for a, b in zip(place, base, strict=True)),
                axis_fragmentations=None,
                allow_shape_mismatch=block.allow_shape_mismatch,
            )
            yield at, after, rectangle
