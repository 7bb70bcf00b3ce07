"""How copies of tokens move to their experts and back, in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft_fast.kernels.triton_launch import LAYER_KEY, check_tensor, warp_size

MAX_COLUMNS = 2048


@triton.jit
def scatter_copies_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,  # [R, width]
    x_ptr,  # [T, width]
    places_ptr,  # [T, NUM_COPIES] int32
    width,
    NUM_COPIES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A program reads a part of a token and writes it to each of its places."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = columns < width
    x = tl.load(x_ptr + token * width + columns, mask=in_width)
    for number in tl.static_range(NUM_COPIES):
        place = tl.load(places_ptr + token * NUM_COPIES + number).to(tl.int64)
        tl.store(rows_ptr + place * width + columns, x, mask=in_width)


@triton.jit
def sum_copies_kernel(  # type: ignore[no-untyped-def]
    sums_ptr,  # [T, width]
    rows_ptr,  # [R, width]
    places_ptr,  # [T, NUM_COPIES] int32
    width,
    NUM_COPIES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A program adds up a part of a token's copies, in their order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = columns < width
    sums = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for number in tl.static_range(NUM_COPIES):
        place = tl.load(places_ptr + token * NUM_COPIES + number).to(tl.int64)
        sums += tl.load(rows_ptr + place * width + columns, mask=in_width).to(tl.float32)
    tl.store(sums_ptr + token * width + columns, sums.to(sums_ptr.dtype.element_ty), mask=in_width)


def launch_options(width: int, warp_size: int) -> dict[str, int]:
    """At most MAX_COLUMNS of a program, 8 elements a thread: 16 bytes of 16-bit ones."""
    block = int(min(MAX_COLUMNS, triton.next_power_of_2(width)))
    return {"BLOCK_COLUMNS": block, "num_warps": max(1, block // (8 * warp_size))}


def scatter_copies(x: Tensor, places: Tensor) -> Tensor:
    """[R, n] of x [T, n], as expert_copies_torch.scatter_copies."""
    check_tensor(x, "tokens", LAYER_KEY)
    rows = x.new_empty((places.numel(), x.shape[1]))
    launch(scatter_copies_kernel, rows, x.contiguous(), places)
    return rows


def sum_copies(rows: Tensor, places: Tensor) -> Tensor:
    """[T, n] of rows [R, n], as expert_copies_torch.sum_copies."""
    check_tensor(rows, "copies of tokens", LAYER_KEY)
    sums = rows.new_empty((len(places), rows.shape[1]))
    launch(sum_copies_kernel, sums, rows.contiguous(), places)
    return sums


def launch(kernel: Any, target: Tensor, source: Tensor, places: Tensor) -> None:
    """Runs one of the kernels, a program for each token and block of columns.

    Args:
        kernel: one of the above.
        target: [R, n] or [T, n].
        source: [T, n] or [R, n], contiguous.
        places: [T, k] int32.
    """
    (num_tokens, num_copies), width = places.shape, source.shape[1]
    if num_tokens == 0:
        return
    options = launch_options(width, warp_size(source))
    grid = num_tokens, triton.cdiv(width, options["BLOCK_COLUMNS"])
    with torch.cuda.device_of(source):
        kernel[grid](target, source, places, width, NUM_COPIES=num_copies, **options)
