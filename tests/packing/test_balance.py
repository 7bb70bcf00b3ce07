"""Who computes which bins of a step: everything once, and nobody waits for long."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel, balance, imbalance, round_robin
from sft_fast.packing.steps import StepPlan


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    dp_size, micro_batch_size = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    num_bins = dp_size * micro_batch_size * draw(st.integers(1, 5))
    costs = st.integers(0, 3) | st.integers(0, 2**52)
    drawn = draw(st.lists(costs, min_size=num_bins, max_size=num_bins))
    return np.array(drawn, np.int64), dp_size, micro_batch_size


@settings(deadline=None)
@given(steps())
def test_every_bin_once_and_never_worse_than_neighbours_can_be(
    step: tuple[np.ndarray, int, int],
) -> None:
    costs, dp_size, micro_batch_size = step
    assigned = balance(costs, dp_size, micro_batch_size)
    num_microbatches = len(costs) // (dp_size * micro_batch_size)
    assert assigned.shape == (num_microbatches, dp_size, micro_batch_size)
    assert sorted(assigned.flatten()) == list(range(len(costs)))
    # Micro-steps take neighbours in cost, most expensive first.
    flat = costs[assigned].reshape(num_microbatches, -1)
    assert all(earlier.min() >= later.max() for earlier, later in itertools.pairwise(flat))
    # Inside one, shares differ by at most the spread of its bins: each round of one bin per share
    # gives the cheaper share the dearer bin.
    shares = costs[assigned].sum(axis=2)
    assert all(np.ptp(share) <= np.ptp(bins) for share, bins in zip(shares, flat, strict=True))
    # So ranks differ by at most the largest difference inside a micro-step.
    assert np.ptp(shares.sum(axis=0)) <= np.ptp(shares, axis=1).max()


def test_by_hand() -> None:
    # Micro-steps {9, 7}, {5, 4}, {2, 0}: whoever has less so far gets the dearer one.
    costs = np.array([4, 0, 9, 5, 2, 7])
    assert balance(costs, 2, 1).tolist() == [[[2], [5]], [[0], [3]], [[1], [4]]]
    # {9, 7, 5, 4} in pairs: 9 + 4 against 7 + 5.
    assert balance(costs[[0, 2, 3, 5]], 2, 2).tolist() == [[[1, 0], [3, 2]]]


def test_imbalance_by_hand() -> None:
    costs = np.array([6, 2, 1, 3])
    # The most expensive of each micro-step: 6 and 3; on average 4 and 2.
    assert imbalance(costs, round_robin(4, 2, 1)) == pytest.approx(9 / 6)
    assert imbalance(costs, round_robin(4, 1, 1)) == 1
    assert imbalance(np.zeros(4, np.int64), round_robin(4, 2, 1)) == 1


# Chat, instructions and code in one set: mean, sigma of the logarithm, shortest, share.
LONG_TAILED = [(1200, 0.75, 32, 0.35), (150, 0.65, 16, 0.5), (3000, 1.2, 32, 0.15)]


@pytest.mark.parametrize("strategy", ["window", "bfd"])
@pytest.mark.parametrize(("capacity", "limit"), [(8192, 1.02), (32768, 1.06)])
def test_long_tailed_data_is_balanced(capacity: int, limit: float, strategy: str) -> None:
    random = np.random.default_rng(0)
    lengths = np.concatenate(
        [
            random.lognormal(np.log(mean) - sigma**2 / 2, sigma, int(share * 30_000)).clip(
                shortest, capacity
            )
            for mean, sigma, shortest, share in LONG_TAILED
        ]
    ).astype(np.int32)
    # A model of 7 billion parameters whose attention computes the masked half too.
    plan = StepPlan(
        lengths,
        lengths,
        capacity=capacity,
        global_batch_size=64,
        strategy=strategy,
        cost_model=CostModel(24576, 1, 0),
    )
    full = range(plan.num_steps_per_epoch - 1)
    costs = [plan.step(step).costs() for step in full]

    def costliest_over_mean(assign: Callable[[np.ndarray], np.ndarray]) -> float:
        shares = np.concatenate([cost[assign(cost)].sum(axis=2) for cost in costs])
        return float(np.mean(shares.max(axis=1) / shares.mean(axis=1)))

    balanced = costliest_over_mean(lambda cost: balance(cost, 8, 1))
    assert balanced <= limit < costliest_over_mean(lambda cost: round_robin(64, 8, 1))


def test_costs_by_hand() -> None:
    model = CostModel(linear=10, quadratic=2, head=100)
    costs = model.costs(np.array([3, 50_000], np.int32), np.array([1, 0], np.int32))
    assert costs.tolist() == [30 + 18 + 100, 500_000 + 5_000_000_000]
    plan = StepPlan(
        np.array([3, 5, 4]),
        np.array([1, 0, 2]),
        capacity=8,
        global_batch_size=4,
        strategy="sequential",
        cost_model=model,
    )
    assert plan.step(0).costs().tolist() == [
        30 + 18 + 100 + 50 + 50,
        40 + 32 + 200,
        0,
        0,
    ]


def test_the_shape_of_a_model() -> None:
    assert CostModel.of_shape(4096, 32, 128256) == DEFAULT_COST_MODEL == CostModel()
    # Small models spend more on the head.
    assert CostModel.of_shape(576, 30, 49152) == CostModel(6912, 1, 1639)
    for shape in [(0, 1, 1), (1, 0, 1), (1, 1, -1)]:
        with pytest.raises(ValueError, match="expected all at least 1"):
            CostModel.of_shape(*shape)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"linear": -1}, "expected integers of at least 0"),
        ({"linear": 1.5}, "expected integers"),
        ({"linear": 0, "quadratic": 0, "head": 0}, "not all 0"),
        ({"linear": 2**61}, "costs more than 2.62"),
        ({"quadratic": 2**60}, "costs more than 2.62"),
    ],
    ids=str,
)
def test_cost_models_that_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        StepPlan(
            np.array([3]),
            np.array([1]),
            capacity=8,
            global_batch_size=4,
            cost_model=CostModel(**{"linear": 1, "quadratic": 1, "head": 1} | change),
        )
