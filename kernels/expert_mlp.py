"""A layer of gated experts: copies of tokens, two grouped products, and the sum of the copies.

The weight of the router multiplies the activation of an expert, not its output. The sum is the
same, but the gradient of the weight needs the activation only, so no output is kept. Kept for the
backward pass are the input, which the norm before it keeps as well, the first product, and with
adapters the low-rank ones, [R, n r] and [R, r]; copies of tokens and activations are made again.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.expert_adapters import (
    GroupedAdapters,
    adapted_groups,
    add_low_rank,
    low_rank_gradients,
)
from sft_fast.kernels.expert_copies import CopyOrder, copies_of, copy_kernels, sums_of
from sft_fast.kernels.grouped_matmul import (
    add_products,
    grouped_matmul,
    multiply_groups,
    weight_gradient,
)

Activation: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(gates and their partners [R, 2 f], factors of the rows [R] fp32) -> [R, f]."""


def expert_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    probs: Tensor,
    order: CopyOrder,
    activate: Activation,
    wide: GroupedAdapters | None = None,
    narrow: GroupedAdapters | None = None,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, each matrix W + scale * B A where it has adapters.

    Differentiable in all tensors but the order's. Gradients of the matrices are added to their
    `main_grad` where there is one.

    Args:
        hidden: [T, h] floating.
        gate_up: [E, 2 f, h] of the same dtype, an expert's gate and then its up projection.
        down: [E, h, f].
        probs: [T, k] fp32 weights of the router.
        order: of the tokens' experts.
        activate: differentiable in both arguments.
        wide: the adapters of gate_up; None = none.
        narrow: the adapters of down; None = none.
        biases: [E, 2 f] of the first product and [E, h] of the second; None = none.

    Returns:
        [T, h] of hidden's dtype.
    """
    pairs: list[Tensor | None] = []
    scales = []
    for adapters in (wide, narrow):
        pairs += (None, None) if adapters is None else (adapters.every_a, adapters.b)
        scales.append(0.0 if adapters is None else adapters.scale)
    order_tensors = order.offsets, order.copy_numbers, order.tokens, order.places
    own_biases = (None, None) if biases is None else biases
    arguments = hidden, gate_up, down, probs, activate, tuple(scales), *pairs, *own_biases
    return cast(Tensor, ExpertMLP.apply(*arguments, *order_tensors))


def expert_mlp_with_dropout(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    probs: Tensor,
    order: CopyOrder,
    activate: Activation,
    wide: GroupedAdapters | None,
    narrow: GroupedAdapters | None,
    drops: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `expert_mlp`, with dropout before each A; copies and activations are kept.

    Args:
        hidden: [T, h].
        gate_up: [E, 2 f, h].
        down: [E, h, f].
        probs: [T, k] fp32.
        order: of the tokens' experts.
        activate: differentiable in both arguments.
        wide: the adapters of gate_up.
        narrow: the adapters of down.
        drops: dropout of the inputs of gate and up [R, h], and of down [R, f].
        biases: [E, 2 f] and [E, h]; None = none.

    Returns:
        [T, h].
    """
    copies = copies_of(hidden, order)
    inner = adapted_groups(copies, gate_up, wide, order.offsets, drops[0])
    factors = probs.flatten().index_select(0, order.copy_numbers)
    if biases is not None:
        ones = torch.ones_like(factors, dtype=hidden.dtype)
        inner = inner + grouped_matmul(ones[:, None], biases[0].unsqueeze(2), order.offsets)
    activation = activate(inner, factors)
    outputs = adapted_groups(activation, down, narrow, order.offsets, drops[1])
    if biases is not None:
        weights = factors.to(hidden.dtype)[:, None]
        outputs = outputs + grouped_matmul(weights, biases[1].unsqueeze(2), order.offsets)
    return sums_of(outputs, order)


def add_biases(total: Tensor, factors: Tensor, bias: Tensor, offsets: Tensor) -> None:
    """Adds to the rows of total [R, n] the bias [E, n] of their expert times factors [R].

    As a product, as are its gradients, so that they are summed in a fixed order.
    """
    add_products(total, factors.to(total.dtype)[:, None], bias.unsqueeze(1), offsets)


