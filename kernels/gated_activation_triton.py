"""The product of an activated gate and its partner (SwiGLU, GeGLU) in Triton.

The backward pass needs the input only, and may write the gradient in its place. The maths and the
bytes moved are in kernels/README.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.triton_launch import LAYER_KEY, check_tensor, operation, warp_size

BLOCK_COLUMNS, ELEMENTS_PER_THREAD = 1024, 8
LOG2E = tl.constexpr(1.4426950408889634)
GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)
# gpt-oss has no others.
CLAMPED_SLOPE = tl.constexpr(1.702)
LIMIT = tl.constexpr(7.0)


@triton.jit
def activate(gate, up, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activated gate and its derivative, the partner and its derivative.

    Every kind is gate * sigmoid(z(gate)).
    """
    gate_slope, up_slope = 1.0, 1.0
    if KIND == "clamped_silu":
        gate_slope = tl.where(gate > LIMIT, 0.0, 1.0)
        up_slope = tl.where(tl.abs(up) > LIMIT, 0.0, 1.0)
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        z, z_slope = gate * CLAMPED_SLOPE, CLAMPED_SLOPE
    elif KIND == "gelu_tanh":
        square = gate * gate
        z = gate * (square * (GELU_SLOPE * GELU_CUBE) + GELU_SLOPE)
        z_slope = square * (3.0 * GELU_SLOPE * GELU_CUBE) + GELU_SLOPE
    else:
        z, z_slope = gate, 1.0
    # Of the sigmoid and its complement neither is found by a subtraction, which would cancel.
    small = tl.exp2(tl.abs(z) * -LOG2E)
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    share = tl.where(z > 0, larger, smaller)
    rest = tl.where(z > 0, smaller, larger)
    value = gate * share
    slope = (share + value * rest * z_slope) * gate_slope
    return value, slope, up, up_slope


