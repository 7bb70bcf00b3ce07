"""Products of groups of rows with a matrix each: y[rows of g] = x[rows of g] @ matrices[g].

The rows of group g are offsets[g] to offsets[g + 1] - 1. The offsets stay on the device, so the
host never waits to learn how many rows a group has; a group may have none, or all.

A GPU computes them with torch's grouped_mm where that is one kernel, else with our own; a CPU takes
one group after the other. The gradient of the matrices is always ours on a GPU: it goes into
megatron's fp32 main_grad as it is summed, which grouped_mm cannot do.
"""

import functools
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sft_fast.kernels.backends import load_backend

TORCH_GROUPED_MM: Any = getattr(functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)
HOPPER, BLACKWELL = 9, 10
ALIGNMENT_BYTES = 16


class GroupedProducts(Protocol):
    """What grouped_matmul_torch and grouped_matmul_triton have in common."""

    def multiply_groups(self, x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
        """[R, out], as the function of this name; at least one row, x contiguous."""
        ...

    def add_products(self, total: Tensor, x: Tensor, matrices: Tensor, offsets: Tensor) -> None:
        """Adds to total [R, out], as the function of this name; at least one row, both
        contiguous."""
        ...

    def add_outer_products(
        self,
        total: Tensor,
        grad: Tensor,
        x: Tensor,
        offsets: Tensor,
        rows: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Adds to total [G, out, in], as the function of this name; at least one row, grad and x
        contiguous."""
        ...


def grouped_matmul(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x[rows of g] @ weight[g].T + bias[g] for each group g, differentiable in x, weight and bias.

    The gradient of weight is added to `weight.main_grad` where there is one.

    Args:
        x: [R, in] floating.
        weight: [G, out, in], of the same dtype.
        offsets: [G + 1] int32 on the same device, ascending from 0 to R at most.
        bias: [G, out], of the same dtype; None = no bias.

    Returns:
        [R, out] of the same dtype, summed in fp32 or wider; rows behind the last group are zero,
        and so are their gradients.
    """
    check_shapes(x, weight, offsets)
    products = cast(Tensor, GroupedMatmul.apply(x, weight, offsets))
    if bias is None:
        return products
    # As a product, so that its gradient is summed in a fixed order.
    ones = x.new_ones((len(x), 1))
    return products + cast(Tensor, GroupedMatmul.apply(ones, bias.unsqueeze(2), offsets))


def check_shapes(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    """Asserts what `grouped_matmul` expects: x [R, in], weight [G, out, in], offsets [G + 1]."""
    assert x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[2], (x, weight)
    assert offsets.dtype == torch.int32 and offsets.shape == (len(weight) + 1,), offsets
    assert x.dtype == weight.dtype and x.device == weight.device == offsets.device


class GroupedMatmul(torch.autograd.Function):
    """(x, weight, offsets) -> products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """[R, out]."""
        ctx.save_for_backward(x, weight, offsets)
        return clear_behind_(multiply_groups(x, weight.transpose(1, 2), offsets), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x [R, in] and of weight [G, out, in]."""
        x, weight, offsets = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = clear_behind_(multiply_groups(grad, weight, offsets), offsets)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, weight_gradient(weight, grad, x, offsets), None


def clear_behind_(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sets the rows of [R, n] behind the last group to zero: products leave them undefined."""
    numbers = torch.arange(len(rows), device=rows.device)
    return rows.masked_fill_((numbers >= offsets[-1])[:, None], 0)


def multiply_groups(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """x[rows of g] @ matrices[g] for each group g, without autograd.

    Args:
        x: [R, in].
        matrices: [G, in, out], either of the last two dimensions contiguous.
        offsets: [G + 1] int32, from 0 to R.

    Returns:
        [R, out] contiguous; rows behind the last group are undefined.
    """
    if len(x) == 0:
        return x.new_empty((0, matrices.shape[2]))
    # A gradient may be a number that was expanded.
    x = x.contiguous()
    if fits_torch_grouped_mm(x, matrices):
        return cast(Tensor, TORCH_GROUPED_MM(x, matrices, offs=offsets[1:]))
    return products_for(x).multiply_groups(x, matrices, offsets)


def add_products(total: Tensor, x: Tensor, matrices: Tensor, offsets: Tensor) -> None:
    """total[rows of g] += x[rows of g] @ matrices[g] for each group g, without autograd.

    Args:
        total: [R, out] contiguous, of x's dtype.
        x: [R, in].
        matrices: [G, in, out], either of the last two dimensions contiguous.
        offsets: [G + 1] int32, from 0 to R.
    """
    if len(x) > 0:
        products_for(x).add_products(total, x.contiguous(), matrices, offsets)


def fits_torch_grouped_mm(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch has one kernel for x [R, in] @ matrices [G, in, out], on this device and for
    these addresses and widths."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not has_grouped_mm(x.device):
        return False
    step = ALIGNMENT_BYTES // x.element_size()
    widths = (*matrices.shape[1:], matrices.storage_offset(), matrices.stride(0))
    is_even = all(width % step == 0 for width in widths)
    return is_even and x.data_ptr() % ALIGNMENT_BYTES == matrices.data_ptr() % ALIGNMENT_BYTES == 0


@functools.cache
def has_grouped_mm(device: torch.device) -> bool:
    """Elsewhere torch takes one group after the other, and the host waits for their sizes."""
    if TORCH_GROUPED_MM is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (HOPPER, BLACKWELL)


def weight_gradient(
    weight: Tensor, grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor | None = None
) -> Tensor:
    """The gradient of weight for autograd, or a stand-in if it has gone into weight.main_grad.

    Args:
        weight: [G, out, in].
        grad: [R, out] of the products.
        x: [R, in], or with `rows` of any length.
        offsets: [G + 1] int32, from 0 to R.
        rows: [R] int32 row of x that belongs to each row of grad; None: the same row.
    """
    parameter: Any = weight
    total = getattr(parameter, "main_grad", None)
    if total is None:
        total = torch.empty_like(weight)
        add_outer_products(total, grad, x, offsets, rows, accumulate=False)
        return total
    add_outer_products(total, grad, x, offsets, rows, accumulate=True)
    assert not getattr(parameter, "zero_out_wgrad", False), "a weight that two layers share"
    parameter.grad_added_to_main_grad = True
    # Megatron's hook wants to see a gradient, which it does not read; this one costs no memory.
    return weight.detach()


def add_outer_products(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    accumulate: bool,
) -> None:
    """total[g] (+)= grad[rows of g].T @ x[rows of g], or x[rows[rows of g]], for each group g.

    Args:
        total: [G, out, in] fp32 or of x's dtype.
        grad: [R, out].
        x: [R, in], or with `rows` of any length.
        offsets: [G + 1] int32, from 0 to R.
        rows: [R] int32 row of x that belongs to each row of grad; None: the same row.
        accumulate: adds; else total is overwritten.
    """
    if len(grad) == 0:
        if not accumulate:
            total.zero_()
        return
    products = products_for(grad)
    products.add_outer_products(total, grad.contiguous(), x.contiguous(), offsets, rows, accumulate)


def products_for(x: Tensor) -> GroupedProducts:
    """Those for the device of a tensor of any shape."""
    products: GroupedProducts = load_backend("grouped_matmul", "auto", x.device.type)
    return products
