"""A layer of gated experts with low-rank adapters beside its frozen matrices.

`expert_mlp`'s computation, and to each of its two grouped products is added what the adapters of
the row's expert make of the row: two more grouped products of narrow matrices, over all experts at
once, the second in place. Kept beside what `expert_mlp` keeps are the low-rank products, [R, n r]
and [R, r].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.expert_copies import CopyOrder, copies_of, copy_kernels, sums_of
from sft_fast.kernels.expert_mlp import Activation
from sft_fast.kernels.grouped_matmul import (
    add_products,
    grouped_matmul,
    multiply_groups,
    weight_gradient,
)


@dataclass(frozen=True)
class GroupedAdapters:
    """The adapters of a matrix [out, in] of every expert, which n projections share."""

    a: tuple[Tensor, ...]
    """Of each projection, [E, r, in]."""
    b: Tensor
    """[E, out, n r]: each row has the B of its projection, and 0 in the columns of the others."""
    scale: float

    @property
    def every_a(self) -> Tensor:
        """[E, n r, in]."""
        return self.a[0] if len(self.a) == 1 else torch.cat(self.a, dim=1)


def adapted_expert_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    probs: Tensor,
    order: CopyOrder,
    activate: Activation,
    wide: GroupedAdapters | None,
    narrow: GroupedAdapters | None,
) -> Tensor:
    """The weighted sum of each token's experts, each matrix W + scale * B A.

    Differentiable in hidden, probs and the adapters; the matrices are frozen.

    Args:
        hidden: [T, h] floating.
        gate_up: [E, 2 f, h] of the same dtype, an expert's gate and then its up projection.
        down: [E, h, f].
        probs: [T, k] fp32 weights of the router.
        order: of the tokens' experts.
        activate: differentiable in both arguments.
        wide: the adapters of gate_up; None = none.
        narrow: the adapters of down; None = none.

    Returns:
        [T, h] of hidden's dtype.
    """
    pairs: list[Tensor | None] = []
    scales = []
    for adapters in (wide, narrow):
        pairs += (None, None) if adapters is None else (adapters.every_a, adapters.b)
        scales.append(0.0 if adapters is None else adapters.scale)
    order_tensors = order.offsets, order.copy_numbers, order.tokens, order.places
    arguments = hidden, gate_up, down, probs, activate, tuple(scales), *pairs, *order_tensors
    return cast(Tensor, AdaptedExpertMLP.apply(*arguments))


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
) -> Tensor:
    """As `adapted_expert_mlp`, with dropout before each A; copies and activations are kept.

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

    Returns:
        [T, h].
    """
    copies = copies_of(hidden, order)
    inner = adapted_groups(copies, gate_up, wide, order.offsets, drops[0])
    factors = probs.flatten().index_select(0, order.copy_numbers)
    activation = activate(inner, factors)
    return sums_of(adapted_groups(activation, down, narrow, order.offsets, drops[1]), order)


def adapted_groups(
    x: Tensor,
    weight: Tensor,
    adapters: GroupedAdapters | None,
    offsets: Tensor,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """[R, out] of x [R, in], weight [E, out, in] and offsets [E + 1]: one adapted product."""
    product = grouped_matmul(x, weight, offsets)
    if adapters is None:
        return product
    parts = [grouped_matmul(drop(x), a, offsets) for a in adapters.a]
    return product + adapters.scale * grouped_matmul(torch.cat(parts, dim=1), adapters.b, offsets)


class AdaptedExpertMLP(torch.autograd.Function):
    """`adapted_expert_mlp` with every tensor by itself."""

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
        activation = activate(inner, factors)
        outputs = multiply_groups(activation, down.transpose(1, 2), offsets)
        low_narrow = add_low_rank(outputs, activation, a_narrow, b_narrow, scales[1], offsets)
        ctx.activate, ctx.scales = activate, scales
        ctx.save_for_backward(
            *(hidden, gate_up, down, factors, offsets, tokens, places, inner),
            *(a_wide, b_wide, low_wide, a_narrow, b_narrow, low_narrow),
        )
        return copy_kernels(hidden).sum_copies(outputs, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [T, h], probs [T, k] and the adapters."""
        hidden, gate_up, down, factors, offsets, tokens, places, inner, *adapters = (
            ctx.saved_tensors
        )
        wide, narrow = adapters[:3], adapters[3:]
        assert not any(ctx.needs_input_grad[1:3]), "the matrices beside adapters are frozen"
        with torch.enable_grad():
            leaves = inner.detach().requires_grad_(), factors.detach().requires_grad_()
            activation = ctx.activate(*leaves)
        copies = copy_kernels(hidden).scatter_copies(grad, places)
        upstream = multiply_groups(copies, down, offsets)
        grad_narrow = low_rank_gradients(
            upstream, copies, activation.detach(), narrow, ctx.scales[1], offsets
        )
        grad_inner, grad_factors = torch.autograd.grad(activation, leaves, upstream)
        del upstream, activation, copies
        # Without a gradient of hidden this is one product in vain, in one layer at most.
        copies = multiply_groups(grad_inner, gate_up, offsets)
        grad_wide = low_rank_gradients(
            copies, grad_inner, hidden, wide, ctx.scales[0], offsets, tokens
        )
        grad_hidden = copy_kernels(hidden).sum_copies(copies, places)
        grad_probs = grad_factors.index_select(0, places.flatten()).view_as(places)
        own = None, None, *grad_wide, *grad_narrow
        return grad_hidden, None, None, grad_probs, *own, None, None, None, None


def add_low_rank(
    output: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float, offsets: Tensor
) -> Tensor | None:
    """Adds scale * x A^T B^T to output [R, out].

    Args:
        output: [R, out].
        x: [R, in].
        a: [E, r, in]; None = there are no adapters.
        b: [E, out, r].
        scale: a factor.
        offsets: [E + 1].

    Returns:
        scale * x A^T, [R, r].
    """
    if a is None or b is None:
        return None
    low_rank = multiply_groups(x, a.transpose(1, 2), offsets).mul_(scale)
    add_products(output, low_rank, b.transpose(1, 2), offsets)
    return low_rank


def low_rank_gradients(
    grad_x: Tensor,
    grad: Tensor,
    x: Tensor,
    adapters: list[Tensor | None],
    scale: float,
    offsets: Tensor,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A [E, r, in] and B [E, out, r]; adds the adapters' part to grad_x [R, in].

    Args:
        grad_x: [R, in].
        grad: [R, out] of the product with the sum.
        x: [R, in], or with `rows` of any length.
        adapters: A, B, and what `add_low_rank` returned; None = there are none.
        scale: a factor.
        offsets: [E + 1].
        rows: [R] int32 row of x that belongs to each row of grad; None: the same row.
    """
    a, b, low_rank = adapters
    if a is None or b is None or low_rank is None:
        return None, None
    grad_low_rank = multiply_groups(grad, b, offsets).mul_(scale)
    add_products(grad_x, grad_low_rank, a, offsets)
    grad_b = weight_gradient(b, grad, low_rank, offsets)
    return weight_gradient(a, grad_low_rank, x, offsets, rows), grad_b
