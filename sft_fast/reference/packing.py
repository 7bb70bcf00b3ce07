"""What sft_fast._C computes, written to be checked by eye."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_fast.constants import IGNORE_INDEX


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs samples from long to short, each into the fullest bin that has room for it.

    Args:
        lengths: tokens per sample, each in [1, capacity].
        capacity: tokens per bin.

    Returns:
        Bins as lists of sample ids.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT 1973.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if free[b] >= lengths[sample]]
        if fitting:
            best = min(fitting, key=lambda b: free[b])
        else:
            best = len(bins)
            bins.append([])
            free.append(capacity)
        bins[best].append(sample)
        free[best] -= lengths[sample]
    return bins


class FilledRow(NamedTuple):
    """The arrays of one micro-batch; shapes and dtypes as in `sft_fast.batch.MicroBatch`."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    active_rows: NDArray[np.int64]


def fill_row(
    store_tokens: NDArray[np.uint32],
    supervised_bits: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    sample_ids: Sequence[int],
    num_rows: int,
) -> FilledRow:
    """Concatenates samples and pads to `num_rows`.

    Args:
        store_tokens: uint32 [total].
        supervised_bits: uint8 [ceil(total / 8)], little-endian bits; 1 = token is a target.
        offsets: int64 [num_samples + 1].
        sample_ids: the samples of the row, in order.
        num_rows: length of the row, at least the samples' total.
    """
    supervised = np.unpackbits(supervised_bits, bitorder="little").astype(bool)
    tokens, labels, position_ids, lengths = [], [], [], [0]
    for sample in sample_ids:
        span = slice(offsets[sample], offsets[sample + 1])
        sample_tokens = store_tokens[span].astype(np.int64)
        targets = np.where(supervised[span], sample_tokens, IGNORE_INDEX)
        tokens.append(sample_tokens)
        labels.append(np.append(targets[1:], IGNORE_INDEX))
        position_ids.append(np.arange(len(sample_tokens)))
        lengths.append(len(sample_tokens))
    padding = num_rows - sum(lengths)
    row_labels = np.concatenate([*labels, np.full(padding, IGNORE_INDEX)]).astype(np.int64)
    zeros = np.zeros(padding)
    return FilledRow(
        tokens=np.concatenate([*tokens, zeros]).astype(np.int64),
        labels=row_labels,
        position_ids=np.concatenate([*position_ids, zeros]).astype(np.int64),
        cu_seqlens=np.cumsum(lengths, dtype=np.int32),
        active_rows=np.flatnonzero(row_labels != IGNORE_INDEX),
    )
