"""RMSNorm, and the addition to the residual before or after it, in Triton for CUDA and ROCm.

One program works on whole rows, which it reads once. The maths, the bytes moved and the order of
the weight's gradient are in kernels/README.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.column_sums_triton import add_column_sums, gradient_total, total_gradient
from sft_fast.kernels.triton_launch import LAYER_KEY, check_tensor, operation, warp_size

ELEMENTS_PER_THREAD, MAX_WARPS = 16, 16
MAX_PROGRAMS, MIN_ROWS_PER_PROGRAM = 512, 4
"""Of a backward pass that sums a weight gradient: each program leaves one row of partial sums."""


@triton.jit
def load_row(pointer, columns, num_columns, IS_WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row as fp32 [BLOCK_COLUMNS], 0 beyond its end."""
    if IS_WHOLE:
        return tl.load(pointer + columns).to(tl.float32)
    return tl.load(pointer + columns, mask=columns < num_columns, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, columns, values, num_columns, IS_WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a row [BLOCK_COLUMNS] in the type of its memory."""
    values = values.to(pointer.dtype.element_ty)
    if IS_WHOLE:
        tl.store(pointer + columns, values)
    else:
        tl.store(pointer + columns, values, mask=columns < num_columns)


@triton.jit
def rms_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    normed_ptr,  # [N, H]; not with ADD_AFTER
    total_ptr,  # [N, H]; only with ADD_BEFORE or ADD_AFTER
    rstd_ptr,  # [N] fp32
    x_ptr,  # [N, H]
    residual_ptr,  # [N, H]; only with ADD_BEFORE or ADD_AFTER
    weight_ptr,  # [H]
    num_columns,
    eps,
    ADD_BEFORE: tl.constexpr,
    ADD_AFTER: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The norm of one row, with the addition before or after it."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * num_columns
    columns = tl.arange(0, BLOCK_COLUMNS)
    x = load_row(x_ptr + offset, columns, num_columns, IS_WHOLE)
    if ADD_BEFORE:
        x += load_row(residual_ptr + offset, columns, num_columns, IS_WHOLE)
        # The norm is of the sum as it is kept, so that the backward pass finds the same numbers.
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        store_row(total_ptr + offset, columns, x, num_columns, IS_WHOLE)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = load_row(weight_ptr, columns, num_columns, IS_WHOLE)
    if ZERO_CENTERED:
        weight += 1.0
    normed = x * rstd * weight
    if ADD_AFTER:
        normed += load_row(residual_ptr + offset, columns, num_columns, IS_WHOLE)
        store_row(total_ptr + offset, columns, normed, num_columns, IS_WHOLE)
    else:
        store_row(normed_ptr + offset, columns, normed, num_columns, IS_WHOLE)


@triton.jit
def rms_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [N, H]
    partial_ptr,  # [num_programs, H] fp32; only with WITH_WEIGHT
    grad_normed_ptr,  # [N, H]
    grad_total_ptr,  # [N, H]; only with WITH_TOTAL
    x_ptr,  # [N, H], what was normalised
    rstd_ptr,  # [N] fp32
    weight_ptr,  # [H]
    num_rows,
    num_columns,
    WITH_TOTAL: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradients of some rows, and this program's part of the weight's."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = load_row(weight_ptr, columns, num_columns, IS_WHOLE)
    if ZERO_CENTERED:
        weight += 1.0
    offset = program.to(tl.int64) * num_columns
    step = tl.num_programs(0).to(tl.int64) * num_columns
    weight_grad = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        normalised = load_row(x_ptr + offset, columns, num_columns, IS_WHOLE) * rstd
        grad_normed = load_row(grad_normed_ptr + offset, columns, num_columns, IS_WHOLE)
        if WITH_WEIGHT:
            weight_grad += grad_normed * normalised
        grad = grad_normed * weight
        mean = tl.sum(grad * normalised, 0) / num_columns
        grad = (grad - normalised * mean) * rstd
        if WITH_TOTAL:
            grad += load_row(grad_total_ptr + offset, columns, num_columns, IS_WHOLE)
        store_row(grad_ptr + offset, columns, grad, num_columns, IS_WHOLE)
        offset += step
    if WITH_WEIGHT:
        partial_ptr += program.to(tl.int64) * num_columns
        store_row(partial_ptr, columns, weight_grad, num_columns, IS_WHOLE)


def launch_options(num_columns: int, warp_size: int) -> dict[str, Any]:
    """How one program spreads a row over its threads."""
    block = triton.next_power_of_2(num_columns)
    num_warps = block // (ELEMENTS_PER_THREAD * warp_size)
    return {
        "IS_WHOLE": block == num_columns,
        "BLOCK_COLUMNS": block,
        "num_warps": max(1, min(MAX_WARPS, num_warps)),
    }


def num_programs(num_rows: int, with_weight: bool) -> int:
    """Of a backward pass: one per row, fewer where each has a row of partial sums to write."""
    if not with_weight:
        return num_rows
    return min(MAX_PROGRAMS, triton.cdiv(num_rows, MIN_ROWS_PER_PROGRAM))


def launch_forward(
    normed: Tensor | None,
    total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    is_zero_centered: bool,
) -> Tensor:
    """Writes what is not None of normed and total; returns 1 / root-mean-square, [...] fp32."""
    check_tensor(x, "hidden states", LAYER_KEY)
    num_columns = weight.numel()
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            rms_norm_fwd_kernel[(rstd.numel(),)](
                normed,
                total,
                rstd,
                x.contiguous(),
                None if residual is None else residual.contiguous(),
                weight,
                num_columns,
                eps,
                ADD_BEFORE=normed is not None and total is not None,
                ADD_AFTER=normed is None,
                ZERO_CENTERED=is_zero_centered,
                **launch_options(num_columns, warp_size(x)),
            )
    return rstd


@operation("sft_fast::write_rms_norm", mutates_args=("out",))
def write_rms_norm(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False
) -> None:
    """As block_torch.write_rms_norm."""
    launch_forward(out, None, x, None, weight, eps, is_zero_centered)


@write_rms_norm.register_fake
def _(out: Tensor, x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False) -> None:
    return None


@operation("sft_fast::rms_norm")
def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """(norm of x [..., h], 1 / root-mean-square [...] fp32)"""
    normed = new_like(x)
    return normed, launch_forward(normed, None, x, None, weight, eps, is_zero_centered)


@rms_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool) -> tuple[Tensor, Tensor]:
    return new_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operation("sft_fast::add_rms_norm")
def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of x + residual [..., h], x + residual, 1 / root-mean-square [...] fp32)"""
    normed, total = new_like(x), new_like(x)
    rstd = launch_forward(normed, total, x, residual, weight, eps, is_zero_centered)
    return normed, total, rstd


@add_rms_norm_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(x), new_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operation("sft_fast::rms_norm_add")
def rms_norm_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """(residual + norm of x [..., h], 1 / root-mean-square of x [...] fp32)"""
    total = new_like(x)
    return total, launch_forward(None, total, x, residual, weight, eps, is_zero_centered)


@rms_norm_add_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool
) -> tuple[Tensor, Tensor]:
    return new_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operation("sft_fast::rms_norm_gradient", mutates_args=("weight_total",))
