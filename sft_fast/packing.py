"""Which samples share a packed row, and which rows make a step.

A plan is a pure function of (lengths, capacity, strategy, seed, epoch). Every rank computes the
same one, so ranks agree on every step without talking to each other, and a run can resume at any
step with any data-parallel size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C

Bin = NDArray[np.int64]
"""The ids of the samples that share one packed row; empty for a row of padding."""

Planner = Callable[
    [NDArray[np.int32], int, int, int],
    tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]],
]

PLANNERS: dict[str, Planner] = {
    "bfd": _C.plan_best_fit_decreasing,
    "none": _C.plan_one_per_bin,
}
"""Strategy name -> function of (lengths, capacity, seed, epoch). The number of bins that a strategy
needs must not depend on seed or epoch: steps are counted before they are planned."""


@dataclass(frozen=True)
class BinPlan:
    """One epoch's bins.

    Attributes:
        sample_ids: int64 [N], bin after bin; every sample exactly once.
        bin_offsets: int64 [num_bins + 1], into sample_ids.
        order: uint32 [num_bins]; the i-th bin to train on is stored at place order[i].
        capacity: tokens per bin.
    """

    sample_ids: NDArray[np.int64]
    bin_offsets: NDArray[np.int64]
    order: NDArray[np.uint32]
    capacity: int

    @property
    def num_bins(self) -> int:
        """Bins in the epoch."""
        return len(self.order)

    def bin(self, index: int) -> Bin:
        """Returns the sample ids of the `index`-th bin in training order, a view."""
        place = int(self.order[index])
        return self.sample_ids[self.bin_offsets[place] : self.bin_offsets[place + 1]]


def plan_bins(
    lengths: NDArray[np.integer],
    capacity: int,
    strategy: str = "bfd",
    seed: int = 0,
    epoch: int = 0,
) -> BinPlan:
    """Assigns every sample to a bin of at most `capacity` tokens.

    Args:
        lengths: integer [N], tokens per sample, each in [1, capacity].
        capacity: tokens per bin.
        strategy: "bfd", best-fit decreasing, or "none", one sample per bin.
        seed: in [0, 2**64).
        epoch: counted from 0; bins and their order differ between epochs, their number does not.

    Raises:
        ValueError: a sample that is empty or longer than a bin, or an argument out of range.
    """
    if strategy not in PLANNERS:
        raise ValueError(f"packing.strategy is {strategy!r}; expected one of {sorted(PLANNERS)}")
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**64):
        raise ValueError(f"seed is {seed}, epoch is {epoch}; expected both in [0, 2**64)")
    planned = PLANNERS[strategy](as_int32(lengths), capacity, seed, epoch)
    return BinPlan(*planned, capacity=capacity)


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


@dataclass(frozen=True)
class PackingReport:
    """What packing costs and saves in one epoch."""

    num_samples: int
    num_tokens: int
    num_supervised: int
    num_bins: int
    """Bins that hold samples."""
    num_empty_bins: int
    """Rows of padding that complete the last step."""
    capacity: int
    """Tokens per bin."""
    max_samples_per_bin: int
    num_steps: int

    @property
    def lower_bound(self) -> int:
        """Bins that no packing can go below: all tokens laid end to end."""
        return -(-self.num_tokens // self.capacity)

    @property
    def efficiency(self) -> float:
        """lower_bound / num_bins, in (0, 1]."""
        return self.lower_bound / self.num_bins

    @property
    def padding_share(self) -> float:
        """Share of computed rows that hold no token, those of empty bins included."""
        return 1 - self.num_tokens / ((self.num_bins + self.num_empty_bins) * self.capacity)

    @property
    def supervised_share(self) -> float:
        """Share of tokens that train."""
        return self.num_supervised / self.num_tokens

    @property
    def samples_per_bin(self) -> float:
        """Mean over the bins that hold samples."""
        return self.num_samples / self.num_bins

    def __str__(self) -> str:
        return (
            f"{self.num_samples} samples, {self.num_tokens} tokens "
            f"({self.supervised_share:.1%} supervised) in {self.num_bins} rows of {self.capacity} "
            f"(bound {self.lower_bound}, efficiency {self.efficiency:.2%}), "
            f"{self.samples_per_bin:.1f} samples per row (at most {self.max_samples_per_bin}), "
            f"{self.padding_share:.2%} padding, {self.num_steps} steps per epoch"
        )


@dataclass(frozen=True)
class StepCounts:
    """What one step holds, over all data-parallel ranks; known before it runs."""

    num_samples: int
    num_tokens: int
    """Prompt and answer, without padding."""
    num_supervised: int
    """Tokens that train: the denominator of the step's loss."""
    num_slots: int
    """Tokens that the packed rows have room for."""


