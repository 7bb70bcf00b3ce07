"""Packing of samples that arrive one by one and may never end.

The memory is bounded by the pool of the "window" strategy, whose order is the stream's own. Every
rank reads the same stream and forms the same steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C
from sft_fast.data.targets import count_targets
from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel
from sft_fast.packing.bins import DEFAULT_OPTIONS, VERSION, Bin, PackingOptions
from sft_fast.packing.choices import MAX_CAPACITY
from sft_fast.packing.steps import Step


@dataclass(frozen=True)
class StreamSample:
    """One sample of a stream."""

    tokens: NDArray[np.uint32]
    """uint32 [n]."""
    supervised: NDArray[np.bool_]
    """bool [n]; True = the token is a target."""
    weights: NDArray[np.float16] | None = None
    """float16 [n], factor of each token's loss as a target, above 0; None = all 1."""


@dataclass(frozen=True)
class SampleStore:
    """Samples in the layout of a token store."""

    tokens: NDArray[np.uint32]
    """uint32 [total]."""
    supervised_bits: NDArray[np.uint8]
    """uint8 [ceil(total / 8)], little-endian bits."""
    offsets: NDArray[np.int64]
    """int64 [num_samples + 1]."""
    weights: NDArray[np.float16] | None = None
    """float16 [total]; None = all 1."""

    @classmethod
    def of(cls, samples: list[StreamSample]) -> "SampleStore":
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
        )

    def samples(self) -> list[StreamSample]:
        """Returns the samples, as views."""
        supervised = np.unpackbits(self.supervised_bits, bitorder="little").astype(np.bool_)
        return [
            StreamSample(
                self.tokens[begin:end],
                supervised[begin:end],
                None if self.weights is None else self.weights[begin:end],
            )
            for begin, end in pairwise(self.offsets.tolist())
        ]


