"""Vocab-parallel cross-entropy as an autograd function, over any of the backends."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.loss_options import LossOptions


class VocabColumns(NamedTuple):
    """Which columns of the logits count; those after them are padding."""

    vocab_start_index: int
    """global id of column 0"""
    num_columns: int
    vocab_size: int
    """columns that count, over all ranks"""


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the vocabulary, and the ranks that hold the others."""

    columns: VocabColumns
    tp_group: dist.ProcessGroup | None
    tp_rank: int
    tp_size: int


class TokenOutputs(NamedTuple):
    """What is known of each token, 0 or False where it is masked."""

    loss: Tensor
    """fp32: the training loss, with smoothing and z-loss"""
    logprob: Tensor
    """fp32: log p(label), without them; nats"""
    entropy: Tensor
    """fp32, no gradient: entropy of the prediction, nats"""
    correct: Tensor
    """bool: the label is the most likely token (the first such, where several are)"""


class LossKernels(Protocol):
    """What each module masked_cross_entropy_<backend> holds; kernels/README.md has the maths.

    Logits are [N, width] bf16, fp16 or fp32 with last stride 1, labels [N] int64 global ids. What
    is computed is fp32. The torch backend takes any stride, and fp64, which it keeps.
    """

    SKIPS_MASKED_TOKENS: bool
    """Whether labels may be IGNORE_INDEX. The logits of such tokens are not read, their statistics
    not written; losses and gradients are 0. If not, the caller selects the other tokens first."""

    def shard_statistics(
        self,
        logits: Tensor,
        labels: Tensor,
        columns: VocabColumns,
        options: LossOptions,
        with_outputs: bool,
        /,
    ) -> Tensor:
        """What one vocabulary shard contributes to the loss of each token.

        Returns:
            [num_splits, S, N], S = options.num_statistics(with_outputs), each split a part of the
            vocabulary: maximum, sum of exp(logit - maximum), and the logit at the label, 0 where
            another part holds it. With label smoothing also the sum of the logits. With_outputs
            also the sum of exp(logit - maximum) * (logit - maximum) and the global id of the first
            maximum. Where all logits are -inf the maximum may be the lowest finite number.
        """
        ...

    def token_losses(
        self,
        statistics: Tensor,
        labels: Tensor,
        vocab_size: int,
        options: LossOptions,
        with_outputs: bool,
        /,
    ) -> Tensor:
        """Joins the statistics of all parts of the vocabulary, [num_parts, S, N], into losses.

        Returns:
            [1, N]: the loss, NaN where the label has no column. With_outputs [4, N]: also
            log p(label), the entropy, and 1 where the label is the first argmax, else 0.
        """
        ...

    def write_gradient(
        self,
        gradient: Tensor,
        logits: Tensor,
        labels: Tensor,
        statistics: Tensor,
        grads: Tensor,
        columns: VocabColumns,
        options: LossOptions,
        /,
    ) -> None:
        """Writes the gradient of sum(grads[0] * loss + grads[1] * logprob) by the logits.

        gradient [N, width] has the dtype of the logits, and may be the logits; padding columns get
        0. statistics [num_parts, S, N] are those of every part of the vocabulary; grads are [2, N].
        """
        ...


@runtime_checkable
class OnePassKernels(Protocol):
    """What a backend may offer besides, for a vocabulary that is whole."""

    def fits_one_pass(self, logits: Tensor, labels: Tensor, /) -> bool:
        """Whether loss_and_gradient takes these logits [N, width]; if not, use the others."""
        ...

    def loss_and_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        columns: VocabColumns,
        options: LossOptions,
        /,
    ) -> Tensor:
        """Loss [N] fp32 of each token; the gradient of sum(weights * loss) replaces the logits.

        weights [N] fp32. Masked tokens and padding columns get 0.
        """
        ...


# torch 2.13 gave the function a new name and deprecated the old one.
all_gather_equal_sizes = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def global_statistics(
    logits: Tensor,
    labels: Tensor,
    shard: VocabShard,
    options: LossOptions,
    backend: LossKernels,
    with_outputs: bool = False,
) -> Tensor:
    """Statistics of every part of the vocabulary, [num_parts, S, N]: the loss's one collective."""
    own = backend.shard_statistics(logits, labels, shard.columns, options, with_outputs)
    if shard.tp_size == 1:
        return own
    gathered = own.new_empty((shard.tp_size * len(own), *own.shape[1:]))  # [tp * splits, S, N]
    all_gather_equal_sizes(gathered, own, group=shard.tp_group)
    return gathered


def split_outputs(outputs: Tensor) -> tuple[Tensor, ...]:
    """Takes the result of token_losses apart: the loss [N], or of [4, N] TokenOutputs' fields."""
    if len(outputs) == 1:
        return (outputs[0],)
    loss, logprob, entropy, correct = outputs
    return loss, logprob, entropy, correct != 0


def stack_grads(
    grad_loss: Tensor | None, grad_logprob: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[2, N]: upstream gradients [N], one of which may be missing, which means 0."""
    if grad_loss is None:
        assert grad_logprob is not None
        grad_loss = torch.zeros_like(grad_logprob)
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(grad_loss)
    return torch.stack([grad_loss, grad_logprob]).to(dtype)


class MaskedCrossEntropy(torch.autograd.Function):
    """Loss of logits that belong to somebody else: [N, V/tp] -> [N]; the gradient is a new tensor.

    A backend that cannot leave masked tokens alone gets a copy of the active ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        options: LossOptions,
        backend: LossKernels,
    ) -> Tensor:
        """Logits [N, V/tp], labels [N] -> loss [N] fp32 or wider, 0 at masked tokens."""
        ctx.shard, ctx.options, ctx.backend = shard, options, backend
        active, active_logits, active_labels = None, logits, labels
        if not backend.SKIPS_MASKED_TOKENS:
            active = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [A]
            active_logits = logits.index_select(0, active)  # [A, V/tp]
            active_labels = labels.index_select(0, active)  # [A]
        statistics = global_statistics(active_logits, active_labels, shard, options, backend)
        ctx.save_for_backward(logits, active_labels, active, statistics)
        vocab_size = shard.columns.vocab_size
        (loss,) = backend.token_losses(statistics, active_labels, vocab_size, options, False)
        # A copy: a view of the statistics' result may not leave an autograd function.
        return loss.clone() if active is None else scatter_tokens(loss, active, len(labels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Upstream gradient [N] -> gradient of the logits [N, V/tp], 0 at masked tokens."""
        logits, labels, active, statistics = ctx.saved_tensors
        grads = stack_grads(grad_loss, None, statistics.dtype)  # [2, N]
        columns = ctx.shard.columns
        if active is None:
            gradient = torch.empty_like(logits)
            ctx.backend.write_gradient(
                gradient, logits, labels, statistics, grads, columns, ctx.options
            )
            return gradient, None, None, None, None
        active_logits = logits.index_select(0, active)  # [A, V/tp]
        grads = grads.index_select(1, active)  # [2, A]
        ctx.backend.write_gradient(
            active_logits, active_logits, labels, statistics, grads, columns, ctx.options
        )
        gradient = torch.zeros_like(logits).index_copy_(0, active, active_logits)
        return gradient, None, None, None, None


def scatter_tokens(values: Tensor, active: Tensor, num_tokens: int) -> Tensor:
    """[num_tokens, ...]: values [A, ...] where the active tokens [A] are, and zeros elsewhere."""
    return values.new_zeros((num_tokens, *values.shape[1:])).index_copy_(0, active, values)
