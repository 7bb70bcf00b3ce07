"""Low-rank adapters beside a frozen matrix of every expert, in grouped products.

What the adapters of a row's expert make of the row is two more grouped products of narrow matrices,
over all experts at once, the second in place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
