"""Which tokens train, and their way between the ranks that own them and the LM head."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy import VocabShard


@dataclass(frozen=True)
class ActiveTokens:
    """Which of n tokens train, and which of those lie in this rank's part of the sequence."""

    indices: Tensor
    """[A] int64, ascending, in the whole sequence"""
    own_indices: Tensor | None
    """[counts[own part]] int64, in this rank's part; None: hidden states are of these alone"""
    counts: list[int]
    """active tokens of each part of the sequence; they add up to A"""


def select_active_tokens(
    labels: Tensor, indices: Tensor | None, num_parts: int, part: int
) -> ActiveTokens:
    """Splits the active tokens among their owners: token i lies in part i // (n / num_parts).

    Args:
        labels: [n] int64, IGNORE_INDEX where a token does not train.
        indices: [A] int64, those of the active tokens; None: found in labels.
        num_parts: equal parts of the sequence, of ranks that each hold one.
        part: this rank's.
    """
    if indices is None:
        indices = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [A]
    on_device = copy_to(indices, labels.device)
    if num_parts == 1:
        return ActiveTokens(on_device, on_device, [len(on_device)])
    part_size = len(labels) // num_parts
    edges = torch.arange(num_parts + 1) * part_size  # [num_parts + 1]
    # On the host, because the gather must know the sizes of its parts before the device does.
    bounds = torch.searchsorted(indices.cpu(), edges).tolist()
    counts = [bounds[i + 1] - bounds[i] for i in range(num_parts)]
    own_indices = on_device[bounds[part] : bounds[part + 1]] - part * part_size
    return ActiveTokens(on_device, own_indices, counts)


def copy_to(indices: Tensor, device: torch.device) -> Tensor:
    """The same [A] on a device."""
    if indices.device == device:
        return indices
    # A copy from pageable memory would make the host wait for the device.
    return indices.pin_memory().to(device, non_blocking=True)


def all_gather_tokens(own: Tensor, active: ActiveTokens, shard: VocabShard) -> Tensor:
    """[own count, h] of each rank -> [A, h] in token order; counts may differ and may be 0."""
    gathered = own.new_empty((sum(active.counts), own.shape[1]))  # [A, h]
    parts = list(gathered.split(active.counts))
    if own.device.type != "cpu":
        dist.all_gather(parts, own, group=shard.tp_group)
        return gathered
    # gloo's all_gather refuses parts of different sizes.
    parts[shard.tp_rank].copy_(own)
    for source, part in enumerate(parts):
        dist.broadcast(part, group=shard.tp_group, group_src=source)
    return gathered


def start_reduction(
    grad: Tensor, active: ActiveTokens, shard: VocabShard
) -> tuple[Tensor, dist.Work | None]:
    """Starts to sum [A, h] over the ranks.

    Returns:
        The sum, valid once the work is done: all of it [A, h], or where the sequence is in parts
        that of the own tokens [own count, h].
    """
    if shard.tp_size == 1:
        return grad, None
    if len(active.counts) == 1:
        return grad, dist.all_reduce(grad, group=shard.tp_group, async_op=True)
    own = grad.new_empty((active.counts[shard.tp_rank], grad.shape[1]))  # [own count, h]
    parts = list(grad.split(active.counts))
    return own, dist.reduce_scatter(own, parts, group=shard.tp_group, async_op=True)
