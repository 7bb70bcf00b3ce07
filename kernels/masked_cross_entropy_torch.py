"""The loss kernels in plain PyTorch: what runs on a CPU, and what a GPU falls back to.

Works on blocks of rows, so that the fp32 temporaries of a block stay in the cache. The maths and
the meaning of the statistics are in kernels/README.md.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SKIPS_MASKED_ROWS = False
"""Every row handed in is computed: the caller selects the active rows first."""

BLOCK_ELEMENTS = 1 << 20


class Merged(NamedTuple):
    """Statistics of whole rows, each [N]; None where they were not collected."""

    logits_max: Tensor
    sum_exp: Tensor
    """relative to logits_max, or to 0 in a row that holds nothing but -inf"""
    target_logit: Tensor
    logit_sum: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None
    """a whole number"""


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Yields slices of the rows of logits [N, columns] that fit a bounded buffer."""
    num_rows, num_columns = logits.shape
    block_rows = max(1, BLOCK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, block_rows):
        yield slice(start, start + block_rows)


def shard_statistics(
    logits: Tensor,
    labels: Tensor,
    vocab_start_index: int,
    num_columns: int,
    softcap: float,
    with_logit_sum: bool,
    with_outputs: bool,
) -> Tensor:
    """What one vocabulary shard contributes to the loss of each row.

    Args:
        logits: [N, >= num_columns], any floating dtype; read once.
        labels: [N] int64 global ids.
        vocab_start_index: global id of column 0.
        num_columns: columns that count; those after them are padding and not read.
        softcap: 0, or the bound that logits are squeezed into first.
        with_logit_sum: collect what label smoothing needs.
        with_outputs: collect what entropy and argmax need.

    Returns:
        [1, S, N] fp32 (fp64 for fp64 logits): row maximum, sum of exp(logit - maximum), and the
        logit at the label, 0 where another shard holds it. Then, with_logit_sum, the sum of the
        logits. Then, with_outputs, the sum of exp(logit - maximum) * (logit - maximum) and the
        global id of the first maximum.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    count = 3 + with_logit_sum + 2 * with_outputs
    statistics = logits.new_zeros((1, count, len(logits)), dtype=dtype)
    logits_max, sum_exp, target_logit, *more = statistics[0]
    if num_columns == 0:
        logits_max.fill_(-torch.inf)
        return statistics
    owned, columns = target_columns(labels, vocab_start_index, num_columns)
    for rows in row_blocks(logits):
        block = capped(logits[rows, :num_columns], softcap)
        logits_max[rows] = block.amax(1)
        shift = finite_shift(logits_max[rows]).unsqueeze(1)
        exponentials = torch.sub(block, shift).exp_()
        sum_exp[rows] = exponentials.sum(1)
        target = block.gather(1, columns[rows]).squeeze(1)
        target_logit[rows] = torch.where(owned[rows], target, 0.0).to(dtype)
        if with_logit_sum:
            more[0][rows] = block.sum(1, dtype=dtype)
        if with_outputs:
            # Clamped, because exp(-inf) * -inf is NaN where it should add nothing.
            distances = torch.sub(block, shift).clamp_min_(torch.finfo(dtype).min)
            more[-2][rows] = exponentials.mul_(distances).sum(1)
            more[-1][rows] = (vocab_start_index + block.argmax(1)).to(dtype)
    return statistics


def row_losses(
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_outputs: bool,
) -> Tensor:
    """Joins the statistics of all parts of the vocabulary into the loss of each row.

    Args:
        statistics: [num_parts, S, N], the shard statistics of every part of the vocabulary.
        labels: [N] int64 global ids.
        vocab_size: columns that count, over all shards.
        label_smoothing: share of the target that is spread.
        z_loss: factor of lse**2.
        with_outputs: the statistics were collected with_outputs.

    Returns:
        [1, N], dtype of statistics: the loss, NaN where the label has no column. With_outputs
        [4, N]: also log p(label), the entropy, and 1 where the label is the first argmax, else 0.
    """
    merged = merge_statistics(statistics, label_smoothing > 0)
    log_sum = merged.sum_exp.log()
    logprob = (merged.target_logit - merged.logits_max) - log_sum
    logprob = torch.where((labels >= 0) & (labels < vocab_size), logprob, torch.nan)
    loss = -logprob
    if merged.logit_sum is not None:
        mean_logprob = (merged.logit_sum / vocab_size - merged.logits_max) - log_sum
        loss = (1 - label_smoothing) * loss - label_smoothing * mean_logprob
    if z_loss > 0:
        loss = loss + z_loss * (merged.logits_max + log_sum).square()
    if not with_outputs:
        return loss.unsqueeze(0)
    assert merged.entropy is not None and merged.argmax is not None
    correct = (merged.argmax == labels).to(loss.dtype)
    return torch.stack([loss, logprob, merged.entropy, correct])


def write_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    vocab_start_index: int,
    num_columns: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Writes the gradient of sum(grads[0] * loss + grads[1] * logprob) with respect to logits.

    Args:
        gradient: [N, >= num_columns], dtype of logits; may be logits itself. Padding columns
            get 0.
        logits: [N, >= num_columns].
        labels: [N] int64 global ids.
        statistics: [num_parts, S, N], the shard statistics of every part of the vocabulary.
        grads: [2, N], dtype of statistics.
        vocab_start_index: global id of column 0.
        num_columns: columns that count; those after them are padding and not read.
        vocab_size: columns that count, over all shards.
        label_smoothing, z_loss, softcap: as in LossOptions.
    """
    gradient[:, num_columns:].zero_()
    if num_columns == 0:
        return
    logits, gradient = logits[:, :num_columns], gradient[:, :num_columns]
    merged = merge_statistics(statistics[:, :3])
    shift, (grad_loss, grad_logprob) = finite_shift(merged.logits_max), grads
    lse = shift + merged.sum_exp.log()
    scale = grad_loss * (1 + 2 * z_loss * lse) if z_loss > 0 else grad_loss
    scale = ((scale - grad_logprob) / merged.sum_exp).unsqueeze(1)
    owned, columns = target_columns(labels, vocab_start_index, num_columns)
    target_grad = grad_logprob - (1 - label_smoothing) * grad_loss
    target_grad = torch.where(owned, target_grad, 0.0).unsqueeze(1)
    uniform_grad = (grad_loss * (label_smoothing / vocab_size)).unsqueeze(1)
    for rows in row_blocks(logits):
        capped_logits = capped(logits[rows], softcap)
        block = torch.sub(capped_logits, shift[rows].unsqueeze(1)).exp_().mul_(scale[rows])
        # Before the rounding to 16 bits: after it, probability - 1 would be mostly rounding error.
        block.scatter_add_(1, columns[rows], target_grad[rows])
        if label_smoothing > 0:
            block.sub_(uniform_grad[rows])
        if softcap > 0:
            block.mul_(1 - (capped_logits / softcap).square_())
        gradient[rows] = block


