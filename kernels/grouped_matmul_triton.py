"""Grouped products in Triton, for CUDA and ROCm.

A program computes one tile. Programs of the product find their group from the offsets, which they
all read: the grid covers any way in which the rows can be spread, and programs that are left over
end at once. A tile of the gradient belongs to one program, which adds up the rows of its group in
order: no atomics, one result.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft_fast.kernels.triton_launch import LAYER_KEY, check_tensor


@triton.jit
def grouped_matmul_kernel(  # type: ignore[no-untyped-def]
    y_ptr,  # [R, num_outputs]
    x_ptr,  # [R, num_inputs]
    matrices_ptr,  # [num_groups, num_inputs, num_outputs], strided
    offsets_ptr,  # [num_groups + 1] int32
    num_groups,
    num_outputs,
    num_inputs,
    group_stride,
    input_stride,
    output_stride,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """A program computes a tile of y, which belongs to one group."""
    tiles_across = tl.cdiv(num_outputs, BLOCK_OUTPUTS)
    row_tile = tl.program_id(0) // tiles_across
    groups = tl.arange(0, BLOCK_GROUPS)
    is_group = groups < num_groups
    firsts = tl.load(offsets_ptr + groups, mask=is_group, other=0)
    lasts = tl.load(offsets_ptr + groups + 1, mask=is_group, other=0)
    tiles = (lasts - firsts + BLOCK_ROWS - 1) // BLOCK_ROWS
    tiles_until = tl.cumsum(tiles, 0)
    if row_tile >= tl.max(tiles_until, 0):
        return
    group = tl.sum((tiles_until <= row_tile).to(tl.int32), 0)
    tiles_before = tl.sum(tl.where(groups < group, tiles, 0), 0)
    first = tl.load(offsets_ptr + group)
    last = tl.load(offsets_ptr + group + 1)

    rows = first + (row_tile - tiles_before) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_group = rows < last
    outputs = (tl.program_id(0) % tiles_across) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    in_width = outputs < num_outputs
    x_ptr += rows.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    # Not group.to(...) * group_stride: a stride of 1 is a Python number.
    matrices_ptr += group.to(tl.int64) * group_stride
    matrices_ptr += inputs[:, None] * input_stride + outputs[None, :] * output_stride
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for start in range(0, num_inputs, BLOCK_INPUTS):
        if IS_EVEN:
            x = tl.load(x_ptr, mask=in_group[:, None], other=0.0)
            matrix = tl.load(matrices_ptr)
        else:
            is_input = start + inputs < num_inputs
            x = tl.load(x_ptr, mask=in_group[:, None] & is_input[None, :], other=0.0)
            matrix = tl.load(matrices_ptr, mask=is_input[:, None] & in_width[None, :], other=0.0)
        sums = tl.dot(x, matrix, sums, input_precision=PRECISION)
        x_ptr += BLOCK_INPUTS
        matrices_ptr += BLOCK_INPUTS * input_stride
    y_ptr += rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    wanted = in_group[:, None] if IS_EVEN else in_group[:, None] & in_width[None, :]
    if ACCUMULATE:
        sums += tl.load(y_ptr, mask=wanted, other=0.0)
    tl.store(y_ptr, sums.to(y_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def grouped_outer_product_kernel(  # type: ignore[no-untyped-def]
    total_ptr,  # [num_groups, num_outputs, num_inputs]
    grad_ptr,  # [R, num_outputs]
    x_ptr,  # [any, num_inputs]
    offsets_ptr,  # [num_groups + 1] int32
    rows_ptr,  # [R] int32, or anything without HAS_ROWS
    num_outputs,
    num_inputs,
    HAS_ROWS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """A program computes a tile of one group's total, adding up all of its rows."""
    tiles_across = tl.cdiv(num_inputs, BLOCK_INPUTS)
    tiles = tl.cdiv(num_outputs, BLOCK_OUTPUTS) * tiles_across
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first = tl.load(offsets_ptr + group)
    last = tl.load(offsets_ptr + group + 1)
    if ACCUMULATE and first == last:
        return
    outputs = (tile // tiles_across) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inputs = (tile % tiles_across) * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    is_output, is_input = outputs < num_outputs, inputs < num_inputs
    sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        in_group = rows < last
        x_rows = tl.load(rows_ptr + rows, mask=in_group, other=0) if HAS_ROWS else rows
        grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
        x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
        if IS_EVEN:
            grad = tl.load(grad_ptrs, mask=in_group[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=in_group[:, None], other=0.0)
        else:
            grad = tl.load(grad_ptrs, mask=in_group[:, None] & is_output[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=in_group[:, None] & is_input[None, :], other=0.0)
        sums = tl.dot(tl.trans(grad), x, sums, input_precision=PRECISION)
    total_ptr += group.to(tl.int64) * num_outputs * num_inputs
    total_ptr += outputs[:, None] * num_inputs + inputs[None, :]
    wanted = None if IS_EVEN else is_output[:, None] & is_input[None, :]
    if ACCUMULATE:
        sums += tl.load(total_ptr, mask=wanted)
    tl.store(total_ptr, sums.to(total_ptr.dtype.element_ty), mask=wanted)


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut into tiles of [rows, columns], read `depth` at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """At most: some compilers keep one stage less."""
        tile = (self.rows + self.columns) * self.depth * dtype.itemsize
        return tile * self.num_stages

    def divides(self, rows: int, columns: int) -> bool:
        """Whether no tile hangs over."""
        return rows % self.rows == 0 and columns % self.columns == 0


AMD_16_BIT = TileConfig(128, 128, 64, num_warps=4, num_stages=2)
NVIDIA_16_BIT = (
    TileConfig(128, 256, 64, num_warps=8, num_stages=3),
    TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 64, 64, num_warps=4, num_stages=2),
)
# A wider tile and the sums that it is added to would not fit the registers.
NVIDIA_16_BIT_OUTER = (
    TileConfig(128, 128, 64, num_warps=8, num_stages=4),
    TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 64, 64, num_warps=4, num_stages=2),
)
FP32 = TileConfig(64, 64, 32, num_warps=4, num_stages=2)


def tile_config(dtype: torch.dtype, is_outer: bool, is_amd: bool, shared_bytes: int) -> TileConfig:
    """The widest tiles that fit the shared memory of the device."""
    if dtype.itemsize > 2:
        return FP32
    if is_amd:
        return AMD_16_BIT
    choices = NVIDIA_16_BIT_OUTER if is_outer else NVIDIA_16_BIT
    fitting = (choice for choice in choices if choice.shared_bytes(dtype) <= shared_bytes)
    return next(fitting, choices[-1])


@functools.cache
def device_config(device: torch.device, dtype: torch.dtype, is_outer: bool) -> TileConfig:
    """Of a GPU, or of the interpreter."""
    if device.type == "cpu":
        return TileConfig(16, 16, 16, num_warps=1, num_stages=1)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)
    return tile_config(dtype, is_outer, torch.version.hip is not None, shared_bytes)


