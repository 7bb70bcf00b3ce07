"""The loss kernels in Triton, for CUDA and ROCm.

One program works on one token's row of logits, or on every num_splits-th block of its columns when
tokens are few; the statistics of a split are then just one more part of the vocabulary. A small
kernel joins the parts of all ranks for the loss; each program of the gradient does so for itself.
The maths and the bytes moved are in kernels/README.md.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.loss_options import LossOptions
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from sft_fast.kernels.masked_cross_entropy_operators import (
    define_gradient,
    define_losses,
    define_statistics,
)
from sft_fast.kernels.triton_launch import check_tensor, warp_size

SKIPS_MASKED_TOKENS = True

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
    logits_ptr,  # [width]
    columns,  # [BLOCK_COLUMNS]
    num_columns,
    width,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Logits of a block, [BLOCK_COLUMNS] fp32; -inf in columns that do not count."""
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
    """Statistics of one split of one token; program (token, split). Online softmax per lane.

    Source: Milakov & Gimelshein 2018, arXiv 1805.02867.
    """
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + token)
    if label == MASKED:
        return
    logits_ptr += token * row_stride
    # A lane is a group of neighbouring columns that one thread loads at once. Each keeps its own
    # maximum and sum, so that the loop holds no reduction across threads.
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
        group_max = tl.max(logits, 1)  # [LANES]
        new_max = tl.maximum(lane_max, group_max)  # [LANES]
        distance = lane_max - new_max  # [LANES]
        ratio = tl.exp2(distance * LOG2E)  # [LANES]
        # Not folded into one multiply-add: the rounding of m * log2 e would differ between parts.
        shifted = logits - new_max[:, None]  # [LANES, GROUP_COLUMNS]
        exponentials = tl.exp2(shifted * LOG2E)  # [LANES, GROUP_COLUMNS]
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
    num_tokens = tl.num_programs(0).to(tl.int64)
    statistics_ptr += split * (3 + WITH_LOGIT_SUM + 2 * WITH_OUTPUTS) * num_tokens + token
    tl.store(statistics_ptr, row_max)
    tl.store(statistics_ptr + num_tokens, row_sum)
    tl.store(statistics_ptr + 2 * num_tokens, target_logit)
    if WITH_LOGIT_SUM:
        tl.store(statistics_ptr + 3 * num_tokens, tl.sum(lane_logits, 0))
    if WITH_OUTPUTS:
        statistics_ptr += (3 + WITH_LOGIT_SUM) * num_tokens
        shifted_sum = (lane_weighted + lane_sum * (lane_max - row_max)) * lane_weight
        tl.store(statistics_ptr, tl.sum(shifted_sum, 0))
        candidates = tl.where(lane_max == row_max, lane_argmax, 1 << 30)
        argmax = vocab_start_index + tl.min(candidates, 0)
        tl.store(statistics_ptr + num_tokens, argmax.to(tl.float32))


