"""The loss kernels in plain PyTorch: what runs on a CPU, and what a GPU falls back to.

Works on blocks of rows, so that the fp32 temporaries of a block stay in the cache. The maths and
the meaning of the statistics are in kernels/README.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SKIPS_MASKED_ROWS = False
"""Every row handed in is computed: the caller selects the active rows first."""

BLOCK_ELEMENTS = 1 << 20


def row_blocks(logits: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits.shape
    block_rows = max(1, BLOCK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, block_rows):
        yield slice(start, start + block_rows)


def shard_statistics(
    logits: Tensor, labels: Tensor, vocab_start_index: int, num_columns: int
) -> Tensor:
    """What one vocabulary shard contributes to the loss of each row.

    Args:
        logits: [N, >= num_columns], any floating dtype; read once.
        labels: [N] int64 global ids.
        vocab_start_index: global id of column 0.
        num_columns: columns that count; those after them are padding and not read.

    Returns:
        [1, 3, N] fp32 (fp64 for fp64 logits): row maximum, sum of exp(logit - maximum), and the
        logit at the label, 0 where another shard holds it.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    statistics = logits.new_zeros((1, 3, len(logits)), dtype=dtype)
    logits_max, sum_exp, target_logit = statistics[0]
    if num_columns == 0:
        logits_max.fill_(-torch.inf)
        return statistics
    logits = logits[:, :num_columns]
    for rows in row_blocks(logits):
        logits_max[rows] = logits[rows].amax(1)
        shift = finite_shift(logits_max[rows]).unsqueeze(1)
        sum_exp[rows] = torch.sub(logits[rows], shift).exp_().sum(1)
    owned, columns = target_columns(labels, vocab_start_index, num_columns)
    target_logit.copy_(torch.where(owned, logits.gather(1, columns).squeeze(1), 0.0))
    return statistics


def write_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grad_loss: Tensor,
    vocab_start_index: int,
    num_columns: int,
) -> None:
    """Writes the gradient of sum(grad_loss * loss) with respect to logits; padding columns get 0.

    Args:
        gradient: [N, >= num_columns], dtype of logits; may be logits itself.
        logits: [N, >= num_columns].
        labels: [N] int64 global ids.
        statistics: [num_parts, 3, N], the shard statistics of every part of the vocabulary.
        grad_loss: [N], dtype of statistics.
        vocab_start_index: global id of column 0.
        num_columns: columns that count; those after them are padding and not read.
    """
    gradient[:, num_columns:].zero_()
    if num_columns == 0:
        return
    logits, gradient = logits[:, :num_columns], gradient[:, :num_columns]
    logits_max, sum_exp, _ = merge_statistics(statistics)
    shift, scale = finite_shift(logits_max).unsqueeze(1), (grad_loss / sum_exp).unsqueeze(1)
    owned, columns = target_columns(labels, vocab_start_index, num_columns)
    target_grad = torch.where(owned, -grad_loss, 0.0).unsqueeze(1)
    for rows in row_blocks(logits):
        block = torch.sub(logits[rows], shift[rows]).exp_().mul_(scale[rows])
        # Before the rounding to 16 bits: after it, probability - 1 would be mostly rounding error.
        block.scatter_add_(1, columns[rows], target_grad[rows])
        gradient[rows] = block


def merge_statistics(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Joins [num_parts, 3, N] shard statistics into (logits_max, sum_exp, target_logit), each [N].

    sum_exp is relative to logits_max, or to 0 in a row that holds nothing but -inf.
    """
    maxima, sums, target_logits = statistics.unbind(1)
    logits_max = maxima.amax(0)
    sum_exp = (sums * (maxima - finite_shift(logits_max)).exp()).sum(0)
    return logits_max, sum_exp, target_logits.sum(0)


def finite_shift(logits_max: Tensor) -> Tensor:
    """Replaces -inf by 0, because -inf - -inf is NaN where exp should give 0."""
    return logits_max.masked_fill(logits_max == -torch.inf, 0.0)


def target_columns(
    labels: Tensor, vocab_start_index: int, num_columns: int
) -> tuple[Tensor, Tensor]:
    """Returns whether the shard holds each label, [N], and a column safe to index with, [N, 1]."""
    columns = labels - vocab_start_index
    owned = (columns >= 0) & (columns < num_columns)
    return owned, columns.clamp(0, num_columns - 1).unsqueeze(1)