def product_options(config: TileConfig) -> dict[str, int]:
    """Launch options of grouped_matmul_kernel."""
    return {
        "BLOCK_ROWS": config.rows,
        "BLOCK_OUTPUTS": config.columns,
        "BLOCK_INPUTS": config.depth,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def outer_options(config: TileConfig, has_rows: bool) -> dict[str, int]:
    """Launch options of grouped_outer_product_kernel."""
    return {
        "BLOCK_ROWS": config.depth,
        "BLOCK_OUTPUTS": config.rows,
        "BLOCK_INPUTS": config.columns,
        "num_warps": config.num_warps,
        # A row is known one stage before it is read.
        "num_stages": config.num_stages + (has_rows and config.num_stages > 2),
    }


def multiply_groups(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """[R, out], as grouped_matmul.multiply_groups; bf16, fp16 or fp32."""
    y = x.new_empty((len(x), matrices.shape[2]))
    launch_products(y, x, matrices, offsets, accumulate=False)
    return y


def add_products(total: Tensor, x: Tensor, matrices: Tensor, offsets: Tensor) -> None:
    """Adds to total [R, out], as grouped_matmul.add_products; bf16, fp16 or fp32."""
    assert total.is_contiguous() and total.dtype == x.dtype
    launch_products(total, x, matrices, offsets, accumulate=True)


def launch_products(
    y: Tensor, x: Tensor, matrices: Tensor, offsets: Tensor, accumulate: bool
) -> None:
    """Writes the products of x [R, in] with matrices [G, in, out] to y [R, out], or adds them."""
    check_tensor(x, "inputs of experts", LAYER_KEY)
    num_groups, num_inputs, num_outputs = matrices.shape
    config = device_config(x.device, x.dtype, is_outer=False)
    # Each group may end with a tile that is not full.
    row_tiles = len(x) // config.rows + min(num_groups, len(x))
    with torch.cuda.device_of(x):
        grouped_matmul_kernel[(row_tiles * triton.cdiv(num_outputs, config.columns),)](
            y,
            x,
            matrices,
            offsets,
            num_groups,
            num_outputs,
            num_inputs,
            *matrices.stride(),
            ACCUMULATE=accumulate,
            PRECISION="ieee",
            IS_EVEN=config.divides(config.rows, num_outputs) and num_inputs % config.depth == 0,
            BLOCK_GROUPS=triton.next_power_of_2(num_groups),
            **product_options(config),
        )


def add_outer_products(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    accumulate: bool,
) -> None:
    """Adds to total [G, out, in], as grouped_matmul.add_outer_products; bf16, fp16 or fp32."""
    check_tensor(x, "inputs of experts", LAYER_KEY)
    assert total.is_contiguous() and grad.dtype == x.dtype
    num_groups, num_outputs, num_inputs = total.shape
    config = device_config(x.device, x.dtype, is_outer=True)
    tiles = triton.cdiv(num_outputs, config.rows) * triton.cdiv(num_inputs, config.columns)
    with torch.cuda.device_of(x):
        grouped_outer_product_kernel[(num_groups * tiles,)](
            total,
            grad,
            x,
            offsets,
            offsets if rows is None else rows,
            num_outputs,
            num_inputs,
            HAS_ROWS=rows is not None,
            ACCUMULATE=accumulate,
            PRECISION="ieee",
            IS_EVEN=config.divides(num_outputs, num_inputs),
            **outer_options(config, rows is not None),
        )
