"""Vocab-parallel cross-entropy as an autograd function, over any of the backends."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.constants import IGNORE_INDEX


class Backend(Protocol):
    """A module of kernels/; masked_cross_entropy_torch.py says what the functions do."""

    SKIPS_MASKED_ROWS: bool

    def shard_statistics(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_start_index: int,
        num_columns: int,
        softcap: float,
        with_logit_sum: bool,
        with_outputs: bool,
        /,
    ) -> Tensor:
        """fp32 [parts, S, N]: what this rank's columns say of the softmax."""

    def row_losses(
        self,
        statistics: Tensor,
        labels: Tensor,
        vocab_size: int,
        label_smoothing: float,
        z_loss: float,
        with_outputs: bool,
        /,
    ) -> Tensor:
        """fp32 [1 or 4, N] of the statistics of all ranks."""

    def write_gradient(
        self,
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
        /,
    ) -> None:
        """Writes the gradient of the logits [N, columns], maybe over them."""


@runtime_checkable
class OnePassBackend(Protocol):
    """What a backend may offer besides, for a whole vocabulary; see masked_cross_entropy_native."""

    def fits_one_pass(self, logits: Tensor, labels: Tensor, /) -> bool: ...

    def loss_and_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        num_columns: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        /,
    ) -> Tensor:
        """fp32 [N] losses; the logits [N, V] become their gradient."""


@dataclass(frozen=True)
class LossOptions:
    """What the loss of a token is, beyond -log p(label). All rates of 0 turn their term off.

    Raises:
        ValueError: a rate outside its range.
    """

    label_smoothing: float = 0.0
    """in [0, 1): share of the target spread evenly over the whole vocabulary"""
    z_loss: float = 0.0
    """>= 0: times log(sum(exp(logits)))**2, added to the loss"""
    logit_softcap: float = 0.0
    """> 0: logits become softcap * tanh(logits / softcap) before anything else; 0: they do not"""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: got {self.label_smoothing}, expected 0 <= it < 1")
        for name in ("z_loss", "logit_softcap"):
            rate = getattr(self, name)
            if not 0 <= rate < math.inf:
                raise ValueError(f"{name}: got {rate}, expected a finite number, 0 or more")


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


# torch 2.13 gave the function a new name and deprecated the old one.
all_gather_equal_sizes = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def global_statistics(
    logits: Tensor,
    labels: Tensor,
    shard: VocabShard,
    kernels: Backend,
    options: LossOptions,
    with_outputs: bool,
) -> Tensor:
    """Statistics of every part of the vocabulary, [num_parts, S, N]: the loss's one collective."""
    own = kernels.shard_statistics(
        logits,
        labels,
        shard.vocab_start_index,
        shard.num_columns,
        options.logit_softcap,
        options.label_smoothing > 0,
        with_outputs,
    )
    if shard.tp_size == 1:
        return own
    gathered = own.new_empty((shard.tp_size * len(own), *own.shape[1:]))
    all_gather_equal_sizes(gathered, own, group=shard.tp_group)
    return gathered


def write_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    shard: VocabShard,
    kernels: Backend,
    options: LossOptions,
) -> None:
    """Calls the backend; grads [2, N] are those of loss and logprob."""
    kernels.write_gradient(
        gradient,
        logits,
        labels,
        statistics,
        grads,
        shard.vocab_start_index,
        shard.num_columns,
        shard.vocab_size,
        options.label_smoothing,
        options.z_loss,
        options.logit_softcap,
    )


def row_outputs(
    statistics: Tensor,
    labels: Tensor,
    shard: VocabShard,
    kernels: Backend,
    options: LossOptions,
    with_outputs: bool,
) -> tuple[Tensor, ...]:
    """Calls the backend: loss of each row, and with_outputs all fields of TokenOutputs."""
    rates = options.label_smoothing, options.z_loss
    rows = kernels.row_losses(statistics, labels, shard.vocab_size, *rates, with_outputs)
    if not with_outputs:
        return (rows[0],)
    loss, logprob, entropy, correct = rows
    return loss, logprob, entropy, correct != 0


def stack_grads(
    grad_loss: Tensor | None, grad_logprob: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[2, N]: upstream gradients, one of which may be missing, which means 0."""
    if grad_loss is None:
        assert grad_logprob is not None
        grad_loss = torch.zeros_like(grad_logprob)
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(grad_loss)
    return torch.stack([grad_loss, grad_logprob]).to(dtype)


class MaskedCrossEntropy(torch.autograd.Function):
    """Loss of logits that belong to somebody else: [N, V/tp] -> [N]; the gradient is a new tensor.

    With outputs: the fields of TokenOutputs, of which loss and logprob have a gradient. A backend
    that cannot leave masked rows alone gets a copy of the active ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        kernels: Backend,
        options: LossOptions,
        with_outputs: bool,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.kernels, ctx.options = shard, kernels, options
        rows, rows_logits, rows_labels = None, logits, labels
        if not kernels.SKIPS_MASKED_ROWS:
            rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            rows_logits, rows_labels = logits.index_select(0, rows), labels.index_select(0, rows)
        how = shard, kernels, options
        statistics = global_statistics(rows_logits, rows_labels, *how, with_outputs)
        ctx.save_for_backward(logits, rows_labels, rows, statistics)
        outputs = row_outputs(statistics, rows_labels, *how, with_outputs)
        if rows is None:
            # Copied, because they are views of one tensor.
            outputs = tuple(output.clone() for output in outputs)
        else:
            outputs = tuple(scatter_rows(output, rows, len(labels)) for output in outputs)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_logprob: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        logits, labels, rows, statistics = ctx.saved_tensors
        if grad_loss is None and grad_logprob is None:
            return None, None, None, None, None, None
        how = ctx.shard, ctx.kernels, ctx.options
        grads = stack_grads(grad_loss, grad_logprob, statistics.dtype)
        if rows is None:
            gradient = torch.empty_like(logits)
            write_gradient(gradient, logits, labels, statistics, grads, *how)
            return gradient, None, None, None, None, None
        active = logits.index_select(0, rows)
        write_gradient(active, active, labels, statistics, grads.index_select(1, rows), *how)
        gradient = torch.zeros_like(logits).index_copy_(0, rows, active)
        return gradient, None, None, None, None, None


def scatter_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Puts one value per active row where it belongs, and zeros elsewhere."""
    return values.new_zeros(num_rows).index_copy_(0, rows, values)
