"""Token stores in memory, with random ids."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 2**32


@dataclass
class ArrayStore:
    """A token store in memory."""

    tokens: NDArray[np.uint32]
    supervised_bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float16] | None = None


def make_store(
    lengths: list[int], supervised: list[bool], seed: int = 0, has_weights: bool = False
) -> ArrayStore:
    """A store of random ids over the full uint32 range, and random weights from 0.5 to 1.5."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, offsets[-1], dtype=np.uint32)
    bits = np.packbits(np.array(supervised, dtype=bool), bitorder="little")
    weights = None
    if has_weights:
        weights = np.random.default_rng(seed + 1).random(offsets[-1]).astype(
            np.float16
        ) + np.float16(0.5)
    return ArrayStore(tokens, bits, offsets, weights)
