"""Which samples share a packed row, and which rows make a step.

A plan is a pure function of (lengths, capacity, strategy, seed, epoch). Every rank computes the
same one, so ranks agree on every step without talking to each other, and a run can resume at any
step with any data-parallel size.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C
from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel, balance, imbalance, in_turn
from sft_fast.packing.report import PackingReport, length_correlation

Bin = NDArray[np.int64]
"""The ids of the samples that share one packed row; empty for a row of padding."""


class Planner(Protocol):
    """Returns (sample_ids, bin_offsets, order) of a `BinPlan`."""

    def __call__(
        self,
        lengths: NDArray[np.int32],
        capacity: int,
        seed: int,
        epoch: int,
        *,
        alignment: int,
        max_samples: int,
        pool_size: int,
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32]]: ...


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


PLANNERS: dict[str, Planner] = {
    "bfd": _C.plan_best_fit_decreasing,
    "window": _C.plan_window,
    "sequential": _C.plan_sequential,
    "none": _C.plan_one_per_bin,
}
"""Strategy name -> planner."""

STRATEGIES = ("auto", *PLANNERS)

MAX_CAPACITY = 2**24
MAX_POOL_SIZE = 2**22
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
        limits["max_samples_per_bin"] = 2**31 - 1
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is None and name == "max_samples_per_bin":
                continue
            if not 1 <= value <= limit:
                raise ValueError(f"packing.{name} is {value}; expected 1 to {limit}")

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
) -> BinPlan:
    """Assigns every sample to a bin of at most `capacity` tokens.

    Args:
        lengths: integer [N], tokens per sample, each in [1, capacity].
        capacity: tokens per bin, a multiple of the alignment.
        strategy: one of `STRATEGIES`. "bfd": best-fit decreasing; fewest bins, but short samples
            share bins with short ones. "window": random order, each bin filled exactly from those
            next in line; bins are random samples of the data. "sequential": next-fit in the
            order given, the same in every epoch. "none": one sample per bin. "auto": whatever
            `choose_strategy` says.
        seed: in [0, 2**64).
        epoch: counted from 0.

    Raises:
        ValueError: a sample that is empty or longer than a bin, or an argument out of range.
    """
    if strategy not in STRATEGIES:
        expected = ", ".join(STRATEGIES)
        raise ValueError(f"packing.strategy is {strategy!r}; expected one of {expected}")
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**64):
        raise ValueError(f"seed is {seed}, epoch is {epoch}; expected both in [0, 2**64)")
    if not 1 <= capacity <= MAX_CAPACITY:
        raise ValueError(f"packing.capacity is {capacity}; expected 1 to {MAX_CAPACITY} tokens")
    if strategy == "auto":
        strategy, _ = choose_strategy(lengths, capacity, options)
    planned = PLANNERS[strategy](
        as_int32(lengths),
        capacity,
        seed,
        epoch,
        alignment=options.alignment,
        max_samples=options.max_samples_per_bin or 0,
        pool_size=options.pool_size,
    )
    return BinPlan(*planned, capacity=capacity)


def choose_strategy(
    lengths: NDArray[np.integer], capacity: int, options: PackingOptions = DEFAULT_OPTIONS
) -> tuple[str, str]:
    """Decides between "window" and "bfd", by packing some of the samples with both.

    It is "window", whose bins are random samples of the data, unless that needs over 0.2 % more
    bins. The answer depends on nothing but the arguments: it is the same in every epoch and run.

    Returns:
        The strategy, and the reason in words.
    """
    # Spread over all of the data, which may be sorted.
    some = np.asarray(lengths)[:: -(-len(lengths) // NUM_TRIAL_SAMPLES) or 1]
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


def count_targets(
    store: StoredTargets,
) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
    """Returns the targets of each sample, int32 [N], and the sum of their weights, float64 [N].

    The first token of a sample is no target: there is no row before it. The sums are None where
    all weights are 1.
    """
    weights = None if store.weights is None else store.weights.view(np.uint16)
    return _C.count_targets(store.tokens, store.supervised_bits, store.offsets, weights)


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
class StepCounts:
    """What one step holds, over all data-parallel ranks; known before it runs."""

    num_samples: int
    num_tokens: int
    """Prompt and answer, without padding."""
    num_supervised: int
    """Tokens that train."""
    loss_weight: float
    """Sum of the weights of these tokens, num_supervised where all are 1: the denominator of the
    step's loss."""
    num_slots: int
    """Tokens that the packed rows have room for."""
    sum_squared_lengths: int
    """Of the samples: what attention computes."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: its bins, and how ranks share them.

    Attributes:
        bins: int64 ids of samples, one array per bin.
        lengths: int32 [N], tokens of every sample that an id may name.
        supervised: int32 [N], their tokens that are a target.
        loss_weights: float64 [N], the sum of these targets' weights; None = all weights are 1.
        capacity: tokens per bin.
        alignment: a sample takes up a multiple of this many tokens.
        cost_model: decides which rank computes which bins.
    """

    bins: list[Bin]
    lengths: NDArray[np.int32]
    supervised: NDArray[np.int32]
    loss_weights: NDArray[np.float64] | None
    capacity: int
    alignment: int
    cost_model: CostModel

    def micro_batches(self, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[list[Bin]]:
        """Returns one rank's share; see `StepPlan.micro_batches`."""
        check_layout(len(self.bins), dp_rank, dp_size, micro_batch_size)
        assigned = balance(self.costs(), dp_size, micro_batch_size)
        return [[self.bins[place] for place in places] for places in assigned[:, dp_rank]]

    def costs(self) -> NDArray[np.int64]:
        """Returns int64 [num_bins], what each costs by the cost model; 0 if it is empty."""
        sample_ids = np.concatenate(self.bins)
        rounded = round_up(self.lengths[sample_ids], self.alignment)
        costs = self.cost_model.costs(rounded, self.supervised[sample_ids])
        totals = np.concatenate([[0], np.cumsum(costs)])
        return np.diff(totals[np.cumsum([0, *map(len, self.bins)])])

    def counts(self) -> StepCounts:
        """Returns what the step holds."""
        sample_ids = np.concatenate(self.bins)
        lengths = self.lengths[sample_ids].astype(np.int64)
        num_supervised = int(self.supervised[sample_ids].sum(dtype=np.int64))
        weights = self.loss_weights
        return StepCounts(
            num_samples=len(sample_ids),
            num_tokens=int(lengths.sum()),
            num_supervised=num_supervised,
            loss_weight=float(num_supervised if weights is None else weights[sample_ids].sum()),
            num_slots=self.capacity * len(self.bins),
            sum_squared_lengths=int((lengths * lengths).sum()),
        )


class StepPlan:
    """Every optimizer step of a run, epoch after epoch.

    A step is `global_batch_size` consecutive bins of its epoch's plan. The last step of an epoch is
    completed with empty bins: no sample is dropped or seen twice, and rows without supervised
    tokens do not change a loss that is divided by the supervised tokens of the step.
    All epochs have the same number of steps. One that "window" would give another number than the
    first epoch takes the first epoch's bins instead, in an order of its own.
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
        options: PackingOptions = DEFAULT_OPTIONS,
        cost_model: CostModel = DEFAULT_COST_MODEL,
        loss_weights: NDArray[np.float64] | None = None,
    ) -> None:
        """Plans epoch 0.

        Args:
            lengths: integer [N], tokens per sample.
            num_supervised: integer [N], tokens of each sample that are a target.
            capacity: tokens per bin.
            global_batch_size: bins per step, over all data-parallel ranks.
            strategy: see `plan_bins`.
            seed: see `plan_bins`.
            cost_model: decides which rank computes which bins of a step, and nothing else.
            loss_weights: float64 [N], the sum of each sample's target weights; None = all weights
                are 1. Decides what `counts` says, and nothing else.

        Raises:
            ValueError: there is nothing to train on, or an argument is out of range.
        """
        self.lengths = as_int32(lengths)
        self.supervised = as_int32(num_supervised)
        if len(self.lengths) != len(self.supervised):
            raise ValueError(
                f"lengths has {len(self.lengths)} samples, num_supervised {len(self.supervised)}"
            )
        self.loss_weights = loss_weights
        if loss_weights is not None and len(loss_weights) != len(self.lengths):
            raise ValueError(
                f"lengths has {len(self.lengths)} samples, loss_weights {len(loss_weights)}"
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
        self.seed = seed
        self.options = options
        self.strategy, self.reason = strategy, "as configured"
        if strategy == "auto":
            self.strategy, self.reason = choose_strategy(self.lengths, capacity, options)
        first = plan_bins(self.lengths, capacity, self.strategy, seed, epoch=0, options=options)
        self.cached = (0, first)
        self.num_steps_per_epoch = -(-first.num_bins // global_batch_size)
        """Steps in each epoch, the last one possibly completed with empty bins."""
        self.cost_model = cost_model
        cost_model.check(capacity * global_batch_size, longest=capacity)

    @property
    def fingerprint(self) -> str:
        """Everything but the data that decides which samples a step holds, readable."""
        return (
            f"version={VERSION} strategy={self.strategy} capacity={self.capacity} "
            f"seed={self.seed} global_batch_size={self.global_batch_size} {self.options}"
        )

    def locate(self, global_step: int) -> tuple[int, int]:
        """Returns (epoch, step in epoch), all counted from 0."""
        return divmod(global_step, self.num_steps_per_epoch)

    def plan(self, epoch: int) -> BinPlan:
        """Returns the plan of `epoch`, planning it if the last call asked for another one."""
        # Read and written whole, so that threads at most plan twice.
        cached_epoch, plan = self.cached
        if cached_epoch != epoch:
            plan = self.plan_anew(epoch)
            self.cached = (epoch, plan)
        return plan

    def plan_anew(self, epoch: int) -> BinPlan:
        """Returns the plan of `epoch`, with as many steps as that of epoch 0."""
        plan = self.plan_with_strategy(epoch)
        if -(-plan.num_bins // self.global_batch_size) == self.num_steps_per_epoch:
            return plan
        first = self.plan_with_strategy(0)
        return replace(first, order=_C.bin_order(first.num_bins, self.seed, epoch))

    def plan_with_strategy(self, epoch: int) -> BinPlan:
        """Returns what the strategy makes of `epoch`."""
        return plan_bins(self.lengths, self.capacity, self.strategy, self.seed, epoch, self.options)

    def step_bins(self, epoch: int, step: int) -> list[Bin]:
        """Returns the `global_batch_size` bins of one step, the same for every parallel layout.

        Raises:
            ValueError: `step` is not in [0, num_steps_per_epoch), or `epoch` is negative.
        """
        if not 0 <= step < self.num_steps_per_epoch:
            raise ValueError(f"step is {step}; an epoch has {self.num_steps_per_epoch} steps")
        plan = self.plan(epoch)
        begin = step * self.global_batch_size
        end = min(begin + self.global_batch_size, plan.num_bins)
        num_empty = self.global_batch_size - (end - begin)
        empty = np.empty(0, dtype=np.int64)
        return [plan.bin(index) for index in range(begin, end)] + [empty] * num_empty

    def micro_batches(
        self, global_step: int, dp_rank: int, dp_size: int, micro_batch_size: int
    ) -> list[list[Bin]]:
        """Returns one rank's share of a step, equal in cost to that of others as far as possible.

        Together the ranks hold `step_bins`, each bin once.

        Returns:
            global_batch_size / (dp_size * micro_batch_size) micro-batches of `micro_batch_size`
            bins.

        Raises:
            ValueError: the global batch does not divide evenly, or `dp_rank` does not exist.
        """
        return self.step(global_step).micro_batches(dp_rank, dp_size, micro_batch_size)

    def counts(self, global_step: int) -> StepCounts:
        """Returns what a whole step holds."""
        return self.step(global_step).counts()

    def step(self, global_step: int) -> Step:
        """Returns a step, over all ranks."""
        return Step(
            self.step_bins(*self.locate(global_step)),
            self.lengths,
            self.supervised,
            self.loss_weights,
            self.capacity,
            self.options.alignment,
            self.cost_model,
        )

    def report(self, dp_size: int = 1, micro_batch_size: int = 1) -> PackingReport:
        """Returns the packing figures of epoch 0.

        Args:
            dp_size: the data-parallel size for which the cost imbalance is computed.
            micro_batch_size: likewise.
        """
        check_layout(self.global_batch_size, 0, dp_size, micro_batch_size)
        plan = self.plan(0)
        num_tokens = int(self.lengths.sum(dtype=np.int64))
        num_rounded = int(round_up(self.lengths, self.options.alignment).sum(dtype=np.int64))
        costs = [self.step(step).costs() for step in self.some_steps()]
        return PackingReport(
            strategy=self.strategy,
            reason=self.reason,
            num_samples=len(self.lengths),
            num_tokens=num_tokens,
            num_supervised=int(self.supervised.sum(dtype=np.int64)),
            num_bins=plan.num_bins,
            num_empty_bins=self.num_steps_per_epoch * self.global_batch_size - plan.num_bins,
            capacity=self.capacity,
            alignment_padding=num_rounded - num_tokens,
            tail_padding=plan.num_bins * self.capacity - num_rounded,
            max_samples_per_bin=int(np.diff(plan.bin_offsets).max()),
            length_correlation=length_correlation(plan, self.lengths),
            max_places_moved=self.max_places_moved(plan),
            cost_imbalance=float(
                np.mean([imbalance(c, balance(c, dp_size, micro_batch_size)) for c in costs])
            ),
            cost_imbalance_in_turn=float(
                np.mean([imbalance(c, in_turn(len(c), dp_size, micro_batch_size)) for c in costs])
            ),
            num_steps=self.num_steps_per_epoch,
        )

    def some_steps(self) -> list[int]:
        """Returns at most 64 steps, spread over an epoch."""
        return sorted({int(step) for step in np.linspace(0, self.num_steps_per_epoch - 1, 64)})

    def max_places_moved(self, plan: BinPlan) -> int | None:
        """Returns how far from its place in the strategy's own order of epoch 0 a sample got."""
        if self.strategy == "sequential":
            return 0
        if self.strategy != "window":
            return None
        places = np.empty(len(plan.sample_ids), np.int64)
        places[_C.sample_order(len(places), self.seed, 0)] = np.arange(len(places))
        return int(np.abs(places[plan.sample_ids] - np.arange(len(places))).max())


def round_up(lengths: NDArray[np.int32], alignment: int) -> NDArray[np.int32]:
    """Returns the tokens that samples take up, int32 [N]."""
    return -(-lengths // np.int32(alignment)) * np.int32(alignment)


def check_layout(global_batch_size: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> None:
    """Raises ValueError if the global batch does not divide evenly, or `dp_rank` does not exist."""
    if micro_batch_size < 1 or dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"train.micro_batch_size is {micro_batch_size}, data-parallel rank {dp_rank} of "
            f"{dp_size}; expected at least 1, and a rank in [0, size)"
        )
    if global_batch_size % (dp_size * micro_batch_size) != 0:
        raise ValueError(
            f"train.global_batch_size is {global_batch_size}; expected a multiple of "
            f"train.micro_batch_size ({micro_batch_size}) x data-parallel size ({dp_size}) = "
            f"{dp_size * micro_batch_size}"
        )
