"""The gradient of a weight that every row shares: partial sums, added up in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft_fast.kernels.head_gradient import weight_gradient

BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 64, 32, 4


@triton.jit
def column_sums_kernel(  # type: ignore[no-untyped-def]
    total_ptr,  # [num_columns]
    partial_ptr,  # [num_rows, num_columns] fp32
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Adds the sums over rows to `total`, in one order."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < num_columns
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        wanted = (rows < num_rows)[:, None] & is_column[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        sums += tl.load(partial_ptr + offsets, mask=wanted, other=0.0)
    total = tl.load(total_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    total += tl.sum(sums, 0)
    tl.store(total_ptr + columns, total.to(total_ptr.dtype.element_ty), mask=is_column)


def add_column_sums(total: Tensor, partial: Tensor) -> None:
    """total [n], contiguous, any floating dtype, += the sums of partial [..., n] fp32."""
    num_columns = total.numel()
    with torch.cuda.device_of(partial):
        column_sums_kernel[(triton.cdiv(num_columns, BLOCK_COLUMNS),)](
            total,
            partial,
            partial.numel() // num_columns,
            num_columns,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
        )


def gradient_total(weight: Tensor) -> Tensor:
    """Where the gradient of a weight [n] is added: `main_grad`, or zeros in fp32."""
    total: Tensor | None = getattr(weight, "main_grad", None)
    return torch.zeros_like(weight, dtype=torch.float32) if total is None else total


def total_gradient(weight: Tensor | None, total: Tensor | None) -> Tensor | None:
    """What autograd gets for a weight [n] with its gradient in total [n]; None: it wants none."""
    if weight is None or total is None:
        return None
    return weight_gradient(weight, total, hasattr(weight, "main_grad"))
