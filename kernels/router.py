"""The router of a mixture of experts: fp32 logits, and the experts that each token goes to."""

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def router_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T, not rounded to the dtype of its factors.

    Args:
        hidden: [T, h] floating.
        weight: [E, h] of the same dtype.

    Returns:
        [T, E] in fp32 or wider.
    """
    return cast(Tensor, RouterLogits.apply(hidden, weight))


class RouterLogits(torch.autograd.Function):
    """(hidden, weight) -> logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """[T, E]."""
        ctx.save_for_backward(hidden, weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if hidden.dtype != wide and multiplies_into(hidden.device, hidden.dtype, wide):
            return torch.mm(hidden, weight.t(), out_dtype=wide)
        return torch.mm(hidden.to(wide), weight.to(wide).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [T, h] and [E, h] in the dtype of hidden and weight, from products in it."""
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        grad_hidden = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_hidden, grad.t() @ hidden if ctx.needs_input_grad[1] else None


@functools.cache
def multiplies_into(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a product can be wider than its factors; tried, for not every build of torch can."""
    factor = torch.zeros((16, 16), dtype=dtype, device=device)
    try:
        torch.mm(factor, factor, out_dtype=wide)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def choose_experts(logits: Tensor, num_chosen: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    Args:
        logits: [T, E] fp32 or wider.
        num_chosen: k.
        renormalise: the weights of a token add up to 1; else they are shares of all E.

    Returns:
        weights [T, k] of the logits' dtype, experts [T, k] int64; the likeliest first.
    """
    if renormalise:
        chosen, experts = logits.topk(num_chosen, dim=1)
        return chosen.softmax(1), experts
    probs, experts = logits.softmax(1).topk(num_chosen, dim=1)
    return probs, experts
