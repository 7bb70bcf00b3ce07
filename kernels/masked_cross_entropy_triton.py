"""The loss kernels in Triton, for CUDA and ROCm.

One program works on one row, or on every num_splits-th block of its columns when rows are few; the
statistics of a split are then just one more part of the vocabulary. A small kernel joins the parts
of all ranks for the loss; each program of the gradient does so for itself. The maths and the bytes
moved are in kernels/README.md.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.triton_launch import check_tensor, warp_size

SKIPS_MASKED_ROWS = True

MASKED = tl.constexpr(IGNORE_INDEX)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
MINUS_INF = tl.constexpr(-float("inf"))


@triton.jit
def cap(logits, softcap):  # type: ignore[no-untyped-def]
    """softcap * tanh(logits / softcap), from an exponential that cannot overflow."""
    small = tl.exp2(tl.abs(logits) * (-2.0 * LOG2E / softcap))
    magnitude = softcap * ((1.0 - small) / (1.0 + small))
    return tl.where(logits < 0, -magnitude, magnitude)


@triton.jit
def load_block(  # type: ignore[no-untyped-def]
    logits_ptr,
    columns,
    num_columns,
    width,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Logits of a block as fp32; -inf in columns that do not count."""
    if IS_WHOLE:
        logits = tl.load(logits_ptr + columns).to(tl.float32)
    else:
        # Bounded by the width, which unlike num_columns is even: odd bounds make narrow loads.
        logits = tl.load(logits_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        logits = cap(logits, softcap)
    if not IS_WHOLE:
        logits = tl.where(columns < num_columns, logits, MINUS_INF)
    return logits


@triton.jit
def masked_cross_entropy_fwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [N, width]
    row_stride,
    labels_ptr,  # [N] int64
    statistics_ptr,  # [num_splits, S, N] fp32
    vocab_start_index,
    num_columns,
    width,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + row)
    if label == MASKED:
        return
    logits_ptr += row * row_stride
    # A lane is a group of neighbouring columns that one thread loads at once.
    LANES: tl.constexpr = BLOCK_COLUMNS // GROUP_COLUMNS
    # The lowest finite number instead of -inf: subtracting it from -inf does not give NaN.
    lane_max = tl.full([LANES], LOWEST, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_logits = tl.zeros([LANES], tl.float32)
    lane_weighted = tl.zeros([LANES], tl.float32)
    lane_argmax = tl.full([LANES], split * BLOCK_COLUMNS, tl.int32)
    step = tl.num_programs(1) * BLOCK_COLUMNS
    for first in range(split * BLOCK_COLUMNS, width, step):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        if first + BLOCK_COLUMNS <= num_columns:
            logits = load_block(logits_ptr, columns, num_columns, width, softcap, HAS_SOFTCAP, True)
        else:
            logits = load_block(
                logits_ptr, columns, num_columns, width, softcap, HAS_SOFTCAP, False
            )
        logits = tl.reshape(logits, [LANES, GROUP_COLUMNS])
        group_max = tl.max(logits, 1)
        new_max = tl.maximum(lane_max, group_max)
        distance = lane_max - new_max
        ratio = tl.exp2(distance * LOG2E)
        shifted = logits - new_max[:, None]
        exponentials = tl.exp2(shifted * LOG2E)
        if WITH_LOGIT_SUM:
            finite = tl.reshape(columns, [LANES, GROUP_COLUMNS]) < num_columns
            lane_logits += tl.sum(tl.where(finite, logits, 0.0), 1)
        if WITH_OUTPUTS:
            # Clamped, because exp(-inf) * -inf is NaN where it should add nothing.
            clamped = tl.where(shifted < LOWEST, LOWEST, shifted)
            lane_weighted = (lane_weighted + lane_sum * distance) * ratio
            lane_weighted += tl.sum(exponentials * clamped, 1)
            is_largest = logits == group_max[:, None]
            candidates = tl.where(is_largest, tl.reshape(columns, logits.shape), 1 << 30)
            lane_argmax = tl.where(group_max > lane_max, tl.min(candidates, 1), lane_argmax)
        lane_sum = lane_sum * ratio + tl.sum(exponentials, 1)
        lane_max = new_max

    row_max = tl.max(lane_max, 0)
    lane_weight = tl.exp2((lane_max - row_max) * LOG2E)
    row_sum = tl.sum(lane_sum * lane_weight, 0)
    target = label - vocab_start_index
    owned = (split == 0) & (target >= 0) & (target < num_columns)
    target_logit = tl.load(logits_ptr + target, mask=owned, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        target_logit = cap(target_logit, softcap)
    num_rows = tl.num_programs(0).to(tl.int64)
    statistics_ptr += split * (3 + WITH_LOGIT_SUM + 2 * WITH_OUTPUTS) * num_rows + row
    tl.store(statistics_ptr, row_max)
    tl.store(statistics_ptr + num_rows, row_sum)
    tl.store(statistics_ptr + 2 * num_rows, target_logit)
    if WITH_LOGIT_SUM:
        tl.store(statistics_ptr + 3 * num_rows, tl.sum(lane_logits, 0))
    if WITH_OUTPUTS:
        statistics_ptr += (3 + WITH_LOGIT_SUM) * num_rows
        shifted_sum = (lane_weighted + lane_sum * (lane_max - row_max)) * lane_weight
        tl.store(statistics_ptr, tl.sum(shifted_sum, 0))
        candidates = tl.where(lane_max == row_max, lane_argmax, 1 << 30)
        argmax = vocab_start_index + tl.min(candidates, 0)
        tl.store(statistics_ptr + num_rows, argmax.to(tl.float32))


@triton.jit
def masked_cross_entropy_loss_kernel(  # type: ignore[no-untyped-def]
    statistics_ptr,  # [num_parts, S, N] fp32
    num_parts,
    labels_ptr,  # [N] int64
    outputs_ptr,  # [1 or 4, N] fp32
    num_rows,
    vocab_size,
    smoothing,
    z_loss,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_OUTPUTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_range = rows < num_rows
    label = tl.load(labels_ptr + rows, mask=in_range, other=MASKED)
    active = label != MASKED
    parts = tl.arange(0, BLOCK_PARTS)
    wanted = active[None, :] & (parts < num_parts)[:, None]
    # Not num_rows.to(...): Triton makes an argument of 1 a Python number.
    stride = tl.full((), 0, tl.int64) + num_rows
    part_stride = (3 + WITH_LOGIT_SUM + 2 * WITH_OUTPUTS) * stride
    statistics_ptr += parts[:, None] * part_stride + rows[None, :]
    part_max = tl.load(statistics_ptr, mask=wanted, other=LOWEST)
    part_sum = tl.load(statistics_ptr + stride, mask=wanted, other=0.0)
    target_logit = tl.sum(tl.load(statistics_ptr + 2 * stride, mask=wanted, other=0.0), 0)
    row_max = tl.max(part_max, 0)
    distance = part_max - row_max[None, :]
    part_weight = tl.exp2(distance * LOG2E)
    row_sum = tl.sum(part_sum * part_weight, 0)
    log_sum = tl.log(row_sum)
    logprob = (target_logit - row_max) - log_sum
    logprob = tl.where((label >= 0) & (label < vocab_size), logprob, float("nan"))
    loss = -logprob
    if WITH_LOGIT_SUM:
        logit_sum = tl.sum(tl.load(statistics_ptr + 3 * stride, mask=wanted, other=0.0), 0)
        mean_logprob = (logit_sum / vocab_size - row_max) - log_sum
        loss = (1.0 - smoothing) * loss - smoothing * mean_logprob
    # z_loss 0 must not turn an infinite lse into NaN.
    lse = row_max + log_sum
    loss = tl.where(z_loss > 0, loss + z_loss * lse * lse, loss)
    outputs_ptr += rows
    tl.store(outputs_ptr, tl.where(active, loss, 0.0), mask=in_range)
    if WITH_OUTPUTS:
        statistics_ptr += (3 + WITH_LOGIT_SUM) * stride
        weighted = tl.load(statistics_ptr, mask=wanted, other=0.0)
        argmax = tl.load(statistics_ptr + stride, mask=wanted, other=0.0)
        # Clamped, because 0 * -inf is NaN where it should add nothing.
        distance = tl.where(distance < LOWEST, LOWEST, distance)
        shifted_sum = tl.sum((weighted + part_sum * distance) * part_weight, 0)
        entropy = log_sum - shifted_sum / row_sum
        argmax = tl.min(tl.where(part_max == row_max[None, :], argmax, float("inf")), 0)
        correct = argmax == label.to(tl.float32)
        tl.store(outputs_ptr + stride, tl.where(active, logprob, 0.0), mask=in_range)
        tl.store(outputs_ptr + 2 * stride, tl.where(active, entropy, 0.0), mask=in_range)
        correct = tl.where(active & correct, 1.0, 0.0)
        tl.store(outputs_ptr + 3 * stride, correct, mask=in_range)


@triton.jit
def masked_cross_entropy_bwd_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,  # [N, width], may be logits_ptr
    gradient_stride,
    logits_ptr,  # [N, width]
    row_stride,
    labels_ptr,  # [N] int64
    statistics_ptr,  # [num_parts, S, N] fp32
    num_parts,
    grads_ptr,  # [2, N] fp32
    vocab_start_index,
    num_columns,
    width,
    smoothing,
    uniform,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    NUM_STATISTICS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    step = tl.num_programs(1) * BLOCK_COLUMNS
    num_rows = tl.num_programs(0).to(tl.int64)
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
    statistics_ptr += parts * NUM_STATISTICS * num_rows + row
    part_max = tl.load(statistics_ptr, mask=parts < num_parts, other=MINUS_INF)
    part_sum = tl.load(statistics_ptr + num_rows, mask=parts < num_parts, other=0.0)
    row_max = tl.max(part_max, 0)
    row_sum = tl.sum(part_sum * tl.exp2((part_max - row_max) * LOG2E), 0)
    grad_loss = tl.load(grads_ptr + row)
    grad_logprob = tl.load(grads_ptr + num_rows + row)
    lse = row_max + tl.log(row_sum)
    # z_loss 0 must not turn an infinite lse into NaN.
    grad_lse = tl.where(z_loss > 0, grad_loss * (1.0 + 2.0 * z_loss * lse), grad_loss)
    scale = (grad_lse - grad_logprob) / row_sum
    target_grad = grad_logprob - (1.0 - smoothing) * grad_loss
    uniform_grad = uniform * grad_loss
    target = label - vocab_start_index
    # Before it is cut to 32 bits, which could make another rank's label one of these columns.
    target = tl.where((target >= 0) & (target < num_columns), target, -1).to(tl.int32)
    for first in range(first_column, width, step):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        is_whole = first + BLOCK_COLUMNS <= num_columns
        if is_whole:
            logits = load_block(logits_ptr, columns, num_columns, width, softcap, HAS_SOFTCAP, True)
        else:
            logits = load_block(
                logits_ptr, columns, num_columns, width, softcap, HAS_SOFTCAP, False
            )
        gradient = tl.exp2((logits - row_max) * LOG2E) * scale - uniform_grad
        # Before the rounding to 16 bits: after it, probability - 1 would be mostly rounding error.
        gradient = tl.where(columns == target, gradient + target_grad, gradient)
        if HAS_SOFTCAP:
            gradient *= 1.0 - (logits / softcap) * (logits / softcap)
        if is_whole:
            tl.store(gradient_ptr + columns, gradient.to(dtype))
        else:
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

        A program holds 16 elements per thread in at most 16 warps: 1024 threads, the most there can
        be, where a warp is 64 wide (CDNA). On an H200 this is within 2 % of the best of 13 shapes
        in both directions (benchmarks/results/h200/tune_launch.txt); 4 to 32 warps of 16 or more
        elements per thread differ little, fewer elements per thread halve the speed. Rows are split
        until there are about 1024 programs, a few for each compute unit.
        """
        block_columns = min(8192, triton.next_power_of_2(width))
        num_warps = max(1, min(16, block_columns // (8 * warp_size)))
        num_blocks = triton.cdiv(width, block_columns)
        num_splits = max(1, min(num_blocks, 16, triton.cdiv(1024, max(1, num_rows))))
        return cls(block_columns, num_splits, num_warps)

    def group_columns(self, dtype: torch.dtype) -> int:
        """Columns in a 16-byte load, whose maximum one thread finds by itself."""
        return min(self.block_columns, 16 // dtype.itemsize)


def launch_config(logits: Tensor) -> LaunchConfig:
    return LaunchConfig.for_shape(logits.shape[0], logits.shape[1], warp_size(logits))


def check_logits(logits: Tensor) -> None:
    check_tensor(logits, "logits", "loss.backend")
    assert logits.stride(1) == 1 or logits.shape[1] == 1


@torch.library.custom_op("sft_fast::masked_cross_entropy_statistics", mutates_args=())
def shard_statistics(
    logits: Tensor,
    labels: Tensor,
    vocab_start_index: int,
    num_columns: int,
    softcap: float,
    with_logit_sum: bool,
    with_outputs: bool,
) -> Tensor:
    """Statistics of one vocabulary shard, without those of masked rows, which are not written.

    Arguments and meaning as in masked_cross_entropy_torch, but: logits bf16, fp16 or fp32 with
    last stride 1, padding columns read though not used; labels may be IGNORE_INDEX; the lowest
    finite number stands in place of a maximum of -inf.

    Returns:
        [num_splits, S, N] fp32, each split a part of the vocabulary.
    """
    check_logits(logits)
    config = launch_config(logits)
    num_rows, width = logits.shape
    statistics = new_statistics(logits, with_logit_sum, with_outputs)
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
                softcap,
                HAS_SOFTCAP=softcap > 0,
                WITH_LOGIT_SUM=with_logit_sum,
                WITH_OUTPUTS=with_outputs,
                BLOCK_COLUMNS=config.block_columns,
                GROUP_COLUMNS=config.group_columns(logits.dtype),
                num_warps=config.num_warps,
            )
    return statistics


def new_statistics(logits: Tensor, with_logit_sum: bool, with_outputs: bool) -> Tensor:
    """Empty fp32 [splits, S, N]."""
    count = 3 + with_logit_sum + 2 * with_outputs
    shape = (launch_config(logits).num_splits, count, logits.shape[0])
    return logits.new_empty(shape, dtype=torch.float32)


@shard_statistics.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    vocab_start_index: int,
    num_columns: int,
    softcap: float,
    with_logit_sum: bool,
    with_outputs: bool,
) -> Tensor:
    return new_statistics(logits, with_logit_sum, with_outputs)


JOIN_WARPS = 4


def rows_per_join(block_parts: int) -> int:
    """Rows of a program of the loss kernel: a thread reads up to 8 numbers of a kind at once."""
    return max(1, min(128, 1024 // block_parts))


@torch.library.custom_op("sft_fast::masked_cross_entropy_losses", mutates_args=())
def row_losses(
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_outputs: bool,
) -> Tensor:
    """Joins the statistics of all parts of the vocabulary into the loss of each row.

    Arguments and result as in masked_cross_entropy_torch, but: labels may be IGNORE_INDEX: the
    statistics of such rows are not read, and all their results are 0.
    """
    outputs = new_outputs(statistics, with_outputs)
    num_parts, _, num_rows = statistics.shape
    if num_rows > 0:
        block_parts = triton.next_power_of_2(num_parts)
        block_rows = rows_per_join(block_parts)
        with torch.cuda.device_of(statistics):
            masked_cross_entropy_loss_kernel[(triton.cdiv(num_rows, block_rows),)](
                statistics.contiguous(),
                num_parts,
                labels.contiguous(),
                outputs,
                num_rows,
                vocab_size,
                label_smoothing,
                z_loss,
                WITH_LOGIT_SUM=label_smoothing > 0,
                WITH_OUTPUTS=with_outputs,
                BLOCK_PARTS=block_parts,
                BLOCK_ROWS=block_rows,
                num_warps=JOIN_WARPS,
            )
    return outputs


def new_outputs(statistics: Tensor, with_outputs: bool) -> Tensor:
    """Empty fp32 [1 or 4, N]."""
    return statistics.new_empty((4 if with_outputs else 1, statistics.shape[2]))


@row_losses.register_fake
def _(
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_outputs: bool,
) -> Tensor:
    return new_outputs(statistics, with_outputs)


@torch.library.custom_op("sft_fast::masked_cross_entropy_gradient", mutates_args=("gradient",))
def write_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    vocab_start_index: int,
    num_columns: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Writes the gradient of sum(grads[0] * loss + grads[1] * logprob) with respect to logits.

    Arguments as in masked_cross_entropy_torch, but: last stride 1; labels may be IGNORE_INDEX:
    such rows are not read, and get 0.
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
                grads.contiguous(),
                vocab_start_index,
                num_columns,
                width,
                label_smoothing,
                label_smoothing / vocab_size,
                z_loss,
                softcap,
                HAS_SOFTCAP=softcap > 0,
                NUM_STATISTICS=statistics.shape[1],
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
    grads: Tensor,
    vocab_start_index: int,
    num_columns: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    return None
