"""The loss kernels in Triton, for CUDA and ROCm.

One program works on one row, or on every num_splits-th block of its columns when rows are few; the
statistics of a split are then just one more part of the vocabulary, merged with those of the other
ranks. The maths and the bytes moved are in kernels/README.md.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX

SKIPS_MASKED_ROWS = True

MASKED = tl.constexpr(IGNORE_INDEX)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
MINUS_INF = tl.constexpr(-float("inf"))


@triton.jit
def masked_cross_entropy_fwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [N, width]
    row_stride,
    labels_ptr,  # [N] int64
    statistics_ptr,  # [num_splits, 3, N] fp32
    vocab_start_index,
    num_columns,
    width,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + row)
    if label == MASKED:
        return
    logits_ptr += row * row_stride
    # The lowest finite number instead of -inf: subtracting it from -inf does not give NaN.
    lane_max = tl.full([BLOCK_COLUMNS], LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for first in range(split * BLOCK_COLUMNS, width, tl.num_programs(1) * BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        # Bounded by the width, which unlike num_columns is even: odd bounds make narrow loads.
        logits = tl.load(logits_ptr + columns, mask=columns < width, other=MINUS_INF)
        logits = tl.where(columns < num_columns, logits.to(tl.float32), MINUS_INF)
        difference = logits - lane_max
        # One exponential serves both cases: the other factor is exp(0).
        ratio = tl.exp2(-tl.abs(difference) * LOG2E)
        is_larger = difference > 0
        lane_sum = tl.where(is_larger, lane_sum * ratio + 1.0, lane_sum + ratio)
        lane_max = tl.where(is_larger, logits, lane_max)

    row_max = tl.max(lane_max, 0)
    row_sum = tl.sum(lane_sum * tl.exp2((lane_max - row_max) * LOG2E), 0)
    target = label - vocab_start_index
    owned = (split == 0) & (target >= 0) & (target < num_columns)
    target_logit = tl.load(logits_ptr + target, mask=owned, other=0.0).to(tl.float32)
    num_rows = tl.num_programs(0)
    statistics_ptr += split * 3 * num_rows + row
    tl.store(statistics_ptr, row_max)
    tl.store(statistics_ptr + num_rows, row_sum)
    tl.store(statistics_ptr + 2 * num_rows, target_logit)


@triton.jit
def masked_cross_entropy_bwd_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,  # [N, width], may be logits_ptr
    gradient_stride,
    logits_ptr,  # [N, width]
    row_stride,
    labels_ptr,  # [N] int64
    statistics_ptr,  # [num_parts, 3, N] fp32
    num_parts,
    grad_loss_ptr,  # [N] fp32
    vocab_start_index,
    num_columns,
    width,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    step = tl.num_programs(1) * BLOCK_COLUMNS
    num_rows = tl.num_programs(0)
    gradient_ptr += row * gradient_stride
    logits_ptr += row * row_stride
    dtype = gradient_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    if label == MASKED:
        zeros = tl.zeros([BLOCK_COLUMNS], dtype)
        for first in range(first_column, width, step):
            columns = first + tl.arange(0, BLOCK_COLUMNS)
            tl.store(gradient_ptr + columns, zeros, mask=columns < width)
        return

    parts = tl.arange(0, BLOCK_PARTS)
    statistics_ptr += parts * 3 * num_rows + row
    part_max = tl.load(statistics_ptr, mask=parts < num_parts, other=MINUS_INF)
    part_sum = tl.load(statistics_ptr + num_rows, mask=parts < num_parts, other=0.0)
    row_max = tl.max(part_max, 0)
    row_sum = tl.sum(part_sum * tl.exp2((part_max - row_max) * LOG2E), 0)
    grad_loss = tl.load(grad_loss_ptr + row)
    scale = grad_loss / row_sum
    target = (label - vocab_start_index).to(tl.int32)
    for first in range(first_column, width, step):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        logits = tl.load(logits_ptr + columns, mask=columns < width, other=MINUS_INF)
        gradient = tl.exp2((logits.to(tl.float32) - row_max) * LOG2E) * scale
        # Before the rounding to 16 bits: after it, probability - 1 would be mostly rounding error.
        gradient = tl.where(columns == target, gradient - grad_loss, gradient)
        gradient = tl.where(columns < num_columns, gradient, 0.0)
        tl.store(gradient_ptr + columns, gradient.to(dtype), mask=columns < width)


@dataclass(frozen=True)
class LaunchConfig:
    """How a [num_rows, width] problem is cut into programs; the same on every rank."""

    block_columns: int
    num_splits: int
    num_warps: int

    @classmethod
    def for_shape(cls, num_rows: int, width: int, warp_size: int) -> "LaunchConfig":
        """Chooses from the shape alone.

        A program holds 8 elements per thread (a 16-byte load of 16-bit logits) or a multiple, in
        at most 16 warps: 1024 threads, the most there can be, where a warp is 64 wide (CDNA). Rows
        are split until there are about 1024 programs, a few for each compute unit.
        """
        block_columns = min(8192, triton.next_power_of_2(width))
        num_warps = max(1, min(16, block_columns // (8 * warp_size)))
        num_blocks = triton.cdiv(width, block_columns)
        num_splits = max(1, min(num_blocks, 16, triton.cdiv(1024, max(1, num_rows))))
        return cls(block_columns, num_splits, num_warps)


def launch_config(logits: Tensor) -> LaunchConfig:
    warp_size = 32
    if logits.is_cuda:
        warp_size = triton.runtime.driver.active.get_current_target().warp_size
    return LaunchConfig.for_shape(logits.shape[0], logits.shape[1], warp_size)


def check_logits(logits: Tensor) -> None:
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"loss.backend triton: logits are {logits.dtype}, expected bfloat16, float16 or "
            "float32; choose 'torch'"
        )
    if logits.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("loss.backend triton: logits are on the CPU; choose 'torch' or 'auto'")
    assert logits.stride(1) == 1 or logits.shape[1] == 1


@torch.library.custom_op("sft_fast::masked_cross_entropy_statistics", mutates_args=())
def shard_statistics(
    logits: Tensor, labels: Tensor, vocab_start_index: int, num_columns: int
) -> Tensor:
    """Statistics of one vocabulary shard, without those of masked rows, which are not written.

    Args:
        logits: [N, >= num_columns] bf16, fp16 or fp32, last stride 1; read once.
        labels: [N] int64 global ids, or IGNORE_INDEX.
        vocab_start_index: global id of column 0.
        num_columns: columns that count; those after them are padding, read but not used.

    Returns:
        [num_splits, 3, N] fp32: row maximum (the lowest finite number in place of -inf), sum
        of exp(logit - maximum), and the logit at the label, 0 where another part holds it.
    """
    check_logits(logits)
    config = launch_config(logits)
    num_rows, width = logits.shape
    statistics = logits.new_empty((config.num_splits, 3, num_rows), dtype=torch.float32)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            masked_cross_entropy_fwd_kernel[(num_rows, config.num_splits)](
                logits,
                logits.stride(0),
                labels.contiguous(),
                statistics,
                vocab_start_index,
                num_columns,
                width,
                BLOCK_COLUMNS=config.block_columns,
                num_warps=config.num_warps,
            )
    return statistics


@shard_statistics.register_fake
def _(logits: Tensor, labels: Tensor, vocab_start_index: int, num_columns: int) -> Tensor:
    num_splits = launch_config(logits).num_splits
    return logits.new_empty((num_splits, 3, logits.shape[0]), dtype=torch.float32)


@torch.library.custom_op("sft_fast::masked_cross_entropy_gradient", mutates_args=("gradient",))
def write_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grad_loss: Tensor,
    vocab_start_index: int,
    num_columns: int,
) -> None:
    """Writes the gradient of sum(grad_loss * loss) with respect to logits.

    Args:
        gradient: [N, >= num_columns], dtype of logits, last stride 1; may be logits itself.
            Masked rows and padding columns get 0.
        logits: [N, >= num_columns]; masked rows are not read.
        labels: [N] int64 global ids, or IGNORE_INDEX.
        statistics: [num_parts, 3, N] fp32, the shard statistics of every part of the vocabulary.
        grad_loss: [N] fp32.
        vocab_start_index: global id of column 0.
        num_columns: columns that count; those after them are padding.
    """
    check_logits(logits)
    config = launch_config(logits)
    num_rows, width = logits.shape
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            masked_cross_entropy_bwd_kernel[(num_rows, config.num_splits)](
                gradient,
                gradient.stride(0),
                logits,
                logits.stride(0),
                labels.contiguous(),
                statistics.contiguous(),
                len(statistics),
                grad_loss.contiguous(),
                vocab_start_index,
                num_columns,
                width,
                BLOCK_PARTS=triton.next_power_of_2(len(statistics)),
                BLOCK_COLUMNS=config.block_columns,
                num_warps=config.num_warps,
            )


@write_gradient.register_fake
def _(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grad_loss: Tensor,
    vocab_start_index: int,
    num_columns: int,
) -> None:
    return None