def rms_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    is_zero_centered: bool,
    weight_total: Tensor | None,
) -> Tensor:
    """Gradient [..., h] of what was normalised, and of the weight.

    Args:
        grad_normed: [..., h], upstream gradient of the norm.
        grad_total: [..., h], upstream gradient of x itself, which is added. None: 0.
        x: [..., h], what was normalised.
        rstd: [...] fp32, as the forward pass returned it.
        weight: [h].
        is_zero_centered: the factor is 1 + weight.
        weight_total: [h], the weight's gradient is added to it. None: it is not computed.
    """
    grad = new_like(x)
    num_columns, num_rows = weight.numel(), rstd.numel()
    if num_rows == 0:
        return grad
    programs = num_programs(num_rows, weight_total is not None)
    partial = None
    if weight_total is not None:
        partial = x.new_empty((programs, num_columns), dtype=torch.float32)
    with torch.cuda.device_of(x):
        rms_norm_bwd_kernel[(programs,)](
            grad,
            partial,
            grad_normed.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            x.contiguous(),
            rstd,
            weight,
            num_rows,
            num_columns,
            WITH_TOTAL=grad_total is not None,
            WITH_WEIGHT=partial is not None,
            ZERO_CENTERED=is_zero_centered,
            **launch_options(num_columns, warp_size(x)),
        )
    if weight_total is not None:
        assert partial is not None
        add_column_sums(weight_total, partial)
    return grad