@triton.jit
def gated_activation_fwd_kernel(  # type: ignore[no-untyped-def]
    output_ptr,  # [N, num_columns]
    gate_up_ptr,  # [N, 2 * num_columns]: gates, then partners
    scale_ptr,  # [N]; only with HAS_SCALE
    num_columns,
    KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Activation of one block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    wanted = columns < num_columns
    gate_up_ptr += row * 2 * num_columns
    gate = tl.load(gate_up_ptr + columns, mask=wanted, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + num_columns + columns, mask=wanted, other=0.0).to(tl.float32)
    value, _, up, _ = activate(gate, up, KIND)
    value *= up
    if HAS_SCALE:
        value *= tl.load(scale_ptr + row).to(tl.float32)
    output_ptr += row * num_columns
    tl.store(output_ptr + columns, value.to(output_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def gated_activation_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [N, 2 * num_columns], may be gate_up_ptr
    grad_scale_ptr,  # [N]; only with HAS_SCALE
    grad_output_ptr,  # [N, num_columns]
    gate_up_ptr,  # [N, 2 * num_columns]
    scale_ptr,  # [N]; only with HAS_SCALE
    num_columns,
    KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradients of one row's gates and partners, and of its factor."""
    row = tl.program_id(0).to(tl.int64)
    gate_up_ptr += row * 2 * num_columns
    grad_ptr += row * 2 * num_columns
    grad_output_ptr += row * num_columns
    if HAS_SCALE:
        scale = tl.load(scale_ptr + row).to(tl.float32)
        grad_scale = tl.zeros([BLOCK_COLUMNS], tl.float32)
    step = tl.num_programs(1) * BLOCK_COLUMNS
    for first in range(tl.program_id(1) * BLOCK_COLUMNS, num_columns, step):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        wanted = columns < num_columns
        gate = tl.load(gate_up_ptr + columns, mask=wanted, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + num_columns + columns, mask=wanted, other=0.0).to(tl.float32)
        grad = tl.load(grad_output_ptr + columns, mask=wanted, other=0.0).to(tl.float32)
        value, slope, up, up_slope = activate(gate, up, KIND)
        if HAS_SCALE:
            grad_scale += grad * value * up
            grad *= scale
        grad_gate = (grad * up * slope).to(grad_ptr.dtype.element_ty)
        grad_up = (grad * value * up_slope).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + columns, grad_gate, mask=wanted)
        tl.store(grad_ptr + num_columns + columns, grad_up, mask=wanted)
    if HAS_SCALE:
        total = tl.sum(grad_scale, 0)
        tl.store(grad_scale_ptr + row, total.to(grad_scale_ptr.dtype.element_ty))


def launch_options(num_columns: int, warp_size: int) -> dict[str, int]:
    """Block size and warps for a number of columns."""
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(num_columns))
    return {
        "BLOCK_COLUMNS": block,
        "num_warps": max(1, block // (ELEMENTS_PER_THREAD * warp_size)),
    }


def new_output(gate_up: Tensor) -> Tensor:
    """An empty tensor [..., f] for gates and partners [..., 2 f]."""
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@operation("sft_fast::write_gated_activation", mutates_args=("out",))
def write_gated_activation(
    out: Tensor, gate_up: Tensor, kind: str, scale: Tensor | None = None
) -> None:
    """As block_torch.write_gated_activation."""
    check_tensor(gate_up, "gates", LAYER_KEY)
    if out.numel() > 0:
        num_columns = out.shape[-1]
        options = launch_options(num_columns, warp_size(gate_up))
        blocks = triton.cdiv(num_columns, options["BLOCK_COLUMNS"])
        with torch.cuda.device_of(gate_up):
            gated_activation_fwd_kernel[(out.numel() // num_columns, blocks)](
                out,
                gate_up.contiguous(),
                None if scale is None else scale.contiguous(),
                num_columns,
                KIND=kind,
                HAS_SCALE=scale is not None,
                **options,
            )


@write_gated_activation.register_fake
def _(out: Tensor, gate_up: Tensor, kind: str, scale: Tensor | None = None) -> None:
    return None


@operation("sft_fast::gated_activation_gradient", mutates_args=("grad", "grad_scale"))
def write_gradient(
    grad: Tensor,
    grad_scale: Tensor | None,
    grad_output: Tensor,
    gate_up: Tensor,
    scale: Tensor | None,
    kind: str,
) -> None:
    """Writes the gradients of gate_up and, where there is one, of the scale.

    Args:
        grad: [..., 2 n] contiguous, may be gate_up itself.
        grad_scale: [...] contiguous, None without a scale.
        grad_output: [..., n], upstream gradient.
        gate_up: [..., 2 f].
        scale: [N], the factors; None = all 1.
        kind: of the activation.
    """
    if grad_output.numel() > 0:
        num_columns = grad_output.shape[-1]
        options = launch_options(num_columns, warp_size(gate_up))
        # One program sums a row's gradient of the scale.
        splits = 1 if scale is not None else triton.cdiv(num_columns, options["BLOCK_COLUMNS"])
        with torch.cuda.device_of(gate_up):
            gated_activation_bwd_kernel[(grad_output.numel() // num_columns, splits)](
                grad,
                grad_scale,
                grad_output.contiguous(),
                gate_up,
                None if scale is None else scale.contiguous(),
                num_columns,
                KIND=kind,
                HAS_SCALE=scale is not None,
                **options,
            )


@write_gradient.register_fake
def _(
    grad: Tensor,
    grad_scale: Tensor | None,
    grad_output: Tensor,
    gate_up: Tensor,
    scale: Tensor | None,
    kind: str,
) -> None:
    return None


class GatedActivation(torch.autograd.Function):
    """(gate_up, scale, kind, may_overwrite) -> output."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, scale: Tensor | None, kind: str, may_overwrite: bool
    ) -> Tensor:
        """[..., f] of gates and partners [..., 2 f]."""
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up, scale)
        ctx.kind, ctx.may_overwrite = kind, may_overwrite
        output = new_output(gate_up)
        write_gated_activation(output, gate_up, kind, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient [..., 2 f], in place where it may be, and that of the factors [N]."""
        gate_up, scale = ctx.saved_tensors
        grad = gate_up if ctx.may_overwrite else torch.empty_like(gate_up)
        grad_scale = None
        if scale is not None:
            grad_scale = torch.empty_like(scale, memory_format=torch.contiguous_format)
        write_gradient(grad, grad_scale, grad_output, gate_up, scale, ctx.kind)
        return grad, grad_scale, None, None


def gated_activation(
    gate_up: Tensor, kind: str, scale: Tensor | None = None, may_overwrite: bool = False
) -> Tensor:
    """As block_torch.gated_activation."""
    output: Tensor = GatedActivation.apply(gate_up, scale, kind, may_overwrite)
    return output
