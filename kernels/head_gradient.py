"""Gradients of the LM head's input and weight from the gradient of its logits."""

import functools
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sft_fast.kernels.active_tokens import ActiveTokens, start_reduction
from sft_fast.kernels.masked_cross_entropy import VocabShard

log = logging.getLogger(__name__)


class GradientSums:
    """Adds up the gradients of hidden and weight from those of the logits, chunk by chunk.

    The hidden gradient starts on its way to its owners before the last product for the weight, so
    that the exchange and that product run side by side.
    """

    def __init__(
        self,
        active_hidden: Tensor,
        weight: Tensor,
        active: ActiveTokens,
        shard: VocabShard,
        needs_grad: tuple[bool, ...],
        weight_total: Tensor | None,
    ) -> None:
        """Allocates the hidden gradient.

        Args:
            active_hidden: [A, h].
            weight: [V/tp, h].
            active: the A tokens.
            shard: of the vocabulary.
            needs_grad: of (hidden, weight).
            weight_total: [V/tp, h], added to; None: a new product, of a single chunk.
        """
        self.hidden, self.weight = active_hidden, weight
        self.active, self.shard = active, shard
        self.needs_weight = needs_grad[1]
        self.hidden_grad = torch.empty_like(active_hidden) if needs_grad[0] else None
        self.weight_total = weight_total if self.needs_weight else None
        self.reduction: dist.Work | None = None

    def add(self, chunk: slice, grad_logits: Tensor, is_last: bool) -> None:
        """Adds the products of a chunk's grad_logits [C, V/tp]."""
        if self.hidden_grad is not None:
            torch.mm(grad_logits, self.weight, out=self.hidden_grad[chunk])  # [C, h]
            # All chunks at once: their tokens are spread over the same ranks.
            if is_last:
                self.hidden_grad, self.reduction = start_reduction(
                    self.hidden_grad, self.active, self.shard
                )
        if not self.needs_weight:
            return
        if self.weight_total is None:
            self.weight_total = grad_logits.t() @ self.hidden  # [V/tp, h]
        else:
            add_product_(self.weight_total, grad_logits.t(), self.hidden[chunk])

    def finish(self) -> tuple[Tensor | None, ...]:
        """(hidden gradient of the own tokens [own count, h], weight gradient [V/tp, h])"""
        if self.reduction is not None:
            self.reduction.wait()
        return self.hidden_grad, self.weight_total


def weight_gradient(
    weight: Tensor, total: Tensor, accumulate_into_main_grad: bool
) -> Tensor | None:
    """The gradient [V/tp, h] for autograd, or a stand-in if `total` has gone into main_grad."""
    if not accumulate_into_main_grad:
        return total.to(weight.dtype)
    parameter: Any = weight
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    # Megatron's DDP hook wants to see a gradient, and adds it to main_grad if zero_out_wgrad.
    make = torch.zeros if getattr(parameter, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [n, h] += left [n, m] @ right [m, h], where total may be wider than the factors."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif right.device.type == "cpu":
        # In blocks, so that the copies of the factors stay small.
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
            "weight gradients: rounded to %s before they are added to main_grad, because this "
            "build of torch cannot add the product itself: %s",
            dtype,
            error,
        )
        return False
    return True
