"""LM head and cross-entropy of the active rows only, as one autograd function.

Order of events. Forward: select own active rows, gather them over the sequence-parallel ranks,
multiply by the head, shard statistics, one all-gather of them, loss. Backward: the logits become
their gradient in place, the hidden gradient starts on its way to its owners while the weight
gradient is computed, its rows are scattered into zeros.

The logits are kept for the backward pass if they fit a budget. If not, the rows are taken in
chunks, and the gradients are either computed in the forward pass, or from logits that the backward
pass computes again.
"""

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.active_tokens import ActiveTokens, all_gather_rows
from sft_fast.kernels.head_gradient import GradientSums, weight_gradient
from sft_fast.kernels.masked_cross_entropy import (
    Backend,
    LossOptions,
    OnePassBackend,
    VocabShard,
    global_statistics,
    row_outputs,
    scatter_rows,
    stack_grads,
    write_gradient,
)
from sft_fast.kernels.memory_plan import MemoryPlan


@dataclass(frozen=True)
class HeadLossArgs:
    """All that the loss of one call depends on, besides its tensors."""

    rows: ActiveTokens
    shard: VocabShard
    kernels: Backend
    options: LossOptions
    plan: MemoryPlan
    accumulate_into_main_grad: bool
    with_outputs: bool


class MaskedLinearCrossEntropy(torch.autograd.Function):
    """hidden [s or s/tp, b, h], weight [V/tp, h], row_labels [n] -> loss [n], 0 at masked rows.

    row_weights [n] multiplies the losses and may be None. With outputs: the fields of TokenOutputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        row_labels: Tensor,
        row_weights: Tensor | None,
        head: HeadLossArgs,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.hidden_shape = head, hidden.shape
        rows, shard, options = head.rows, head.shard, head.options
        active_hidden = hidden.flatten(0, 1).index_select(0, rows.own_rows)
        if len(rows.counts) > 1:
            active_hidden = all_gather_rows(active_hidden, rows, shard)
        labels = row_labels.index_select(0, rows.rows)
        weights = None if row_weights is None else row_weights.index_select(0, rows.rows)
        chunks = head.plan.chunks(len(labels))
        how = shard, head.kernels, options
        sums, kept = None, []
        buffer = logits_buffer(active_hidden, weight, head.plan)
        parts: list[tuple[Tensor, ...]] = []
        if head.plan.policy == "gradient_in_forward":
            # main_grad is for the backward pass, which alone knows the scale of the loss.
            total = wide_zeros(weight, ctx)
            sums = GradientSums(active_hidden, weight, rows, shard, ctx.needs_input_grad, total)
        for chunk in chunks:
            logits = project(active_hidden[chunk], weight, buffer)
            if sums is not None:
                loss = loss_and_gradient(logits, labels[chunk], chunk_of(weights, chunk), *how)
                parts.append((loss,))
                sums.add(chunk, logits, is_last=chunk is chunks[-1])
                continue
            kept.append(global_statistics(logits, labels[chunk], *how, head.with_outputs))
            parts.append(row_outputs(kept[-1], labels[chunk], *how, head.with_outputs))
        outputs = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        ctx.logits = buffer[: len(labels)] if head.plan.policy == "stored" else None
        saved = (active_hidden, labels) if sums is None else sums.finish()
        ctx.save_for_backward(weight, weights, *saved, *kept)
        if weights is not None:
            outputs[0] = outputs[0] * weights
        full = tuple(scatter_rows(output, rows.rows, len(row_labels)) for output in outputs)
        ctx.mark_non_differentiable(*full[2:])
        return full

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_logprob: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
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
    """Backward pass from the stored logits, or from logits computed again chunk by chunk."""
    weight, weights, active_hidden, labels, *kept = ctx.saved_tensors
    head: HeadLossArgs = ctx.head
    # The gradient overwrites the logits: a second backward has to compute them again.
    stored, ctx.logits = ctx.logits, None
    grads = stack_grads(grad_loss, grad_logprob, kept[0].dtype).index_select(1, head.rows.rows)
    if weights is not None:
        grads[0] *= weights
    chunks = head.plan.chunks(len(labels))
    total = None
    if head.accumulate_into_main_grad and ctx.needs_input_grad[1]:
        total = weight.main_grad
    elif len(chunks) > 1:
        total = wide_zeros(weight, ctx)
    sums = GradientSums(active_hidden, weight, head.rows, head.shard, ctx.needs_input_grad, total)
    buffer = logits_buffer(active_hidden, weight, head.plan) if stored is None else stored
    for chunk, statistics in zip(chunks, kept, strict=True):
        logits = project(active_hidden[chunk], weight, buffer) if stored is None else stored
        arguments = logits, logits, labels[chunk], statistics, grads[:, chunk]
        write_gradient(*arguments, head.shard, head.kernels, head.options)
        sums.add(chunk, logits, is_last=chunk is chunks[-1])
    own_grad, weight_total = sums.finish()
    grad_weight = None
    if weight_total is not None:
        grad_weight = weight_gradient(weight, weight_total, head.accumulate_into_main_grad)
    return scatter_hidden(own_grad, ctx), grad_weight


def backward_from_saved_gradients(
    ctx: Any, grad_loss: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Backward pass where the forward pass left the gradients of sum(row_weights * loss)."""
    weight, _, own_grad, weight_total = ctx.saved_tensors
    head: HeadLossArgs = ctx.head
    scale = common_value(grad_loss.index_select(0, head.rows.rows))
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
    """The one value that all rows share, 0-d; NaN where they differ, so that it is not missed.

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


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    shard: VocabShard,
    kernels: Backend,
    options: LossOptions,
) -> Tensor:
    """Loss of each row [N]; the logits become the gradient of its sum, weighted."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if weights is None:
        weights = logits.new_ones(len(logits), dtype=dtype)
    is_whole = shard.tp_size == 1
    if is_whole and isinstance(kernels, OnePassBackend) and kernels.fits_one_pass(logits, labels):
        arguments = logits, labels, weights, shard.num_columns
        return kernels.loss_and_gradient(*arguments, *astuple(options))
    statistics = global_statistics(logits, labels, shard, kernels, options, False)
    grads = stack_grads(weights, None, statistics.dtype)
    write_gradient(logits, logits, labels, statistics, grads, shard, kernels, options)
    return row_outputs(statistics, labels, shard, kernels, options, False)[0]


def logits_buffer(hidden: Tensor, weight: Tensor, plan: MemoryPlan) -> Tensor:
    """[chunk_rows, V/tp]: all chunks use it, for two at a time would be twice the budget."""
    return hidden.new_empty((plan.chunk_rows, len(weight)))


def project(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """hidden @ weight.T in the first rows of buffer."""
    return torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])


def wide_zeros(weight: Tensor, ctx: Any) -> Tensor | None:
    """Where the weight gradient of several chunks is summed: fp32 or wider; None if not needed."""
    if not ctx.needs_input_grad[1]:
        return None
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def chunk_of(values: Tensor | None, chunk: slice) -> Tensor | None:
    return None if values is None else values[chunk]


def scatter_hidden(own_grad: Tensor | None, ctx: Any) -> Tensor | None:
    """[own count, h] -> the shape of hidden, zeros at masked rows."""
    if own_grad is None:
        return None
    grad_hidden = own_grad.new_zeros(ctx.hidden_shape)
    grad_hidden.view(-1, ctx.hidden_shape[-1]).index_copy_(0, ctx.head.rows.own_rows, own_grad)
    return grad_hidden
