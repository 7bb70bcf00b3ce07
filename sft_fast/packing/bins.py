"""Which samples share a pack: the planners, their limits and the plan of an epoch."""

from dataclasses import dataclass, fields, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C
from sft_fast.constants import ceil_div, round_up
from sft_fast.data.targets import members
from sft_fast.packing.choices import MAX_CAPACITY, MAX_POOL_SIZE, MAX_SAMPLES_PER_BIN, Strategy

Bin = NDArray[np.int64]
"""The ids of the samples that share one pack; empty for a pack of padding."""


# Enough for the share of unfilled bins to be known to better than the limit below.
NUM_TRIAL_SAMPLES = 100_000


MAX_EXTRA_BINS = 0.002


VERSION = 2
"""Of the planners; another version means another data order for the same options."""


@dataclass(frozen=True)
class PackingOptions:
    """Limits on bins; every one of them changes which samples share a bin."""

    alignment: int = 1
    """A sample takes up a multiple of this many tokens: 2 * context-parallel size, or what the
    kernels of a number format ask for."""
    max_samples_per_bin: int | None = None
    """None = no limit."""
    pool_size: int = 1000
    """Samples that "window" chooses from, at least; it takes more where these are less than 8
    bins' worth."""

    def __post_init__(self) -> None:
        limits = {"alignment": MAX_CAPACITY, "pool_size": MAX_POOL_SIZE}
        limits["max_samples_per_bin"] = MAX_SAMPLES_PER_BIN
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is None and name == "max_samples_per_bin":
                continue
            if not 1 <= value <= limit:
                raise ValueError(f"packing.{name} is {value}; expected 1 to {limit}")

    def of_groups(self, group_size: int) -> "PackingOptions":
        """The limits where groups of samples are put into bins.

        Raises:
            ValueError: a bin may not hold a group.
        """
        most = self.max_samples_per_bin
        if most is None:
            return self
        if most < group_size:
            raise ValueError(
                f"packing.max_samples_per_bin is {most}, but {group_size} samples that are "
                "compared share a bin; raise it to that or more"
            )
        return replace(self, max_samples_per_bin=most // group_size)

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


DEFAULT_OPTIONS = PackingOptions()


@dataclass(frozen=True)
class BinPlan:
    """One epoch's bins.

    Attributes:
        sample_ids: uint32 [N], bin after bin; every sample exactly once.
        bin_offsets: int64 [num_bins + 1], into sample_ids.
        order: uint32 [num_bins]; the i-th bin to train on is stored at place order[i].
        capacity: tokens per bin.
    """

    sample_ids: NDArray[np.uint32]
    bin_offsets: NDArray[np.int64]
    order: NDArray[np.uint32]
    capacity: int

    @property
    def num_bins(self) -> int:
        """Bins in the epoch."""
        return len(self.order)

    def of_groups(self, group_size: int) -> "BinPlan":
        """The plan of samples, this one being of groups of neighbouring samples."""
        sample_ids = members(self.sample_ids, group_size).astype(np.uint32)
        return replace(self, sample_ids=sample_ids, bin_offsets=self.bin_offsets * group_size)

    def bin(self, index: int) -> Bin:
        """Returns the sample ids of the `index`-th bin in training order."""
        place = int(self.order[index])
        ids = self.sample_ids[self.bin_offsets[place] : self.bin_offsets[place + 1]]
        return ids.astype(np.int64)


def plan_bins(
    lengths: NDArray[np.integer],
    capacity: int,
    strategy: str = "bfd",
    seed: int = 0,
    epoch: int = 0,
    options: PackingOptions = DEFAULT_OPTIONS,
    group_size: int = 1,
) -> BinPlan:
    """Assigns every sample to a bin of at most `capacity` tokens.

    Args:
        lengths: integer [N], tokens per sample, each in [1, capacity].
        capacity: tokens per bin, a multiple of the alignment.
        strategy: see `choices.STRATEGY_HELP`; "auto": whatever `choose_strategy` says.
        seed: in [0, 2**64).
        epoch: counted from 0.
        options: limits on bins.
        group_size: neighbouring samples that share a bin, one after another; it divides N.

    Raises:
        ValueError: a sample that is empty or longer than a bin, or a group that is, or an argument
            out of range.
    """
    if group_size > 1:
        grouped = group_lengths(lengths, capacity, options, group_size)
        limits = options.of_groups(group_size)
        plan = plan_bins(grouped, capacity, strategy, seed, epoch, limits)
        return plan.of_groups(group_size)
    if strategy not in get_args(Strategy):
        expected = ", ".join(get_args(Strategy))
        raise ValueError(f"packing.strategy is {strategy!r}; expected one of {expected}")
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**64):
        raise ValueError(f"seed is {seed}, epoch is {epoch}; expected both in [0, 2**64)")
    if not 1 <= capacity <= MAX_CAPACITY:
        raise ValueError(f"packing.capacity is {capacity}; expected 1 to {MAX_CAPACITY} tokens")
    if strategy == "auto":
        strategy, _ = choose_strategy(lengths, capacity, options)
    planned = _C.plan(
        strategy,
        as_int32(lengths),
        capacity,
        seed,
        epoch,
        alignment=options.alignment,
        max_samples=options.max_samples_per_bin or 0,
        pool_size=options.pool_size,
    )
    return BinPlan(*planned, capacity=capacity)