class StepPlan:
    """Every optimizer step of a run, epoch after epoch.

    A step is `global_batch_size` consecutive bins of its epoch's plan. The last step of an epoch is
    completed with empty bins: no sample is dropped or seen twice, and rows without supervised
    tokens do not change a loss that is divided by the supervised tokens of the step.
    Only the current epoch's plan is kept.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        num_supervised: NDArray[np.integer],
        *,
        capacity: int,
        global_batch_size: int,
        strategy: str = "bfd",
        seed: int = 0,
    ) -> None:
        """Plans epoch 0.

        Args:
            lengths: integer [N], tokens per sample.
            num_supervised: integer [N], tokens of each sample that are a target.
            capacity: tokens per bin.
            global_batch_size: bins per step, over all data-parallel ranks.
            strategy: see `plan_bins`.
            seed: see `plan_bins`.

        Raises:
            ValueError: there is nothing to train on, or an argument is out of range.
        """
        self.lengths = as_int32(lengths)
        self.supervised = as_int32(num_supervised)
        if len(self.lengths) != len(self.supervised):
            raise ValueError(
                f"lengths has {len(self.lengths)} samples, num_supervised {len(self.supervised)}"
            )
        if not self.supervised.any():
            raise ValueError(
                f"data.train has {len(self.lengths)} samples and not one supervised token; "
                "expected at least one"
            )
        if global_batch_size < 1:
            raise ValueError(f"train.global_batch_size is {global_batch_size}; expected at least 1")
        self.capacity = capacity
        self.global_batch_size = global_batch_size
        self.strategy = strategy
        self.seed = seed
        self.cached = (0, plan_bins(self.lengths, capacity, strategy, seed, epoch=0))
        self.num_bins = self.cached[1].num_bins

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps in each epoch, the last one possibly completed with empty bins."""
        return -(-self.num_bins // self.global_batch_size)

    @property
    def fingerprint(self) -> str:
        """Everything but the data that decides which samples a step holds, readable."""
        return (
            f"strategy={self.strategy} capacity={self.capacity} seed={self.seed} "
            f"global_batch_size={self.global_batch_size}"
        )

    def locate(self, global_step: int) -> tuple[int, int]:
        """Returns (epoch, step in epoch), all counted from 0."""
        return divmod(global_step, self.num_steps_per_epoch)

    def plan(self, epoch: int) -> BinPlan:
        """Returns the plan of `epoch`, planning it if the last call asked for another one."""
        # Read and written whole, so that threads at most plan twice.
        cached_epoch, plan = self.cached
        if cached_epoch != epoch:
            plan = plan_bins(self.lengths, self.capacity, self.strategy, self.seed, epoch)
            assert plan.num_bins == self.num_bins, "a strategy's bin count depends on the epoch"
            self.cached = (epoch, plan)
        return plan

    def step_bins(self, epoch: int, step: int) -> list[Bin]:
        """Returns the `global_batch_size` bins of one step, the same for every parallel layout.

        Raises:
            ValueError: `step` is not in [0, num_steps_per_epoch), or `epoch` is negative.
        """
        if not 0 <= step < self.num_steps_per_epoch:
            raise ValueError(f"step is {step}; an epoch has {self.num_steps_per_epoch} steps")
        plan = self.plan(epoch)
        begin = step * self.global_batch_size
        end = min(begin + self.global_batch_size, self.num_bins)
        num_empty = self.global_batch_size - (end - begin)
        empty = np.empty(0, dtype=np.int64)
        return [plan.bin(index) for index in range(begin, end)] + [empty] * num_empty

    def micro_batches(
        self, global_step: int, dp_rank: int, dp_size: int, micro_batch_size: int
    ) -> list[list[Bin]]:
        """Returns one rank's share of a step.

        Together the ranks hold `step_bins`, each bin once. Ranks take turns, micro-batch by
        micro-batch, so the empty bins of an epoch's last step are spread over the ranks.

        Returns:
            global_batch_size / (dp_size * micro_batch_size) micro-batches of `micro_batch_size`
            bins.

        Raises:
            ValueError: the global batch does not divide evenly, or `dp_rank` does not exist.
        """
        if micro_batch_size < 1 or dp_size < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"train.micro_batch_size is {micro_batch_size}, data-parallel rank {dp_rank} of "
                f"{dp_size}; expected at least 1, and a rank in [0, size)"
            )
        if self.global_batch_size % (dp_size * micro_batch_size) != 0:
            raise ValueError(
                f"train.global_batch_size is {self.global_batch_size}; expected a multiple of "
                f"train.micro_batch_size ({micro_batch_size}) x data-parallel size ({dp_size}) = "
                f"{dp_size * micro_batch_size}"
            )
        bins = self.step_bins(*self.locate(global_step))
        stride = dp_size * micro_batch_size
        first = dp_rank * micro_batch_size
        return [bins[begin : begin + micro_batch_size] for begin in range(first, len(bins), stride)]

    def counts(self, global_step: int) -> StepCounts:
        """Returns what a whole step holds."""
        sample_ids = np.concatenate(self.step_bins(*self.locate(global_step)))
        return StepCounts(
            num_samples=len(sample_ids),
            num_tokens=int(self.lengths[sample_ids].sum(dtype=np.int64)),
            num_supervised=int(self.supervised[sample_ids].sum(dtype=np.int64)),
            num_slots=self.capacity * self.global_batch_size,
        )

    def report(self) -> PackingReport:
        """Returns the packing figures of an epoch."""
        _, plan = self.cached
        return PackingReport(
            num_samples=len(self.lengths),
            num_tokens=int(self.lengths.sum(dtype=np.int64)),
            num_supervised=int(self.supervised.sum(dtype=np.int64)),
            num_bins=self.num_bins,
            num_empty_bins=self.num_steps_per_epoch * self.global_batch_size - self.num_bins,
            capacity=self.capacity,
            max_samples_per_bin=int(np.diff(plan.bin_offsets).max()),
            num_steps=self.num_steps_per_epoch,
        )
