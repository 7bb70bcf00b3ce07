"""The loss kernels in plain PyTorch: what runs on a CPU, and what a GPU falls back to.

Works on blocks of tokens, so that the fp32 temporaries of a block stay in the cache. The maths and
the meaning of the statistics are in kernels/README.md.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sft_fast.kernels.loss_options import LossOptions
from sft_fast.kernels.masked_cross_entropy import VocabColumns

SKIPS_MASKED_TOKENS = False

BLOCK_ELEMENTS = 1 << 20


class Merged(NamedTuple):
    """Statistics over the whole vocabulary, each [N]; None where they were not collected."""

    logits_max: Tensor
    sum_exp: Tensor
    """relative to logits_max, or to 0 where all logits are -inf"""
    target_logit: Tensor
    logit_sum: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None
    """a whole number"""


def token_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of the N tokens of logits [N, width], each of about BLOCK_ELEMENTS."""
    num_tokens, width = logits.shape
    block_tokens = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, num_tokens, block_tokens):
        yield slice(start, start + block_tokens)


def shard_statistics(
    logits: Tensor,
    labels: Tensor,
    columns: VocabColumns,
    options: LossOptions,
    with_outputs: bool,
) -> Tensor:
    """LossKernels.shard_statistics: [1, S, N] of logits [N, width] of any stride, read once."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    count = options.num_statistics(with_outputs)
    statistics = logits.new_zeros((1, count, len(logits)), dtype=dtype)
    logits_max, sum_exp, target_logit, *more = statistics[0]  # [N] each
    if columns.num_columns == 0:
        logits_max.fill_(-torch.inf)
        return statistics
    owned, targets = target_columns(labels, columns)
    for tokens in token_blocks(logits):
        block = capped(logits[tokens, : columns.num_columns], options.logit_softcap)  # [block, V]
        logits_max[tokens] = block.amax(1)
        shift = finite_shift(logits_max[tokens]).unsqueeze(1)  # [block, 1]
        exponentials = torch.sub(block, shift).exp_()  # [block, V]
        sum_exp[tokens] = exponentials.sum(1)
        target = block.gather(1, targets[tokens]).squeeze(1)  # [block]
        target_logit[tokens] = torch.where(owned[tokens], target, 0.0).to(dtype)
        if options.label_smoothing > 0:
            more[0][tokens] = block.sum(1, dtype=dtype)
        if with_outputs:
            # Clamped, because exp(-inf) * -inf is NaN where it should add nothing.
            distances = torch.sub(block, shift).clamp_min_(torch.finfo(dtype).min)
            more[-2][tokens] = exponentials.mul_(distances).sum(1)
            more[-1][tokens] = (columns.vocab_start_index + block.argmax(1)).to(dtype)
    return statistics


def token_losses(
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    options: LossOptions,
    with_outputs: bool,
) -> Tensor:
    """LossKernels.token_losses: [1, N], with_outputs [4, N], of statistics [num_parts, S, N]."""
    smoothing = options.label_smoothing
    merged = merge_statistics(statistics, smoothing > 0)
    log_sum = merged.sum_exp.log()  # [N]
    logprob = (merged.target_logit - merged.logits_max) - log_sum
    logprob = torch.where((labels >= 0) & (labels < vocab_size), logprob, torch.nan)
    loss = -logprob
    if merged.logit_sum is not None:
        mean_logprob = (merged.logit_sum / vocab_size - merged.logits_max) - log_sum
        loss = (1 - smoothing) * loss - smoothing * mean_logprob
    if options.z_loss > 0:
        loss = loss + options.z_loss * (merged.logits_max + log_sum).square()
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
    columns: VocabColumns,
    options: LossOptions,
) -> None:
    """LossKernels.write_gradient: gradient [N, width] from grads [2, N]."""
    num_columns, smoothing = columns.num_columns, options.label_smoothing
    gradient[:, num_columns:].zero_()
    if num_columns == 0:
        return
    logits, gradient = logits[:, :num_columns], gradient[:, :num_columns]
    merged = merge_statistics(statistics[:, :3])
    shift, (grad_loss, grad_logprob) = finite_shift(merged.logits_max), grads  # [N] each
    lse = shift + merged.sum_exp.log()
    scale = grad_loss * (1 + 2 * options.z_loss * lse) if options.z_loss > 0 else grad_loss
    scale = ((scale - grad_logprob) / merged.sum_exp).unsqueeze(1)  # [N, 1]
    owned, targets = target_columns(labels, columns)
    target_grad = grad_logprob - (1 - smoothing) * grad_loss
    target_grad = torch.where(owned, target_grad, 0.0).unsqueeze(1)  # [N, 1]
    uniform_grad = (grad_loss * (smoothing / columns.vocab_size)).unsqueeze(1)  # [N, 1]
    for tokens in token_blocks(logits):
        capped_logits = capped(logits[tokens], options.logit_softcap)  # [block, V]
        block = torch.sub(capped_logits, shift[tokens].unsqueeze(1)).exp_().mul_(scale[tokens])
        # Before the rounding to 16 bits: after it, probability - 1 would be mostly rounding error.
        block.scatter_add_(1, targets[tokens], target_grad[tokens])
        if smoothing > 0:
            block.sub_(uniform_grad[tokens])
        if options.logit_softcap > 0:
            block.mul_(1 - (capped_logits / options.logit_softcap).square_())
        gradient[tokens] = block


def merge_statistics(statistics: Tensor, has_logit_sum: bool = False) -> Merged:
    """Joins the statistics of every part of the vocabulary, [num_parts, S, N].

    Args:
        statistics: as shard_statistics returns them.
        has_logit_sum: the fourth of them is the sum of the logits.
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
    """softcap * tanh(logits / softcap), [N, V] fp32 or wider; softcap 0: the logits themselves."""
    if softcap == 0:
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / softcap).tanh_().mul_(softcap)


def finite_shift(logits_max: Tensor) -> Tensor:
    """Maxima [N] with 0 for -inf, because -inf - -inf is NaN where exp should give 0."""
    return logits_max.masked_fill(logits_max == -torch.inf, 0.0)


def target_columns(labels: Tensor, columns: VocabColumns) -> tuple[Tensor, Tensor]:
    """Whether the shard holds each label, [N], and a column that is safe to index with, [N, 1]."""
    targets = labels - columns.vocab_start_index
    owned = (targets >= 0) & (targets < columns.num_columns)
    return owned, targets.clamp(0, columns.num_columns - 1).unsqueeze(1)
