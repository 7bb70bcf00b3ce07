"""Packing on the CPU. Every function releases the GIL and raises ValueError."""

import numpy as np
from numpy.typing import NDArray

Plan = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32]]

STRATEGIES: tuple[str, ...]

def plan(
    strategy: str,
    lengths: NDArray[np.int32],
    capacity: int,
    seed: int,
    epoch: int,
    *,
    alignment: int = 1,
    max_samples: int = 0,
    pool_size: int = 1000,
) -> Plan: ...
def bin_order(count: int, seed: int, epoch: int) -> NDArray[np.uint32]: ...
def sample_order(count: int, seed: int, epoch: int) -> NDArray[np.uint32]: ...

class StreamPacker:
    def __init__(
        self,
        capacity: int,
        seed: int,
        *,
        alignment: int = 1,
        max_samples: int = 0,
        pool_size: int = 1000,
        num_draws: int = 0,
    ) -> None: ...
    @property
    def num_draws(self) -> int: ...
    def add(self, id: int, length: int) -> None: ...
    def needs_more(self) -> bool: ...
    def take_bin(self) -> NDArray[np.int64]: ...
    def ids(self) -> NDArray[np.int64]: ...

def fill_micro_batch(
    store_tokens: NDArray[np.uint32],
    supervised_bits: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    ignore_index: int,
    tokens: NDArray[np.int64] | NDArray[np.int32],
    labels: NDArray[np.int64] | NDArray[np.int32],
    position_ids: NDArray[np.int64] | NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
    active_tokens: NDArray[np.int64],
    *,
    token_weights: NDArray[np.uint16] | None = None,
    weights: NDArray[np.float32] | None = None,
    alignment: int = 1,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> tuple[int, int, int]: ...
def count_targets(
    store_tokens: NDArray[np.uint32],
    supervised_bits: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    token_weights: NDArray[np.uint16] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]: ...
