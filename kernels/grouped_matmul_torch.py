"""Grouped products in PyTorch, one group after the other.

On a GPU the host waits for the offsets.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sft_fast.kernels.head_gradient import add_product_


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Those that have rows, of offsets [G + 1]."""
    for group, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first < last:
            yield group, slice(first, last)


def multiply_groups(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """[R, out], as grouped_matmul.multiply_groups."""
    result = x.new_empty((len(x), matrices.shape[2]))
    for group, rows in groups(offsets):
        torch.mm(x[rows], matrices[group], out=result[rows])
    return result


def add_products(total: Tensor, x: Tensor, matrices: Tensor, offsets: Tensor) -> None:
    """Adds to total [R, out], as grouped_matmul.add_products."""
    for group, rows in groups(offsets):
        total[rows].addmm_(x[rows], matrices[group])


def add_outer_products(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    accumulate: bool,
) -> None:
    """Adds to total [G, out, in], as grouped_matmul.add_outer_products."""
    if not accumulate:
        total.zero_()
    for group, chosen in groups(offsets):
        inputs = x[chosen] if rows is None else x.index_select(0, rows[chosen])
        add_product_(total[group], grad[chosen].t(), inputs)
