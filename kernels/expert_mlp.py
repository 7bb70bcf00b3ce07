"""A layer of gated experts: copies of tokens, two grouped products, and the sum of the copies.

The weight of the router multiplies the activation of an expert, not its output. The sum is the
same, but the gradient of the weight needs the activation only, so no output is kept. Kept for the
backward pass are the input, which the norm before it keeps as well, and the first product; copies
of tokens and activations are made again.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.expert_copies import CopyOrder, copy_kernels
from sft_fast.kernels.grouped_matmul import multiply_groups, weight_gradient

Activation: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(gates and their partners [R, 2 f], factors of the rows [R] fp32) -> [R, f]."""


def expert_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    probs: Tensor,
    order: CopyOrder,
    activate: Activation,
) -> Tensor:
    """The weighted sum of each token's experts, differentiable in all tensors but the order's.

    Gradients of the matrices are added to their `main_grad` where there is one.

    Args:
        hidden: [T, h] floating.
        gate_up: [E, 2 f, h] of the same dtype, an expert's gate and then its up projection.
        down: [E, h, f].
        probs: [T, k] fp32 weights of the router.
        order: of the tokens' experts.
        activate: differentiable in both arguments.

    Returns:
        [T, h] of hidden's dtype.
    """
    order_tensors = order.offsets, order.copy_numbers, order.tokens, order.places
    arguments = hidden, gate_up, down, probs, activate, *order_tensors
    return cast(Tensor, ExpertMLP.apply(*arguments))


class ExpertMLP(torch.autograd.Function):
    """`expert_mlp` with the order's tensors one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        gate_up: Tensor,
        down: Tensor,
        probs: Tensor,
        activate: Activation,
        offsets: Tensor,
        copy_numbers: Tensor,
        tokens: Tensor,
        places: Tensor,
    ) -> Tensor:
        """[T, h]; keeps the first product."""
        copies = copy_kernels(hidden).scatter_copies(hidden, places)
        inner = multiply_groups(copies, gate_up.transpose(1, 2), offsets)
        del copies
        factors = probs.flatten().index_select(0, copy_numbers)
        ctx.activate = activate
        ctx.save_for_backward(hidden, gate_up, down, factors, offsets, tokens, places, inner)
        activation = activate(inner, factors)
        outputs = multiply_groups(activation, down.transpose(1, 2), offsets)
        return copy_kernels(hidden).sum_copies(outputs, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [T, h], gate_up, down and probs [T, k]."""
        hidden, gate_up, down, factors, offsets, tokens, places, inner = ctx.saved_tensors
        needs_hidden, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        grad_hidden = grad_gate_up = grad_down = None
        with torch.enable_grad():
            leaves = inner.detach().requires_grad_(), factors.detach().requires_grad_()
            activation = ctx.activate(*leaves)
        copies = copy_kernels(hidden).scatter_copies(grad, places)
        upstream = multiply_groups(copies, down, offsets)
        grad_inner, grad_factors = torch.autograd.grad(activation, leaves, upstream)
        del upstream
        if needs_down:
            grad_down = weight_gradient(down, copies, activation.detach(), offsets)
        del copies, activation
        if needs_gate_up:
            grad_gate_up = weight_gradient(gate_up, grad_inner, hidden, offsets, tokens)
        if needs_hidden:
            copies = multiply_groups(grad_inner, gate_up, offsets)
            grad_hidden = copy_kernels(hidden).sum_copies(copies, places)
        grad_probs = grad_factors.index_select(0, places.flatten()).view_as(places)
        return grad_hidden, grad_gate_up, grad_down, grad_probs, None, None, None, None, None
