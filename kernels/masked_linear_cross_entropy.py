"""LM head and cross-entropy of the active tokens only, as one autograd function.

Order of events. Forward: select own active tokens, gather them over the sequence-parallel ranks,
multiply by the head, shard statistics, one all-gather of them, loss. Backward: the logits become
their gradient in place, the hidden gradient starts on its way to its owners while the weight
gradient is computed, and is scattered into zeros.

The logits are kept for the backward pass if they fit a budget. If not, the tokens are taken in
chunks, and the gradients are either computed in the forward pass, or from logits that the backward
pass computes again.

Source: a vocabulary in shards, Shoeybi et al. 2019 (arXiv 1909.08053); gradients in the forward
pass, chunk by chunk, Hsu et al. 2024 (arXiv 2410.10989).

Shapes: s sequence, b batch, n = s b tokens, A of them active, C a chunk of those, h hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.active_tokens import ActiveTokens, all_gather_tokens
from sft_fast.kernels.head_gradient import GradientSums, weight_gradient
from sft_fast.kernels.loss_options import LossOptions
from sft_fast.kernels.masked_cross_entropy import (
    LossKernels,
    OnePassKernels,
    VocabShard,
    global_statistics,
    scatter_tokens,
    split_outputs,
    stack_grads,
)
from sft_fast.kernels.memory_plan import MemoryPlan


@dataclass(frozen=True)
class HeadLossArgs:
    """All that the loss of one call depends on, besides its tensors."""

    active: ActiveTokens
    shard: VocabShard
    options: LossOptions
    backend: LossKernels
    plan: MemoryPlan
    accumulate_into_main_grad: bool
    with_outputs: bool


class MaskedLinearCrossEntropy(torch.autograd.Function):
    """Loss [n] of hidden states, weight and labels, 0 at masked tokens.

    With outputs: the fields of TokenOutputs, of which loss and logprob have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        head: HeadLossArgs,
    ) -> tuple[Tensor, ...]:
        """Computes the loss, and under `gradient_in_forward` the gradients of its sum.

        Args:
            ctx: of autograd.
            hidden: [s, b, h], or [s/tp, b, h] where the sequence is in parts, or
                [max(A, 1), 1, h] of the active tokens alone.
            weight: [V/tp, h].
            labels: [n] int64, in the order of the sequence.
            token_weights: [n], multiplies the losses; None: 1.
            head: everything else.

        Returns:
            The loss [n], or all fields of TokenOutputs, [n] each.
        """
        ctx.set_materialize_grads(False)
        ctx.head, ctx.hidden_shape = head, hidden.shape
        active, shard, plan = head.active, head.shard, head.plan
        active_hidden = own_tokens(hidden, active)  # [own count, h]
        if len(active.counts) > 1:
            active_hidden = all_gather_tokens(active_hidden, active, shard)  # [A, h]
        active_labels = labels.index_select(0, active.indices)  # [A]
        weights = None
        if token_weights is not None:
            weights = token_weights.index_select(0, active.indices)  # [A]
        chunks = plan.chunks(len(active_labels))
        sums, kept = None, []
        buffer = logits_buffer(active_hidden, weight, plan)  # [C, V/tp]
        parts: list[tuple[Tensor, ...]] = []
        if plan.policy == "gradient_in_forward":
            # main_grad is for the backward pass, which alone knows the scale of the loss.
            total = wide_zeros(weight, ctx)
            sums = GradientSums(active_hidden, weight, active, shard, ctx.needs_input_grad, total)
        for chunk in chunks:
            logits = project(active_hidden[chunk], weight, buffer)  # [C, V/tp]
            if sums is not None:
                chunk_weights = chunk_of(weights, chunk)
                loss = loss_and_gradient(logits, active_labels[chunk], chunk_weights, head)
                parts.append((loss,))
                sums.add(chunk, logits, is_last=chunk is chunks[-1])
                continue
            statistics, chunk_results = chunk_outputs(logits, active_labels[chunk], head)
            kept.append(statistics)
            parts.append(chunk_results)
        outputs = [torch.cat(columns) for columns in zip(*parts, strict=True)]  # [A] each
        # No saved tensor: autograd would refuse what the backward pass overwrites.
        ctx.logits = buffer[: len(active_labels)] if plan.policy == "stored" else None
        saved = (active_hidden, active_labels) if sums is None else sums.finish()
        ctx.save_for_backward(weight, weights, *saved, *kept)
        if weights is not None:
            outputs[0] = outputs[0] * weights
        full = tuple(scatter_tokens(output, active.indices, len(labels)) for output in outputs)
        ctx.mark_non_differentiable(*full[2:])
        return full

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_logprob: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Upstream gradients [n] -> gradients of hidden and of weight, in their shapes."""
        if grad_loss is None and grad_logprob is None:
            return None, None, None, None, None
        if ctx.head.plan.policy == "gradient_in_forward":
            assert grad_loss is not None
            grads = backward_from_saved_gradients(ctx, grad_loss)
        else:
            grads = backward_from_logits(ctx, grad_loss, grad_logprob)
        return *grads, None, None, None


def backward_from_logits(
    ctx: Any, grad_loss: Tensor | None, grad_logprob: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Backward pass from the stored logits, or from logits computed again chunk by chunk.

    Upstream gradients [n] -> gradients of hidden and of weight, in their shapes.
    """
    # [V/tp, h], [A], [A, h], [A], and of each chunk [num_parts, S, C]
    weight, weights, active_hidden, labels, *kept = ctx.saved_tensors
    head: HeadLossArgs = ctx.head
    active, shard = head.active, head.shard
    # The gradient overwrites the logits: a second backward has to compute them again.
    stored, ctx.logits = ctx.logits, None
    grads = stack_grads(grad_loss, grad_logprob, kept[0].dtype)  # [2, n]
    grads = grads.index_select(1, active.indices)  # [2, A]
    if weights is not None:
        grads[0] *= weights
    chunks = head.plan.chunks(len(labels))
    total = None
    if head.accumulate_into_main_grad and ctx.needs_input_grad[1]:
        total = weight.main_grad  # [V/tp, h]
    elif len(chunks) > 1:
        total = wide_zeros(weight, ctx)
    sums = GradientSums(active_hidden, weight, active, shard, ctx.needs_input_grad, total)
    buffer = logits_buffer(active_hidden, weight, head.plan) if stored is None else stored
    for chunk, statistics in zip(chunks, kept, strict=True):
        # [C, V/tp]; stored logits are one chunk.
        logits = project(active_hidden[chunk], weight, buffer) if stored is None else stored
        arguments = logits, logits, labels[chunk], statistics, grads[:, chunk]
        head.backend.write_gradient(*arguments, shard.columns, head.options)
        sums.add(chunk, logits, is_last=chunk is chunks[-1])
    own_grad, weight_total = sums.finish()  # [own count, h], [V/tp, h]
    grad_weight = None
    if weight_total is not None:
        grad_weight = weight_gradient(weight, weight_total, head.accumulate_into_main_grad)
    return scatter_hidden(own_grad, ctx), grad_weight