@dataclass(frozen=True)
class StreamStep(Step):
    """A step of a stream; its bins hold places in `store`."""

    store: SampleStore


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands between two steps; enough to continue it elsewhere."""

    fingerprint: str
    """Of the options of the plan."""
    num_read: int
    """Samples taken from the stream; a continued plan is given the ones after these."""
    num_draws: int
    """Random numbers drawn."""
    ids: NDArray[np.int64]
    """int64 [n], the samples that were read and are in no step yet, by their number in the
    stream; in the order in which the packer must be given them."""
    tokens: NDArray[np.uint32]
    """uint32 [total], of these samples."""
    supervised_bits: NDArray[np.uint8]
    """uint8 [ceil(total / 8)], little-endian bits."""
    offsets: NDArray[np.int64]
    """int64 [n + 1], into tokens."""
    weights: NDArray[np.float16]
    """float16 [total], or empty: all 1."""
    rest_offsets: NDArray[np.int64]
    """int64 [num_bins + 1], into ids, once the stream has ended: the bins that are left. Else
    empty."""

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        arrays: dict[str, Any] = {
            field.name: np.asarray(getattr(self, field.name)) for field in fields(self)
        }
        with path.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "StreamState":
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in fields(cls)}
        # Numbers and text come back as arrays without dimensions.
        return cls(
            **{name: array if array.ndim else array.item() for name, array in values.items()}
        )


class StreamPlan(Iterator[StreamStep]):
    """The optimizer steps of a stream of samples.

    A step is `global_batch_size` bins; the last one is completed with empty bins. How many steps
    there are is known only at the end.
    """

    def __init__(
        self,
        samples: Iterator[StreamSample],
        *,
        capacity: int,
        global_batch_size: int,
        seed: int = 0,
        options: PackingOptions = DEFAULT_OPTIONS,
        cost_model: CostModel = DEFAULT_COST_MODEL,
        state: StreamState | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            samples: in an order that is random enough to train on; the same on every rank.
            capacity: tokens per bin, a multiple of the alignment.
            global_batch_size: bins per step, over all data-parallel ranks.
            seed: in [0, 2**64).
            cost_model: decides which rank computes which bins of a step, and nothing else.
            state: continue from here; `samples` then begins after the first state.num_read ones.

        Raises:
            ValueError: an argument is out of range, or `state` is that of other options.
        """
        if not 1 <= capacity <= MAX_CAPACITY or not 0 <= seed < 2**64 or global_batch_size < 1:
            raise ValueError(
                f"packing.capacity is {capacity}, seed {seed}, train.global_batch_size "
                f"{global_batch_size}; expected 1 to {MAX_CAPACITY}, [0, 2**64), at least 1"
            )
        cost_model.check(capacity * global_batch_size, longest=capacity)
        self.source = samples
        self.capacity = capacity
        self.global_batch_size = global_batch_size
        self.options = options
        self.cost_model = cost_model
        self.fingerprint = (
            f"version={VERSION} stream capacity={capacity} seed={seed} "
            f"global_batch_size={global_batch_size} {options}"
        )
        if state is not None and state.fingerprint != self.fingerprint:
            raise ValueError(
                f"the saved stream was packed with {state.fingerprint}, this run has "
                f"{self.fingerprint}; restore the old options, or start anew"
            )
        self.packer = _C.StreamPacker(
            capacity,
            seed,
            alignment=options.alignment,
            max_samples=options.max_samples_per_bin or 0,
            pool_size=options.pool_size,
            num_draws=state.num_draws if state else 0,
        )
        self.held: dict[int, StreamSample] = {}
        self.num_read = 0
        # The last bins, once the stream has ended.
        self.rest: list[Bin] | None = None
        if state is not None:
            self.restore(state)

    def restore(self, state: StreamState) -> None:
        """Takes in the samples that were held."""
        weights = state.weights if state.weights.size else None
        store = SampleStore(state.tokens, state.supervised_bits, state.offsets, weights)
        self.held = dict(zip(state.ids.tolist(), store.samples(), strict=True))
        self.num_read = state.num_read
        if state.rest_offsets.size:
            self.rest = [state.ids[begin:end] for begin, end in pairwise(state.rest_offsets)]
            return
        for sample_id, sample in self.held.items():
            self.packer.add(sample_id, len(sample.tokens))

    def state(self) -> StreamState:
        """Returns where the stream stands, the last step done."""
        ids, rest_offsets = self.packer.ids(), np.zeros(0, np.int64)
        if self.rest is not None:
            ids = np.concatenate([np.zeros(0, np.int64), *self.rest])
            rest_offsets = np.cumsum([0, *map(len, self.rest)], dtype=np.int64)
        store = SampleStore.of([self.held[sample_id] for sample_id in ids.tolist()])
        return StreamState(
            self.fingerprint,
            self.num_read,
            self.packer.num_draws,
            ids,
            store.tokens,
            store.supervised_bits,
            store.offsets,
            np.zeros(0, np.float16) if store.weights is None else store.weights,
            rest_offsets,
        )

    def __next__(self) -> StreamStep:
        """Returns the next step.

        Raises:
            StopIteration: the stream has ended, and all of its samples have been in a step.
            ValueError: a sample is empty, longer than a bin, or not of the right types.
        """
        bins: list[Bin] = []
        while len(bins) < self.global_batch_size:
            ids = self.next_bin()
            if ids is None:
                break
            bins.append(ids)
        if not bins:
            raise StopIteration
        samples = [self.held.pop(sample_id) for sample_id in np.concatenate(bins).tolist()]
        lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
        store = SampleStore.of(samples)
        supervised, loss_weights = count_targets(store)
        ends = np.cumsum([len(ids) for ids in bins])
        places = np.split(np.arange(len(samples), dtype=np.int64), ends[:-1])
        empty = [np.empty(0, np.int64)] * (self.global_batch_size - len(bins))
        return StreamStep(
            bins=places + empty,
            lengths=lengths,
            supervised=supervised,
            loss_weights=loss_weights,
            capacity=self.capacity,
            alignment=self.options.alignment,
            cost_model=self.cost_model,
            store=store,
        )

    def next_bin(self) -> Bin | None:
        """Returns the numbers of the samples of the next bin; None at the end."""
        while self.rest is None and self.packer.needs_more():
            sample = next(self.source, None)
            if sample is None:
                self.rest = self.packer.take_rest()
            else:
                self.add(sample)
        if self.rest is None:
            return self.packer.take_bin()
        return self.rest.pop(0) if self.rest else None

    def add(self, sample: StreamSample) -> None:
        """Takes in the next sample."""
        tokens, supervised = sample.tokens, sample.supervised
        if tokens.dtype != np.uint32 or supervised.dtype != np.bool_ or tokens.ndim != 1:
            raise ValueError(
                f"sample {self.num_read} of the stream has {tokens.ndim}-d {tokens.dtype} tokens "
                f"and a {supervised.dtype} mask; expected 1-d uint32 and bool"
            )
        if supervised.shape != tokens.shape:
            raise ValueError(
                f"sample {self.num_read} of the stream has tokens {tokens.shape} and a mask "
                f"{supervised.shape}; expected equal shapes"
            )
        weights = sample.weights
        if weights is not None and (weights.dtype, weights.shape) != (np.float16, tokens.shape):
            raise ValueError(
                f"sample {self.num_read} of the stream has {weights.dtype} weights "
                f"{weights.shape}; expected float16 {tokens.shape}"
            )
        self.packer.add(self.num_read, len(tokens))
        self.held[self.num_read] = sample
        self.num_read += 1
