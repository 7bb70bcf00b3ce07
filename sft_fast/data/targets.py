"""Supervised tokens of stored samples, and the weights of their losses, counted."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C


class StoredTargets(Protocol):
    """What `count_targets` reads of a token store; see `packing.micro_batch.TokenStore`."""

    @property
    def tokens(self) -> NDArray[np.uint32]: ...
    @property
    def supervised_bits(self) -> NDArray[np.uint8]: ...
    @property
    def offsets(self) -> NDArray[np.int64]: ...
    @property
    def weights(self) -> NDArray[np.float16] | None: ...


def count_targets(
    store: StoredTargets,
) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
    """Returns the targets of each sample, int32 [N], and the sum of their weights, float64 [N].

    The first token of a sample is no target: there is no row before it. The sums are None where
    all weights are 1.
    """
    weights = None if store.weights is None else store.weights.view(np.uint16)
    return _C.count_targets(store.tokens, store.supervised_bits, store.offsets, weights)