def backward_from_saved_gradients(
    ctx: Any, grad_loss: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Backward pass where the forward pass left the gradients of sum(token_weights * loss).

    Upstream gradient [n] -> gradients of hidden and of weight, in their shapes.
    """
    weight, _, own_grad, weight_total = (
        ctx.saved_tensors
    )  # [V/tp, h], [A], [own count, h], [V/tp, h]
    head: HeadLossArgs = ctx.head
    scale = common_value(grad_loss.index_select(0, head.active.indices))  # 0-d
    if own_grad is not None:
        own_grad = (own_grad * scale).to(own_grad.dtype)
    grad_weight = None
    if weight_total is not None and head.accumulate_into_main_grad:
        weight.main_grad.addcmul_(weight_total, scale)
        grad_weight = weight_gradient(weight, weight.main_grad, True)
    elif weight_total is not None:
        # Rounded as it is written: a product in fp32 would be one more tensor of this size.
        grad_weight = torch.mul(weight_total, scale, out=torch.empty_like(weight))
    return scatter_hidden(own_grad, ctx), grad_weight


def common_value(grads: Tensor) -> Tensor:
    """The one value of grads [A], 0-d; NaN where they differ, so that it is not missed.

    Raises:
        ValueError: they differ, on a CPU: a GPU would make the host wait to learn it.
    """
    if len(grads) == 0:
        return grads.new_zeros(())
    is_common = (grads == grads[0]).all()
    if grads.device.type == "cpu" and not is_common and not grads.isnan().any():
        raise ValueError(
            "masked_linear_cross_entropy: summed=True, but the losses of the tokens have different "
            "upstream gradients; give per-token factors as token_weights, or use summed=False"
        )
    return torch.where(is_common, grads[0], torch.nan)


def chunk_outputs(
    logits: Tensor, labels: Tensor, head: HeadLossArgs
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Statistics [num_parts, S, C] of logits [C, V/tp], and the loss, or all TokenOutputs, [C]."""
    statistics = global_statistics(
        logits, labels, head.shard, head.options, head.backend, head.with_outputs
    )
    vocab_size = head.shard.columns.vocab_size
    outputs = head.backend.token_losses(
        statistics, labels, vocab_size, head.options, head.with_outputs
    )
    return statistics, split_outputs(outputs)


def loss_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor | None, head: HeadLossArgs
) -> Tensor:
    """Loss [C] of logits [C, V/tp], which become the gradient of its sum, weighted by [C]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if weights is None:
        weights = logits.new_ones(len(logits), dtype=dtype)  # [C]
    columns, options, backend = head.shard.columns, head.options, head.backend
    is_whole = head.shard.tp_size == 1
    if is_whole and isinstance(backend, OnePassKernels) and backend.fits_one_pass(logits, labels):
        return backend.loss_and_gradient(logits, labels, weights, columns, options)
    statistics = global_statistics(logits, labels, head.shard, options, backend)
    grads = stack_grads(weights, None, statistics.dtype)  # [2, C]
    backend.write_gradient(logits, logits, labels, statistics, grads, columns, options)
    return backend.token_losses(statistics, labels, columns.vocab_size, options, False)[0]


def logits_buffer(hidden: Tensor, weight: Tensor, plan: MemoryPlan) -> Tensor:
    """[chunk_tokens, V/tp]: all chunks use it, for two at a time would be twice the budget."""
    return hidden.new_empty((plan.chunk_tokens, len(weight)))


def project(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """hidden [C, h] @ weight.T in the first C of buffer [chunk_tokens, V/tp]."""
    return torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])


def wide_zeros(weight: Tensor, ctx: Any) -> Tensor | None:
    """[V/tp, h] for the weight gradient of several chunks: fp32 or wider; None if not needed."""
    if not ctx.needs_input_grad[1]:
        return None
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def chunk_of(values: Tensor | None, chunk: slice) -> Tensor | None:
    """A chunk [C] of values [A]."""
    return None if values is None else values[chunk]


def own_tokens(hidden: Tensor, active: ActiveTokens) -> Tensor:
    """[own count, h]: the active tokens of this rank's part of the hidden states."""
    tokens = hidden.flatten(0, 1)
    if active.own_indices is None:
        return tokens[: len(active.indices)]
    return tokens.index_select(0, active.own_indices)


def scatter_hidden(own_grad: Tensor | None, ctx: Any) -> Tensor | None:
    """[own count, h] -> the shape of hidden, zeros at masked tokens."""
    if own_grad is None:
        return None
    own_indices = ctx.head.active.own_indices
    if own_indices is None:
        # Without active tokens hidden has one row, which nobody read.
        is_read = len(own_grad) > 0
        return own_grad.view(ctx.hidden_shape) if is_read else own_grad.new_zeros(ctx.hidden_shape)
    num_tokens = math.prod(ctx.hidden_shape[:-1])  # s b or s b / tp
    return scatter_tokens(own_grad, own_indices, num_tokens).view(ctx.hidden_shape)
