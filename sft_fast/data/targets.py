"""The arrays of a token store, and what is computed of them: targets and hashes of samples."""

from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_fast import _C


class StoredTokens(Protocol):
    """The arrays of a token store, on disk or in memory."""

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """uint32 [total]."""

    @property
    def supervised_bits(self) -> NDArray[np.uint8]:
        """uint8 [ceil(total / 8)], little-endian bits; 1 = the token is a target."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [num_samples + 1]; sample i is tokens[offsets[i]:offsets[i + 1]]."""

    @property
    def weights(self) -> NDArray[np.float16] | None:
        """float16 [total], factor of each token's loss as a target, above 0; None = all 1."""


def members(groups: NDArray[np.integer], group_size: int) -> NDArray[np.int64]:
    """int64 [n * group_size]: the samples of each of n groups, which are neighbours."""
    first = groups.astype(np.int64)[:, None] * group_size
    return (first + np.arange(group_size)).ravel()


def sample_hash(tokens: NDArray[np.uint32]) -> int:
    """xxh3_64 of a sample's ids, uint32 [n]: equal samples have the same."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).data)


def count_targets(
    store: StoredTokens,
) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
    """Returns the targets of each sample, int32 [N], and the sum of their weights, float64 [N].

    The first token of a sample is no target: no token before it predicts it. The sums are None
    where all weights are 1.
    """
    weights = None if store.weights is None else store.weights.view(np.uint16)
    return _C.count_targets(store.tokens, store.supervised_bits, store.offsets, weights)