def bias_gradient(bias: Tensor, grad: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
    """[E, n] of bias [E, n], for upstream grad [R, n] of the rows and factors [R]."""
    column = factors.to(grad.dtype)[:, None]
    return weight_gradient(bias.unsqueeze(2), grad, column, offsets).squeeze(2)


class ExpertMLP(torch.autograd.Function):
    """`expert_mlp` with every tensor by itself."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        gate_up: Tensor,
        down: Tensor,
        probs: Tensor,
        activate: Activation,
        scales: tuple[float, float],
        a_wide: Tensor | None,
        b_wide: Tensor | None,
        a_narrow: Tensor | None,
        b_narrow: Tensor | None,
        bias_wide: Tensor | None,
        bias_narrow: Tensor | None,
        offsets: Tensor,
        copy_numbers: Tensor,
        tokens: Tensor,
        places: Tensor,
    ) -> Tensor:
        """[T, h]; keeps the first product and the low-rank ones."""
        copies = copy_kernels(hidden).scatter_copies(hidden, places)
        inner = multiply_groups(copies, gate_up.transpose(1, 2), offsets)
        low_wide = add_low_rank(inner, copies, a_wide, b_wide, scales[0], offsets)
        del copies
        factors = probs.flatten().index_select(0, copy_numbers)
        if bias_wide is not None:
            add_biases(inner, torch.ones_like(factors), bias_wide, offsets)
        activation = activate(inner, factors)
        outputs = multiply_groups(activation, down.transpose(1, 2), offsets)
        low_narrow = add_low_rank(outputs, activation, a_narrow, b_narrow, scales[1], offsets)
        if bias_narrow is not None:
            add_biases(outputs, factors, bias_narrow, offsets)
        ctx.activate, ctx.scales = activate, scales
        ctx.save_for_backward(
            *(hidden, gate_up, down, factors, offsets, tokens, places, inner),
            *(a_wide, b_wide, low_wide, a_narrow, b_narrow, low_narrow, bias_wide, bias_narrow),
        )
        return copy_kernels(hidden).sum_copies(outputs, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [T, h], gate_up, down, probs [T, k], the adapters and biases."""
        hidden, gate_up, down, factors, offsets, tokens, places, inner, *adapters = (
            ctx.saved_tensors
        )
        wide, narrow, (bias_wide, bias_narrow) = adapters[:3], adapters[3:6], adapters[6:]
        needs_hidden, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        needs_bias_wide, needs_bias_narrow = ctx.needs_input_grad[10:12]
        grad_hidden = grad_gate_up = grad_down = grad_bias_wide = grad_bias_narrow = None
        grad_wide: tuple[Tensor | None, ...] = (None, None)
        with torch.enable_grad():
            leaves = inner.detach().requires_grad_(), factors.detach().requires_grad_()
            activation = ctx.activate(*leaves)
        copies = copy_kernels(hidden).scatter_copies(grad, places)
        upstream = multiply_groups(copies, down, offsets)
        grad_narrow = low_rank_gradients(
            upstream, copies, activation.detach(), narrow, ctx.scales[1], offsets
        )
        grad_inner, grad_factors = torch.autograd.grad(activation, leaves, upstream)
        del upstream
        if bias_narrow is not None:
            # The weight of the router multiplies the bias as well.
            shares = multiply_groups(copies, bias_narrow.unsqueeze(2), offsets)
            grad_factors = grad_factors + shares[:, 0]
        if needs_bias_narrow:
            grad_bias_narrow = bias_gradient(bias_narrow, copies, factors, offsets)
        if needs_bias_wide:
            ones = torch.ones_like(factors)
            grad_bias_wide = bias_gradient(bias_wide, grad_inner, ones, offsets)
        if needs_down:
            grad_down = weight_gradient(down, copies, activation.detach(), offsets)
        del copies, activation
        if needs_gate_up:
            grad_gate_up = weight_gradient(gate_up, grad_inner, hidden, offsets, tokens)
        # For adapters alone this is one product in vain, in one layer at most.
        if needs_hidden or wide[0] is not None:
            copies = multiply_groups(grad_inner, gate_up, offsets)
            grad_wide = low_rank_gradients(
                copies, grad_inner, hidden, wide, ctx.scales[0], offsets, tokens
            )
            grad_hidden = copy_kernels(hidden).sum_copies(copies, places)
        grad_probs = grad_factors.index_select(0, places.flatten()).view_as(places)
        own = None, None, *grad_wide, *grad_narrow, grad_bias_wide, grad_bias_narrow
        return grad_hidden, grad_gate_up, grad_down, grad_probs, *own, None, None, None, None
