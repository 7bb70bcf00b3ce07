"""Packing on the CPU. Every function releases the GIL and raises ValueError."""

import numpy as np
from numpy.typing import NDArray

def plan_best_fit_decreasing(
    lengths: NDArray[np.int32], capacity: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]: ...
def plan_one_per_bin(
    lengths: NDArray[np.int32], capacity: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]: ...
def fill_micro_batch(
    store_tokens: NDArray[np.uint32],
    supervised_bits: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    *,
    ignore_index: int,
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
    position_ids: NDArray[np.int64],
    cu_seqlens: NDArray[np.int32],
    active_rows: NDArray[np.int64],
) -> tuple[int, int, int]: ...
