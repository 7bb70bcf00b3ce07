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


def make_store(lengths: list[int], supervised: list[bool], seed: int = 0) -> ArrayStore:
    """A store of random ids over the full uint32 range."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, offsets[-1], dtype=np.uint32)
    bits = np.packbits(np.array(supervised, dtype=bool), bitorder="little")
    return ArrayStore(tokens, bits, offsets)
