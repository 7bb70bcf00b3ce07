"""Samples in memory, laid out as in a token store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sft_fast.data.targets import count_targets


@dataclass(frozen=True)
class StreamSample:
    """One sample of a stream."""

    tokens: NDArray[np.uint32]
    """uint32 [n]."""
    supervised: NDArray[np.bool_]
    """bool [n]; True = the token is a target."""
    weights: NDArray[np.float16] | None = None
    """float16 [n], factor of each token's loss as a target, above 0; None = all 1."""
    origin: str = ""
    """file:line of its record."""

    def __post_init__(self) -> None:
        shape = (len(self.tokens),)
        assert (self.tokens.dtype, self.tokens.shape) == (np.uint32, shape), self.origin
        assert (self.supervised.dtype, self.supervised.shape) == (np.bool_, shape), self.origin
        assert self.weights is None or self.weights.shape == shape, self.origin


@dataclass(frozen=True)
class MemoryStore:
    """A token store that is no file; see `targets.StoredTokens`."""

    tokens: NDArray[np.uint32]
    """uint32 [total]."""
    supervised_bits: NDArray[np.uint8]
    """uint8 [ceil(total / 8)], little-endian bits."""
    offsets: NDArray[np.int64]
    """int64 [num_samples + 1]."""
    weights: NDArray[np.float16] | None
    """float16 [total]; None = all 1."""
    origins: tuple[str, ...]
    """file:line of each sample's record."""

    @classmethod
    def of(cls, samples: Sequence[StreamSample]) -> MemoryStore:
        """Returns a store of `samples`; it has weights if one of them has."""
        weights = None
        if any(sample.weights is not None for sample in samples):
            weights = np.concatenate(
                [
                    np.ones(len(one.tokens), np.float16) if one.weights is None else one.weights
                    for one in samples
                ]
            )
        supervised = [np.zeros(0, np.bool_), *(sample.supervised for sample in samples)]
        return cls(
            np.concatenate([np.zeros(0, np.uint32), *(sample.tokens for sample in samples)]),
            np.packbits(np.concatenate(supervised), bitorder="little"),
            np.cumsum([0, *(len(sample.tokens) for sample in samples)], dtype=np.int64),
            weights,
            tuple(sample.origin for sample in samples),
        )

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [num_samples], tokens of each."""
        return np.diff(self.offsets).astype(np.int32)

    @cached_property
    def _targets(self) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
        return count_targets(self)

    @property
    def num_supervised(self) -> NDArray[np.int32]:
        """int32 [num_samples], as `TokenStore.num_supervised`."""
        return self._targets[0]

    @property
    def loss_weights(self) -> NDArray[np.float64] | None:
        """float64 [num_samples], as `TokenStore.loss_weights`."""
        return self._targets[1]

    @cached_property
    def _supervised(self) -> NDArray[np.bool_]:
        return np.unpackbits(self.supervised_bits, bitorder="little").astype(np.bool_)

    def origin(self, sample: int) -> str:
        """`file:line` of the record that a sample was made from."""
        return self.origins[sample]

    def sample(self, sample: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids uint32 [n] and supervised mask bool [n] of one sample."""
        begin, end = self.offsets[sample], self.offsets[sample + 1]
        return self.tokens[begin:end], self._supervised[begin:end]

    def samples(self) -> list[StreamSample]:
        """Returns the samples, as views."""
        return [
            StreamSample(
                self.tokens[begin:end],
                self._supervised[begin:end],
                None if self.weights is None else self.weights[begin:end],
                origin,
            )
            for (begin, end), origin in zip(
                pairwise(self.offsets.tolist()), self.origins, strict=True
            )
        ]
