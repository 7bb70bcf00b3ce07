"""The router of a mixture of experts: fp32 logits, and the experts that each token goes to."""

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.routing import Routing

TINY = 1e-20
"""Added to sums of scores that are divisors."""


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


def choose_experts(
    logits: Tensor, routing: Routing, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    Args:
        logits: [T, E] fp32 or wider.
        routing: how they are chosen.
        bias: [E] fp32, added to the scores for the choice; None = 0.

    Returns:
        weights [T, k] of the logits' dtype, experts [T, k] int64.
    """
    if routing.scores == "softmax" and bias is None and routing.num_groups == 1:
        weights, experts = choose_likeliest(logits, routing)
    else:
        scores = logits.sigmoid() if routing.scores == "sigmoid" else logits.softmax(1)
        with torch.no_grad():
            wanted = scores if bias is None else scores + bias
            experts = within_groups(wanted, routing).topk(routing.num_chosen, dim=1).indices
        weights = scores.gather(1, experts)
        if routing.renormalise:
            weights = weights / (weights.sum(1, keepdim=True) + TINY)
    return (weights if routing.scale == 1.0 else weights * routing.scale), experts


def choose_likeliest(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Of a softmax: weights and experts [T, k] of logits [T, E], the likeliest first."""
    if routing.renormalise:
        chosen, experts = logits.topk(routing.num_chosen, dim=1)
        return chosen.softmax(1), experts
    probs, experts = logits.softmax(1).topk(routing.num_chosen, dim=1)
    return probs, experts


def within_groups(scores: Tensor, routing: Routing) -> Tensor:
    """[T, E]: the scores, -inf outside the groups that a token's experts come from."""
    if routing.groups_chosen == routing.num_groups:
        return scores
    grouped = scores.unflatten(1, (routing.num_groups, -1))
    best = grouped.topk(routing.scores_of_group, dim=2).values.sum(2)  # [T, groups]
    groups = best.topk(routing.groups_chosen, dim=1).indices
    is_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, groups, False)
    return grouped.masked_fill(is_out.unsqueeze(2), -torch.inf).flatten(1)


def probabilities(logits: Tensor, routing: Routing) -> Tensor:
    """[T, E]: the share of each expert in the scores of a token, of logits [T, E]."""
    if routing.scores == "softmax":
        return logits.softmax(1)
    scores = logits.sigmoid()
    return scores / (scores.sum(1, keepdim=True) + TINY)
