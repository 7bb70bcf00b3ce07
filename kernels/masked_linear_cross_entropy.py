"""LM head and cross-entropy of the active rows only, as one autograd function.

Order of events. Forward: select own active rows, gather them over the sequence-parallel ranks,
multiply by the head, shard statistics, one all-gather of them, loss. Backward: the logits become
their gradient in place, the hidden gradient starts on its way to its owners while the weight
gradient is computed, its rows are scattered into zeros.

Memory policy: the logits of the active rows are stored between forward and backward.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy import (
    Backend,
    VocabShard,
    global_statistics,
    token_losses,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveRows:
    """Which rows train, and which of them lie in this rank's part of the sequence."""

    rows: Tensor
    """[A] row numbers in the whole sequence"""
    own_rows: Tensor
    """[counts[own part]] row numbers in this rank's part"""
    counts: list[int]
    """active rows of each part of the sequence; they add up to A"""


def select_rows(
    row_labels: Tensor, active_rows: Tensor | None, num_parts: int, part: int
) -> ActiveRows:
    """Splits the active rows among their owners: row i lies in part i // (n / num_parts)."""
    if active_rows is None:
        active_rows = (row_labels != IGNORE_INDEX).nonzero().squeeze(1)
    rows = copy_to(active_rows, row_labels.device)
    if num_parts == 1:
        return ActiveRows(rows, rows, [len(rows)])
    part_size = len(row_labels) // num_parts
    edges = torch.arange(num_parts + 1) * part_size
    bounds = torch.searchsorted(active_rows.cpu(), edges).tolist()
    counts = [bounds[i + 1] - bounds[i] for i in range(num_parts)]
    return ActiveRows(rows, rows[bounds[part] : bounds[part + 1]] - part * part_size, counts)


def copy_to(rows: Tensor, device: torch.device) -> Tensor:
    if rows.device == device:
        return rows
    # A copy from pageable memory would make the host wait for the device.
    return rows.pin_memory().to(device, non_blocking=True)


def all_gather_rows(own: Tensor, rows: ActiveRows, shard: VocabShard) -> Tensor:
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
    grad_rows: Tensor, rows: ActiveRows, shard: VocabShard
) -> tuple[Tensor, dist.Work | None]:
    """Starts to sum [A, h] over the ranks; returns the own rows, valid once the work is done."""
    if shard.tp_size == 1:
        return grad_rows, None
    if len(rows.counts) == 1:
        return grad_rows, dist.all_reduce(grad_rows, group=shard.tp_group, async_op=True)
    own = grad_rows.new_empty((rows.counts[shard.tp_rank], grad_rows.shape[1]))
    parts = list(grad_rows.split(rows.counts))
    return own, dist.reduce_scatter(own, parts, group=shard.tp_group, async_op=True)


class MaskedLinearCrossEntropy(torch.autograd.Function):
    """hidden [s or s/tp, b, h], weight [V/tp, h], row_labels [n] -> loss [n], 0 at masked rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        row_labels: Tensor,
        rows: ActiveRows,
        shard: VocabShard,
        kernels: Backend,
        accumulate_into_main_grad: bool,
    ) -> Tensor:
        active_hidden = hidden.flatten(0, 1).index_select(0, rows.own_rows)
        if len(rows.counts) > 1:
            active_hidden = all_gather_rows(active_hidden, rows, shard)
        labels = row_labels.index_select(0, rows.rows)
        logits = active_hidden @ weight.t()
        statistics = global_statistics(logits, labels, shard, kernels)
        loss = token_losses(statistics, labels, shard.vocab_size)
        ctx.save_for_backward(active_hidden, weight, labels, statistics)
        ctx.logits, ctx.hidden_shape = logits, hidden.shape
        ctx.rows, ctx.shard, ctx.kernels = rows, shard, kernels
        ctx.accumulate_into_main_grad = accumulate_into_main_grad
        return loss.new_zeros(row_labels.shape).index_copy_(0, rows.rows, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        active_hidden, weight, labels, statistics = ctx.saved_tensors
        # The gradient overwrites the logits: a second backward has to compute them again.
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            logits = active_hidden @ weight.t()
        grad_loss = grad_loss.index_select(0, ctx.rows.rows)
        columns = ctx.shard.vocab_start_index, ctx.shard.num_columns
        ctx.kernels.write_gradient(logits, logits, labels, statistics, grad_loss, *columns)
        own_grad, reduction, grad_hidden, grad_weight = None, None, None, None
        if ctx.needs_input_grad[0]:
            own_grad, reduction = start_reduction(logits @ weight, ctx.rows, ctx.shard)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(
                weight, logits, active_hidden, ctx.accumulate_into_main_grad
            )
        if reduction is not None:
            reduction.wait()
        if own_grad is not None:
            grad_hidden = own_grad.new_zeros(ctx.hidden_shape)
            grad_hidden.view(-1, weight.shape[1]).index_copy_(0, ctx.rows.own_rows, own_grad)
        return grad_hidden, grad_weight, None, None, None, None, None


def weight_gradient(
    weight: Tensor, grad_logits: Tensor, hidden: Tensor, accumulate_into_main_grad: bool
) -> Tensor | None:
    """The gradient of weight for autograd, or a stand-in once it has gone into main_grad."""
    if not accumulate_into_main_grad:
        return grad_logits.t() @ hidden
    parameter: Any = weight
    add_product_(parameter.main_grad, grad_logits.t(), hidden)
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    # Megatron's DDP hook wants to see a gradient, and adds it to main_grad if zero_out_wgrad.
    make = torch.zeros if getattr(parameter, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be wider than the factors."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif right.device.type == "cpu":
        right = right.to(total.dtype)
        for total_rows, left_rows in zip(total.split(8192), left.split(8192), strict=True):
            total_rows.addmm_(left_rows.to(total.dtype), right)
    elif adds_to_wider_sum(right.device, right.dtype, total.dtype):
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


@functools.cache
def adds_to_wider_sum(device: torch.device, dtype: torch.dtype, sum_dtype: torch.dtype) -> bool:
    """Tries it on a small matrix: ROCm builds of torch have refused such a product."""
    factor = torch.zeros((16, 16), dtype=dtype, device=device)
    total = factor.to(sum_dtype)
    try:
        torch.ops.aten.addmm.dtype_out(total, factor, factor, sum_dtype, out=total)
    except (RuntimeError, NotImplementedError) as error:
        log.warning(
            "LM head gradient: rounded to %s before it is added to main_grad, because this build "
            "of torch cannot add the product itself: %s",
            dtype,
            error,
        )
        return False
    return True
