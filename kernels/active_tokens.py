"""Which rows train, and their way between the ranks that own them and the LM head."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy import VocabShard


@dataclass(frozen=True)
class ActiveTokens:
    """Which rows train, and which of them lie in this rank's part of the sequence."""

    rows: Tensor
    """[A] row numbers in the whole sequence"""
    own_rows: Tensor
    """[counts[own part]] row numbers in this rank's part"""
    counts: list[int]
    """active rows of each part of the sequence; they add up to A"""


def select_rows(
    row_labels: Tensor, active_tokens: Tensor | None, num_parts: int, part: int
) -> ActiveTokens:
    """Splits the active rows among their owners: row i lies in part i // (n / num_parts)."""
    if active_tokens is None:
        active_tokens = (row_labels != IGNORE_INDEX).nonzero().squeeze(1)
    rows = copy_to(active_tokens, row_labels.device)
    if num_parts == 1:
        return ActiveTokens(rows, rows, [len(rows)])
    part_size = len(row_labels) // num_parts
    edges = torch.arange(num_parts + 1) * part_size
    bounds = torch.searchsorted(active_tokens.cpu(), edges).tolist()
    counts = [bounds[i + 1] - bounds[i] for i in range(num_parts)]
    return ActiveTokens(rows, rows[bounds[part] : bounds[part + 1]] - part * part_size, counts)


def copy_to(rows: Tensor, device: torch.device) -> Tensor:
    if rows.device == device:
        return rows
    # A copy from pageable memory would make the host wait for the device.
    return rows.pin_memory().to(device, non_blocking=True)


def all_gather_rows(own: Tensor, rows: ActiveTokens, shard: VocabShard) -> Tensor:
    """[own count, h] of each rank -> [A, h] in row order; counts may differ and may be 0."""
    gathered = own.new_empty((sum(rows.counts), own.shape[1]))
    parts = list(gathered.split(rows.counts))
    if own.device.type != "cpu":
        dist.all_gather(parts, own, group=shard.tp_group)
        return gathered
    # gloo's all_gather refuses parts of different sizes.
    parts[shard.tp_rank].copy_(own)
    for source, part in enumerate(parts):
        dist.broadcast(part, group=shard.tp_group, group_src=source)
    return gathered


def start_reduction(
    grad_rows: Tensor, rows: ActiveTokens, shard: VocabShard
) -> tuple[Tensor, dist.Work | None]:
    """Starts to sum [A, h] over the ranks; returns the own rows, valid once the work is done."""
    if shard.tp_size == 1:
        return grad_rows, None
    if len(rows.counts) == 1:
        return grad_rows, dist.all_reduce(grad_rows, group=shard.tp_group, async_op=True)
    own = grad_rows.new_empty((rows.counts[shard.tp_rank], grad_rows.shape[1]))
    parts = list(grad_rows.split(rows.counts))
    return own, dist.reduce_scatter(own, parts, group=shard.tp_group, async_op=True)