@rms_norm_backward.register_fake
def _(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    is_zero_centered: bool,
    weight_total: Tensor | None,
) -> Tensor:
    return new_like(x)


def new_like(x: Tensor) -> Tensor:
    """An empty contiguous tensor, like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gradients(
    ctx: Any, grad_normed: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of what was normalised, and of the weight as autograd wants it."""
    x, rstd, weight = ctx.saved_tensors
    total = gradient_total(weight) if ctx.needs_weight_grad else None
    grad = rms_norm_backward(grad_normed, grad_total, x, rstd, weight, ctx.is_zero_centered, total)
    return grad, total_gradient(weight, total)


class RmsNorm(torch.autograd.Function):
    """(x, weight, eps, is_zero_centered) -> norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool) -> Tensor:
        """The norm of x, [..., h]."""
        normed, rstd = rms_norm_forward(x, weight, eps, is_zero_centered)
        ctx.save_for_backward(x, rstd, weight)
        ctx.is_zero_centered, ctx.needs_weight_grad = is_zero_centered, ctx.needs_input_grad[1]
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x [..., h] and of the weight [h]."""
        grad, weight_grad = gradients(ctx, grad_normed, None)
        return grad, weight_grad, None, None


class AddRmsNorm(torch.autograd.Function):
    """(x, residual or None, weight, eps, is_zero_centered) -> norm of the sum, sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        is_zero_centered: bool,
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), each [..., h]."""
        options = weight, eps, is_zero_centered
        if residual is None:
            total, (normed, rstd) = x, rms_norm_forward(x, *options)
        else:
            normed, total, rstd = add_rms_norm_forward(x, residual, *options)
        ctx.save_for_backward(total, rstd, weight)
        ctx.is_zero_centered, ctx.needs_weight_grad = is_zero_centered, ctx.needs_input_grad[2]
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both addends [..., h], which are one, and of the weight [h]."""
        grad, weight_grad = gradients(ctx, grad_normed, grad_total)
        return grad, grad if ctx.needs_input_grad[1] else None, weight_grad, None, None


class RmsNormAdd(torch.autograd.Function):
    """(x, residual, weight, eps, is_zero_centered) -> residual + norm of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool
    ) -> Tensor:
        """residual + norm of x, [..., h]."""
        total, rstd = rms_norm_add_forward(x, residual, weight, eps, is_zero_centered)
        ctx.save_for_backward(x, rstd, weight)
        ctx.is_zero_centered, ctx.needs_weight_grad = is_zero_centered, ctx.needs_input_grad[2]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and residual [..., h] and of the weight [h]."""
        grad, weight_grad = gradients(ctx, grad_total, None)
        return grad, grad_total, weight_grad, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False) -> Tensor:
    """As block_torch.rms_norm."""
    normed: Tensor = RmsNorm.apply(x, weight, eps, is_zero_centered)
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, is_zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """As block_torch.add_rms_norm."""
    normed, total = AddRmsNorm.apply(x, residual, weight, eps, is_zero_centered)
    return normed, total


def rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool = False
) -> Tensor:
    """As block_torch.rms_norm_add."""
    total: Tensor = RmsNormAdd.apply(x, residual, weight, eps, is_zero_centered)
    return total
