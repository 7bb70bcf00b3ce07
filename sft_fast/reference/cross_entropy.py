"""Oracles of the loss: cross-entropy written as a textbook would, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX


def cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int | None = None) -> Tensor:
    """Per-token cross-entropy; a token whose label is IGNORE_INDEX is skipped.

    Args:
        logits: [N, V_padded], any floating dtype; the loss is computed in that dtype.
        labels: [N] integer ids below vocab_size, or IGNORE_INDEX.
        vocab_size: columns that count; the rest is padding. None: all of them.

    Returns:
        [N] loss in nats, 0 at skipped tokens.
    """
    active = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [A]
    active_logits = logits[active, :vocab_size]  # [A, V]
    target_logits = active_logits.gather(1, labels[active].unsqueeze(1)).squeeze(1)
    loss = active_logits.logsumexp(1) - target_logits
    return logits.new_zeros(labels.shape).index_copy(0, active, loss)


def penalised_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
) -> Tensor:
    """`cross_entropy` with softcapped logits, a smoothed target and a z-loss.

    Args:
        logits: [N, V_padded], as in `cross_entropy`.
        labels: [N].
        vocab_size: columns that count.
        label_smoothing: share of the target spread evenly over the columns that count.
        z_loss: factor of logsumexp(logits)**2.
        logit_softcap: bound c of the logits c * tanh(logits / c); 0: no bound.

    Returns:
        [N] loss in nats, 0 at skipped tokens.
    """
    active = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [A]
    active_logits = logits[active, :vocab_size]  # [A, V]
    if logit_softcap > 0:
        active_logits = logit_softcap * torch.tanh(active_logits / logit_softcap)
    logprobs = active_logits.log_softmax(1)  # [A, V]
    target = F.one_hot(labels[active], logprobs.shape[1]).to(logits.dtype) * (1 - label_smoothing)
    target = target + label_smoothing / logprobs.shape[1]
    loss = torch.where(target == 0, 0, -target * logprobs).sum(1)
    loss = loss + z_loss * active_logits.logsumexp(1).square()
    return logits.new_zeros(labels.shape).index_copy(0, active, loss)


def token_outputs(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log probability [N], entropy [N] and correctness [N] bool; 0 and False at skipped tokens.

    The arguments are those of `cross_entropy`.
    """
    active = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [A]
    active_logits = logits[active, :vocab_size]  # [A, V]
    distribution = torch.distributions.Categorical(logits=active_logits)
    is_correct = active_logits.argmax(1) == labels[active]  # [A]
    correct = torch.zeros_like(labels, dtype=torch.bool).index_copy(0, active, is_correct)
    entropy = logits.new_zeros(labels.shape).index_copy(0, active, distribution.entropy())
    return -cross_entropy(logits, labels, vocab_size), entropy, correct


def sharded_cross_entropy(logits: Tensor, labels: Tensor, num_shards: int) -> Tensor:
    """`cross_entropy` computed from column shards that exchange three numbers per token.

    Args:
        logits: [N, V], V divisible by num_shards.
        labels: [N] integer ids in [0, V), or IGNORE_INDEX.
        num_shards: equal slices of the vocabulary, one per simulated rank.

    Returns:
        [N] loss in nats, 0 at skipped tokens.
    """
    active = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [A]
    targets = F.one_hot(labels[active], logits.shape[1]).bool()
    maxima, sums, target_logits = [], [], []
    shards = logits[active].chunk(num_shards, dim=1)
    for shard, is_target in zip(shards, targets.chunk(num_shards, dim=1), strict=True):
        shard_max = shard.detach().amax(1)
        shift = shard_max.masked_fill(shard_max == -torch.inf, 0.0)
        maxima.append(shard_max)
        sums.append((shard - shift.unsqueeze(1)).exp().sum(1))
        target_logits.append(shard.masked_fill(~is_target, 0.0).sum(1))
    logits_max = torch.stack(maxima).amax(0)  # [A]
    weights = (torch.stack(maxima) - logits_max).exp()  # [num_shards, A]
    sum_exp = (torch.stack(sums) * weights).sum(0)
    loss = sum_exp.log() - (torch.stack(target_logits).sum(0) - logits_max)
    return logits.new_zeros(labels.shape).index_copy(0, active, loss)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int | None = None
) -> Tensor:
    """`cross_entropy` of the logits hidden @ weight.T, those of every token.

    Args:
        hidden: [s, b, h].
        weight: [V_padded, h].
        labels: [b, s] integer ids below vocab_size, or IGNORE_INDEX.
        vocab_size: rows of weight that count. None: all of them.

    Returns:
        [b, s] loss in nats, 0 at skipped tokens.
    """
    logits = (hidden @ weight.t()).transpose(0, 1).flatten(0, 1)  # [b s, V_padded]
    return cross_entropy(logits, labels.flatten(), vocab_size).view(labels.shape)