@triton.jit
def masked_cross_entropy_loss_kernel(  # type: ignore[no-untyped-def]
    statistics_ptr,  # [num_parts, S, N] fp32
    num_parts,
    labels_ptr,  # [N] int64
    outputs_ptr,  # [1 or 4, N] fp32
    num_tokens,
    vocab_size,
    smoothing,
    z_loss,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_OUTPUTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Joins the parts of BLOCK_TOKENS tokens into their losses; program (block of tokens)."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_range = tokens < num_tokens
    label = tl.load(labels_ptr + tokens, mask=in_range, other=MASKED)  # [BLOCK_TOKENS]
    active = label != MASKED
    parts = tl.arange(0, BLOCK_PARTS)
    wanted = active[None, :] & (parts < num_parts)[:, None]  # [BLOCK_PARTS, BLOCK_TOKENS]
    # Not num_tokens.to(...): Triton makes an argument of 1 a Python number.
    stride = tl.full((), 0, tl.int64) + num_tokens
    part_stride = (3 + WITH_LOGIT_SUM + 2 * WITH_OUTPUTS) * stride
    statistics_ptr += parts[:, None] * part_stride + tokens[None, :]
    part_max = tl.load(statistics_ptr, mask=wanted, other=LOWEST)  # [BLOCK_PARTS, BLOCK_TOKENS]
    part_sum = tl.load(statistics_ptr + stride, mask=wanted, other=0.0)
    target_logit = tl.sum(tl.load(statistics_ptr + 2 * stride, mask=wanted, other=0.0), 0)
    row_max = tl.max(part_max, 0)  # [BLOCK_TOKENS]
    distance = part_max - row_max[None, :]  # [BLOCK_PARTS, BLOCK_TOKENS]
    part_weight = tl.exp2(distance * LOG2E)
    row_sum = tl.sum(part_sum * part_weight, 0)  # [BLOCK_TOKENS]
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
    outputs_ptr += tokens
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
    """Gradient of one split of one token's logits; program (token, split)."""
    token = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    step = tl.num_programs(1) * BLOCK_COLUMNS
    num_tokens = tl.num_programs(0).to(tl.int64)
    gradient_ptr += token * gradient_stride
    logits_ptr += token * row_stride
    dtype = gradient_ptr.dtype.element_ty
    label = tl.load(labels_ptr + token)
    if label == MASKED:
        zeros = tl.zeros([BLOCK_COLUMNS], dtype)
        for first in range(first_column, width, step):
            columns = first + tl.arange(0, BLOCK_COLUMNS)
            tl.store(gradient_ptr + columns, zeros, mask=columns < width)
        return

    parts = tl.arange(0, BLOCK_PARTS)
    statistics_ptr += parts * NUM_STATISTICS * num_tokens + token
    part_max = tl.load(statistics_ptr, mask=parts < num_parts, other=MINUS_INF)  # [BLOCK_PARTS]
    part_sum = tl.load(statistics_ptr + num_tokens, mask=parts < num_parts, other=0.0)
    row_max = tl.max(part_max, 0)
    row_sum = tl.sum(part_sum * tl.exp2((part_max - row_max) * LOG2E), 0)
    grad_loss = tl.load(grads_ptr + token)
    grad_logprob = tl.load(grads_ptr + num_tokens + token)
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
        gradient = tl.exp2((logits - row_max) * LOG2E) * scale - uniform_grad  # [BLOCK_COLUMNS]
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
    """How a [num_tokens, width] problem is cut into programs; the same on every rank."""

    block_columns: int
    num_splits: int
    num_warps: int

    @classmethod
    def for_shape(cls, num_tokens: int, width: int, warp_size: int) -> "LaunchConfig":
        """Chooses from the shape alone.

        A program holds 16 elements per thread in at most 16 warps: 1024 threads, the most there can
        be, where a warp is 64 wide (CDNA). On an H200 this is within 2 % of the best of 13 shapes
        in both directions (benchmarks/results/h200/tune_launch.txt); 4 to 32 warps of 16 or more
        elements per thread differ little, fewer elements per thread halve the speed. Tokens are cut
        until there are about 1024 programs, a few for each compute unit.
        """
        block_columns = min(8192, triton.next_power_of_2(width))
        num_warps = max(1, min(16, block_columns // (8 * warp_size)))
        num_blocks = triton.cdiv(width, block_columns)
        num_splits = max(1, min(num_blocks, 16, triton.cdiv(1024, max(1, num_tokens))))
        return cls(block_columns, num_splits, num_warps)

    def group_columns(self, dtype: torch.dtype) -> int:
        """Columns in a 16-byte load, whose maximum one thread finds by itself."""
        return min(self.block_columns, 16 // dtype.itemsize)


def launch_config(logits: Tensor) -> LaunchConfig:
    """How logits [N, width] are cut on this GPU."""
    return LaunchConfig.for_shape(logits.shape[0], logits.shape[1], warp_size(logits))


def check_logits(logits: Tensor) -> None:
    """Raises ValueError unless the kernels can take logits [N, width]."""
    check_tensor(logits, "logits", "loss.backend")
    assert logits.stride(1) == 1 or logits.shape[1] == 1


def num_splits(logits: Tensor) -> int:
    """Parts into which the kernels cut logits [N, width]."""
    return launch_config(logits).num_splits


def launch_statistics(
    statistics: Tensor,
    logits: Tensor,
    labels: Tensor,
    columns: VocabColumns,
    options: LossOptions,
    with_outputs: bool,
) -> None:
    """Writes statistics [num_splits, S, N] of logits [N, width]; padding is read, but not used."""
    check_logits(logits)
    config = launch_config(logits)
    num_tokens, width = logits.shape
    if num_tokens > 0:
        with torch.cuda.device_of(logits):
            masked_cross_entropy_fwd_kernel[(num_tokens, config.num_splits)](
                logits,
                logits.stride(0),
                labels.contiguous(),
                statistics,
                columns.vocab_start_index,
                columns.num_columns,
                width,
                options.logit_softcap,
                HAS_SOFTCAP=options.logit_softcap > 0,
                WITH_LOGIT_SUM=options.label_smoothing > 0,
                WITH_OUTPUTS=with_outputs,
                BLOCK_COLUMNS=config.block_columns,
                GROUP_COLUMNS=config.group_columns(logits.dtype),
                num_warps=config.num_warps,
            )


shard_statistics = define_statistics(
    "masked_cross_entropy_statistics", num_splits, launch_statistics
)

JOIN_WARPS = 4


def tokens_per_join(block_parts: int) -> int:
    """Tokens of a program of the loss kernel: a thread reads up to 8 numbers of a kind at once."""
    return max(1, min(128, 1024 // block_parts))


def launch_losses(
    outputs: Tensor,
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    options: LossOptions,
    with_outputs: bool,
) -> None:
    """Writes outputs [1 or 4, N], 0 at masked tokens, from statistics [num_parts, S, N]."""
    num_parts, _, num_tokens = statistics.shape
    if num_tokens > 0:
        block_parts = triton.next_power_of_2(num_parts)
        block_tokens = tokens_per_join(block_parts)
        with torch.cuda.device_of(statistics):
            masked_cross_entropy_loss_kernel[(triton.cdiv(num_tokens, block_tokens),)](
                statistics.contiguous(),
                num_parts,
                labels.contiguous(),
                outputs,
                num_tokens,
                vocab_size,
                options.label_smoothing,
                options.z_loss,
                WITH_LOGIT_SUM=options.label_smoothing > 0,
                WITH_OUTPUTS=with_outputs,
                BLOCK_PARTS=block_parts,
                BLOCK_TOKENS=block_tokens,
                num_warps=JOIN_WARPS,
            )


token_losses = define_losses("masked_cross_entropy_losses", launch_losses)


def launch_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    columns: VocabColumns,
    options: LossOptions,
) -> None:
    """Writes gradient [N, width], which may be the logits, from grads [2, N] and statistics."""
    check_logits(logits)
    config = launch_config(logits)
    num_tokens, width = logits.shape
    if num_tokens > 0:
        with torch.cuda.device_of(logits):
            masked_cross_entropy_bwd_kernel[(num_tokens, config.num_splits)](
                gradient,
                gradient.stride(0),
                logits,
                logits.stride(0),
                labels.contiguous(),
                statistics.contiguous(),
                len(statistics),
                grads.contiguous(),
                columns.vocab_start_index,
                columns.num_columns,
                width,
                options.label_smoothing,
                options.label_smoothing / columns.vocab_size,
                options.z_loss,
                options.logit_softcap,
                HAS_SOFTCAP=options.logit_softcap > 0,
                NUM_STATISTICS=statistics.shape[1],
                BLOCK_PARTS=triton.next_power_of_2(len(statistics)),
                BLOCK_COLUMNS=config.block_columns,
                num_warps=config.num_warps,
            )


write_gradient = define_gradient("masked_cross_entropy_gradient", launch_gradient)
