"""Vocab-parallel cross-entropy as an autograd function, over any of the backends."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy_torch import merge_statistics


class Backend(Protocol):
    """A module of kernels/; masked_cross_entropy_torch.py says what the functions do."""

    SKIPS_MASKED_ROWS: bool

    def shard_statistics(
        self, logits: Tensor, labels: Tensor, vocab_start_index: int, num_columns: int, /
    ) -> Tensor: ...

    def write_gradient(
        self,
        gradient: Tensor,
        logits: Tensor,
        labels: Tensor,
        statistics: Tensor,
        grad_loss: Tensor,
        vocab_start_index: int,
        num_columns: int,
        /,
    ) -> None: ...


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the vocabulary, and the ranks that hold the others."""

    vocab_size: int
    vocab_start_index: int
    num_columns: int
    """columns that are not padding"""
    tp_group: dist.ProcessGroup | None
    tp_rank: int
    tp_size: int


# torch 2.13 gave the function a new name and deprecated the old one.
all_gather_equal_sizes = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def global_statistics(
    logits: Tensor, labels: Tensor, shard: VocabShard, kernels: Backend
) -> Tensor:
    """Statistics of every part of the vocabulary, [num_parts, 3, N]: the loss's one collective."""
    own = kernels.shard_statistics(logits, labels, shard.vocab_start_index, shard.num_columns)
    if shard.tp_size == 1:
        return own
    gathered = own.new_empty((shard.tp_size * len(own), *own.shape[1:]))
    all_gather_equal_sizes(gathered, own, group=shard.tp_group)
    return gathered


def token_losses(statistics: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Loss of each row, [N]; NaN where the label has no column."""
    logits_max, sum_exp, target_logit = merge_statistics(statistics)
    loss = sum_exp.log() - (target_logit - logits_max)
    return torch.where((labels >= 0) & (labels < vocab_size), loss, torch.nan)


class MaskedCrossEntropy(torch.autograd.Function):
    """Loss of logits that belong to somebody else: [N, V/tp] -> [N]; the gradient is a new tensor.

    A backend that cannot leave masked rows alone gets a copy of the active ones.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard, kernels: Backend
    ) -> Tensor:
        ctx.shard, ctx.kernels = shard, kernels
        if kernels.SKIPS_MASKED_ROWS:
            statistics = global_statistics(logits, labels, shard, kernels)
            ctx.save_for_backward(logits, labels, None, statistics)
            loss = token_losses(statistics, labels, shard.vocab_size)
            return torch.where(labels == IGNORE_INDEX, 0.0, loss)
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        active_labels = labels.index_select(0, rows)
        statistics = global_statistics(logits.index_select(0, rows), active_labels, shard, kernels)
        ctx.save_for_backward(logits, active_labels, rows, statistics)
        loss = token_losses(statistics, active_labels, shard.vocab_size)
        return loss.new_zeros(labels.shape).index_copy_(0, rows, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, rows, statistics = ctx.saved_tensors
        columns = ctx.shard.vocab_start_index, ctx.shard.num_columns
        if rows is None:
            gradient = torch.empty_like(logits)
            ctx.kernels.write_gradient(gradient, logits, labels, statistics, grad_loss, *columns)
            return gradient, None, None, None
        active = logits.index_select(0, rows)
        grad_loss = grad_loss.index_select(0, rows)
        ctx.kernels.write_gradient(active, active, labels, statistics, grad_loss, *columns)
        return torch.zeros_like(logits).index_copy_(0, rows, active), None, None, None