def group_lengths(
    lengths: NDArray[np.integer], capacity: int, options: PackingOptions, group_size: int
) -> NDArray[np.int32]:
    """int32 [N / group_size]: tokens that the samples of each group take up; lengths are [N].

    Raises:
        ValueError: a group is longer than a bin.
    """
    assert len(lengths) % group_size == 0, "a store of groups has all samples of each"
    rounded = round_up(lengths.astype(np.int64), options.alignment)
    grouped = rounded.reshape(-1, group_size).sum(axis=1)
    if len(grouped) and grouped.max() > capacity:
        raise ValueError(
            f"packing.capacity is {capacity}, but {group_size} samples that are compared take up "
            f"{grouped.max()} tokens with their padding; raise it to that or more"
        )
    return as_int32(grouped)


def choose_strategy(
    lengths: NDArray[np.integer],
    capacity: int,
    options: PackingOptions = DEFAULT_OPTIONS,
    group_size: int = 1,
) -> tuple[str, str]:
    """Decides between "window" and "bfd", by packing some of the samples, lengths [N], with both.

    It is "window", whose bins are random samples of the data, unless that needs over 0.2 % more
    bins. The answer depends on nothing but the arguments: it is the same in every epoch and run.

    Returns:
        The strategy, and the reason in words.
    """
    if group_size > 1:
        grouped = group_lengths(lengths, capacity, options, group_size)
        return choose_strategy(grouped, capacity, options.of_groups(group_size))
    # Spread over all of the data, which may be sorted.
    some = np.asarray(lengths)[:: ceil_div(len(lengths), NUM_TRIAL_SAMPLES) or 1]
    window, bfd = (
        plan_bins(some, capacity, strategy, options=options).num_bins
        for strategy in ("window", "bfd")
    )
    is_dense = window <= bfd * (1 + MAX_EXTRA_BINS)
    reason = (
        f"auto, because {len(some)} samples need {window} bins by window and {bfd} by bfd, "
        f"{'at most' if is_dense else 'over'} {MAX_EXTRA_BINS:.1%} more"
    )
    return ("window" if is_dense else "bfd"), reason


def as_int32(lengths: NDArray[np.integer]) -> NDArray[np.int32]:
    """Returns lengths as contiguous int32 [N]; a value that does not survive raises ValueError."""
    array = np.asarray(lengths)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"lengths is a {array.ndim}-d {array.dtype} array; expected 1-d and integer"
        )
    converted = np.ascontiguousarray(array, dtype=np.int32)
    changed = np.flatnonzero(converted != array)
    if changed.size:
        sample = changed[0]
        raise ValueError(f"sample {sample} has {array[sample]} tokens, more than int32 can hold")
    return converted
