"""Which samples share a pack, and which packs make a step.

A plan is a pure function of (lengths, capacity, strategy, seed, epoch). Every rank computes the
same one, so ranks agree on every step without talking to each other, and a run can resume at any
step with any data-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C
from sft_fast.config.layout import batch_problem
from sft_fast.constants import ceil_div, round_up
from sft_fast.data.memory_store import MemoryStore
from sft_fast.errors import ConfigError
from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel, balance
from sft_fast.packing.bins import (
    DEFAULT_OPTIONS,
    VERSION,
    Bin,
    BinPlan,
    PackingOptions,
    as_int32,
    choose_strategy,
    plan_bins,
)


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
    capacity_tokens: int
    """Tokens that the packs have room for."""
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
        store: where the samples are; None = in the token store that was planned.
    """

    bins: list[Bin]
    lengths: NDArray[np.int32]
    supervised: NDArray[np.int32]
    loss_weights: NDArray[np.float64] | None
    capacity: int
    alignment: int
    cost_model: CostModel
    store: MemoryStore | None = None

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """int64 [n], of all bins, one after another."""
        return np.concatenate(self.bins)

    def micro_batches(self, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[list[Bin]]:
        """Returns one rank's share; see `StepPlan.micro_batches`."""
        check_batch_split(len(self.bins), dp_rank, dp_size, micro_batch_size)
        assigned = balance(self.costs(), dp_size, micro_batch_size)
        return [[self.bins[place] for place in places] for places in assigned[:, dp_rank]]

    def costs(self) -> NDArray[np.int64]:
        """Returns int64 [num_bins], what each costs by the cost model; 0 if it is empty."""
        sample_ids = self.sample_ids
        rounded = round_up(self.lengths[sample_ids], self.alignment)
        costs = self.cost_model.costs(rounded, self.supervised[sample_ids])
        totals = np.concatenate([[0], np.cumsum(costs)])
        return np.diff(totals[np.cumsum([0, *map(len, self.bins)])])

    def counts(self) -> StepCounts:
        """Returns what the step holds."""
        sample_ids = self.sample_ids
        lengths = self.lengths[sample_ids].astype(np.int64)
        num_supervised = int(self.supervised[sample_ids].sum(dtype=np.int64))
        weights = self.loss_weights
        return StepCounts(
            num_samples=len(sample_ids),
            num_tokens=int(lengths.sum()),
            num_supervised=num_supervised,
            loss_weight=float(num_supervised if weights is None else weights[sample_ids].sum()),
            capacity_tokens=self.capacity * len(self.bins),
            sum_squared_lengths=int((lengths * lengths).sum()),
        )


class StepPlan:
    """Every optimizer step of a run, epoch after epoch.

    A step is `global_batch_size` consecutive bins of its epoch's plan. The last step of an epoch is
    completed with empty bins: no sample is dropped or seen twice, and packs without supervised
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
        group_size: int = 1,
        is_extract: bool = False,
    ) -> None:
        """Plans epoch 0.

        Args:
            lengths: integer [N], tokens per sample.
            num_supervised: integer [N], tokens of each sample that are a target.
            capacity: tokens per bin.
            global_batch_size: bins per step, over all data-parallel ranks.
            strategy: see `plan_bins`.
            seed: see `plan_bins`.
            options: limits on bins.
            cost_model: decides which rank computes which bins of a step, and nothing else.
            loss_weights: float64 [N], the sum of each sample's target weights; None = all weights
                are 1. Decides what `counts` says, and nothing else.
            group_size: neighbouring samples that always share a bin, one after another.
            is_extract: the samples stand for many more of their kind.

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
        self.is_extract = is_extract
        self.group_size = group_size
        self.capacity = capacity
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.options = options
        self.strategy, self.reason = strategy, "as configured"
        if strategy == "auto":
            self.strategy, self.reason = choose_strategy(
                self.lengths, capacity, options, group_size
            )
        first = self.plan_with_strategy(0)
        self.cached = (0, first)
        self.num_steps_per_epoch = ceil_div(first.num_bins, global_batch_size)
        """Steps in each epoch, the last one possibly completed with empty bins."""
        self.cost_model = cost_model
        cost_model.check(capacity * global_batch_size, longest=capacity)

    @property
    def fingerprint(self) -> str:
        """Everything but the data that decides which samples a step holds, readable."""
        return (
            f"version={VERSION} strategy={self.strategy} capacity={self.capacity} "
            f"seed={self.seed} global_batch_size={self.global_batch_size} {self.options}"
            + (f" group_size={self.group_size}" if self.group_size > 1 else "")
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
        if ceil_div(plan.num_bins, self.global_batch_size) == self.num_steps_per_epoch:
            return plan
        first = self.plan_with_strategy(0)
        return replace(first, order=_C.bin_order(first.num_bins, self.seed, epoch))

    def plan_with_strategy(self, epoch: int) -> BinPlan:
        """Returns what the strategy makes of `epoch`."""
        return plan_bins(
            self.lengths,
            self.capacity,
            self.strategy,
            self.seed,
            epoch,
            self.options,
            self.group_size,
        )

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

    def expected(self) -> StepPlan:
        """Returns itself: the samples that a stream's plan expects are all of them here."""
        return self

    def resume(self, checkpoint: Path, step: int) -> None:
        """Nothing: where a run stands in a store follows from the step alone."""

    def state_files(self, number: int) -> dict[str, Callable[[], bytes]]:
        """Nothing, for the same reason; a stream has something to say."""
        return {}

    def report_before(self, number: int) -> None:
        """Nothing: what became of the records of a store is known before the first step."""

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


def check_batch_split(
    global_batch_size: int, dp_rank: int, dp_size: int, micro_batch_size: int
) -> None:
    """Raises ValueError if the global batch does not divide evenly, or `dp_rank` does not exist."""
    if micro_batch_size < 1 or dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"train.micro_batch_size is {micro_batch_size}, data-parallel rank {dp_rank} of "
            f"{dp_size}; expected at least 1, and a rank in [0, size)"
        )
    problem = batch_problem(global_batch_size, micro_batch_size, dp_size)
    if problem is not None:
        raise ConfigError([problem], "the layout of a step")