def merge_statistics(statistics: Tensor, has_logit_sum: bool = False) -> Merged:
    """Joins [num_parts, S, N] shard statistics.

    Args:
        statistics: as shard_statistics returns them, for every part of the vocabulary.
        has_logit_sum: they were collected with_logit_sum.
    """
    maxima, sums, target_logits, *more = statistics.unbind(1)
    logits_max = maxima.amax(0)
    distances = maxima - finite_shift(logits_max)
    weights = distances.exp()
    sum_exp = (sums * weights).sum(0)
    logit_sum = more.pop(0).sum(0) if has_logit_sum else None
    if len(more) < 2:
        return Merged(logits_max, sum_exp, target_logits.sum(0), logit_sum, None, None)
    weighted, argmaxes = more
    distances = distances.clamp_min(torch.finfo(statistics.dtype).min)
    mean_distance = ((weighted + sums * distances) * weights).sum(0) / sum_exp
    argmax = argmaxes.masked_fill(maxima != logits_max, torch.inf).amin(0)
    entropy = sum_exp.log() - mean_distance
    return Merged(logits_max, sum_exp, target_logits.sum(0), logit_sum, entropy, argmax)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in fp32 or wider; softcap 0: the logits themselves."""
    if softcap == 0:
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / softcap).tanh_().mul_(softcap)


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
