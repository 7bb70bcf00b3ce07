"""Bins, steps, and that neither depends on how the run is spread over ranks."""

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_fast.packing import PLANNERS, BinPlan, StepPlan, plan_bins
from sft_fast.reference.packing import best_fit_decreasing

all_strategies = pytest.mark.parametrize("strategy", sorted(PLANNERS))


def bins_of(plan: BinPlan) -> list[list[int]]:
    return [plan.bin(index).tolist() for index in range(plan.num_bins)]


def random_lengths(num_samples: int, longest: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest + 1, num_samples).astype(np.int32)


@st.composite
def packing_problems(draw: st.DrawFn) -> tuple[list[int], int]:
    # Few distinct lengths make groups of equal bins, many make lone ones.
    capacity = draw(st.integers(1, 300))
    longest = draw(st.integers(1, capacity))
    return draw(st.lists(st.integers(1, longest), max_size=60)), capacity


@given(packing_problems(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_bfd_fills_bins_as_the_textbook_does(
    problem: tuple[list[int], int], seed: int, epoch: int
) -> None:
    lengths, capacity = problem
    bins = bins_of(plan_bins(np.array(lengths, np.int32), capacity, "bfd", seed, epoch))
    expected = best_fit_decreasing(lengths, capacity)

    def fill_levels(packed: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[sample] for sample in one) for one in packed)

    assert sorted(sample for one in bins for sample in one) == list(range(len(lengths)))
    assert fill_levels(bins) == fill_levels(expected)


def test_bfd_on_many_samples() -> None:
    lengths = random_lengths(20_000, 700)
    plan = plan_bins(lengths, 2048)
    loads = np.add.reduceat(lengths[plan.sample_ids], plan.bin_offsets[:-1])
    assert loads.max() <= 2048
    assert np.array_equal(np.sort(plan.sample_ids), np.arange(20_000))
    # Short samples abound, so the bound itself is reached.
    assert plan.num_bins == -(-int(lengths.sum()) // 2048)


def test_none_puts_each_sample_alone() -> None:
    bins = bins_of(plan_bins(random_lengths(100, 5), 5, "none"))
    assert sorted(bins) == [[sample] for sample in range(100)]
    assert bins != sorted(bins)


@all_strategies
def test_a_plan_is_a_function_of_seed_and_epoch(strategy: str) -> None:
    lengths = random_lengths(500, 100)
    plans = {
        (seed, epoch): bins_of(plan_bins(lengths, 256, strategy, seed, epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    for (seed, epoch), bins in plans.items():
        assert bins == bins_of(plan_bins(lengths.copy(), 256, strategy, seed, epoch))
    assert len({str(bins) for bins in plans.values()}) == 9
    assert len({len(bins) for bins in plans.values()}) == 1


def test_the_plan_of_record() -> None:
    # A change here changes the data order of every run, and breaks resuming.
    lengths = np.array([5, 3, 8, 1, 2, 7, 4, 4, 6, 2, 1, 3], np.int32)
    bfd = plan_bins(lengths, 10, "bfd", seed=1234, epoch=0)
    assert bins_of(bfd) == [[5, 1], [6, 0, 10], [9, 2], [3, 4, 11], [8, 7]]
    none = plan_bins(lengths, 10, "none", seed=1234, epoch=1)
    assert none.order.tolist() == [4, 0, 10, 2, 3, 5, 8, 6, 9, 1, 11, 7]


def chi_squared(counts: Counter[tuple[int, ...]], num_outcomes: int) -> float:
    expected = counts.total() / num_outcomes
    seen = sum((count - expected) ** 2 / expected for count in counts.values())
    return seen + (num_outcomes - len(counts)) * expected


def test_bin_order_is_uniform_over_epochs() -> None:
    lengths = np.ones(4, np.int32)
    orders = Counter(
        tuple(plan_bins(lengths, 1, "none", seed=5, epoch=epoch).order.tolist())
        for epoch in range(4800)
    )
    # 23 degrees of freedom: 49.7 is exceeded once in a thousand seeds, and this one is fixed.
    assert chi_squared(orders, 24) < 49.7


def test_order_inside_a_bin_is_uniform_over_epochs() -> None:
    lengths = np.array([1, 2, 3], np.int32)
    outcomes = Counter(
        tuple(plan_bins(lengths, 6, "bfd", seed=5, epoch=epoch).sample_ids.tolist())
        for epoch in range(1200)
    )
    # 5 degrees of freedom, once in a thousand.
    assert chi_squared(outcomes, 6) < 20.5


def test_partners_and_places_are_uniform_over_epochs() -> None:
    lengths = np.ones(4, np.int32)
    outcomes: Counter[tuple[int, ...]] = Counter()
    for epoch in range(4800):
        first, second = bins_of(plan_bins(lengths, 2, "bfd", seed=5, epoch=epoch))
        outcomes[(*first, *second)] += 1
    assert chi_squared(outcomes, 24) < 49.7


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"strategy": "ffd"}, r"packing.strategy is 'ffd'; expected one of \['bfd', 'none'\]"),
        ({"capacity": 0}, "packing.capacity is 0"),
        ({"capacity": 8}, r"sample 1 has 9 tokens; expected 1 to 8 \(packing.capacity\)"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"epoch": -1}, "epoch is -1"),
        ({"lengths": np.array([1.0])}, "1-d float64"),
        ({"lengths": np.ones((2, 2), np.int32)}, "2-d int32"),
        ({"lengths": np.array([1, 2**32 + 1])}, "sample 1 has 4294967297 tokens"),
        ({"lengths": np.array([1, 2**63], np.uint64)}, "sample 1 has 9223372036854775808"),
    ],
    ids=str,
)
def test_plan_bins_says_what_is_wrong(arguments: dict[str, Any], problem: str) -> None:
    valid: dict[str, Any] = {
        "lengths": np.array([3, 9]),
        "capacity": 16,
        "strategy": "bfd",
        "seed": 0,
        "epoch": 0,
    }
    with pytest.raises(ValueError, match=problem):
        plan_bins(**(valid | arguments))


def test_lengths_of_any_integer_type_and_stride() -> None:
    lengths = random_lengths(50, 9)
    strided = np.repeat(lengths.astype(np.int64), 2)[::2]
    assert bins_of(plan_bins(strided, 16)) == bins_of(plan_bins(lengths, 16))


def make_step_plan(num_samples: int = 203, **changes: Any) -> StepPlan:
    lengths = random_lengths(num_samples, 100)
    options: dict[str, Any] = {
        "lengths": lengths,
        "num_supervised": lengths // 2 + 1,
        "capacity": 256,
        "seed": 7,
        "global_batch_size": 8,
    }
    return StepPlan(**(options | changes))


def ids_of(bins: list[np.ndarray]) -> list[list[int]]:
    return [one.tolist() for one in bins]


@all_strategies
@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 203])
def test_an_epoch_holds_every_sample_once(strategy: str, num_samples: int) -> None:
    plan = make_step_plan(num_samples, strategy=strategy)
    for epoch in range(2):
        steps = [plan.step_bins(epoch, step) for step in range(plan.num_steps_per_epoch)]
        assert [len(bins) for bins in steps] == [8] * len(steps)
        flat = [one for bins in steps for one in ids_of(bins)]
        assert sorted(sample for one in flat for sample in one) == list(range(num_samples))
        # Only the last step is completed, and by less than a step.
        num_empty = flat.count([])
        assert num_empty < 8
        assert [] not in flat[: len(flat) - num_empty]


LAYOUTS = [(1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), LAYOUTS)
def test_a_step_is_the_same_for_every_layout(dp_size: int, micro_batch_size: int) -> None:
    plan = make_step_plan()
    for global_step in range(2 * plan.num_steps_per_epoch):
        shares = [
            plan.micro_batches(global_step, rank, dp_size, micro_batch_size)
            for rank in range(dp_size)
        ]
        for share in shares:
            assert len(share) == 8 // (dp_size * micro_batch_size)
            assert all(len(bins) == micro_batch_size for bins in share)
        together = [one for share in shares for bins in share for one in ids_of(bins)]
        expected = ids_of(plan.step_bins(*plan.locate(global_step)))
        assert sorted(together) == sorted(expected)


def test_empty_bins_are_spread_over_ranks() -> None:
    # Nine bins in steps of eight leave one full bin in the last step: 7 empty ones over 4 ranks.
    plan = make_step_plan(9, strategy="none")
    shares = [plan.micro_batches(1, rank, dp_size=4, micro_batch_size=1) for rank in range(4)]
    assert [sum(one[0].size == 0 for one in share) for share in shares] == [1, 2, 2, 2]


def test_steps_do_not_depend_on_what_was_asked_before() -> None:
    plan = make_step_plan()
    num_steps = plan.num_steps_per_epoch
    forward = [ids_of(plan.step_bins(*plan.locate(step))) for step in range(3 * num_steps)]
    for step in (2 * num_steps, 0, 3 * num_steps - 1, num_steps - 1, num_steps, 1):
        resumed = make_step_plan()
        assert ids_of(resumed.step_bins(*resumed.locate(step))) == forward[step]
        assert ids_of(plan.step_bins(*plan.locate(step))) == forward[step]
    assert forward[0] != forward[num_steps]


def test_counts_are_the_sums_over_the_step() -> None:
    plan = make_step_plan()
    counts = [plan.counts(step) for step in range(plan.num_steps_per_epoch)]
    for step, count in enumerate(counts):
        samples = [s for bins in plan.micro_batches(step, 0, 1, 1) for one in bins for s in one]
        assert count.num_samples == len(samples)
        assert count.num_tokens == sum(int(plan.lengths[s]) for s in samples)
        assert count.num_supervised == sum(int(plan.supervised[s]) for s in samples)
        assert count.num_slots == 8 * 256
    assert sum(count.num_samples for count in counts) == len(plan.lengths)


def test_counts_beyond_int32() -> None:
    lengths = np.full(300, 2**24, np.int32)
    plan = StepPlan(lengths, lengths - 1, capacity=2**24, global_batch_size=300)
    assert plan.counts(0).num_supervised == 300 * (2**24 - 1)
    assert plan.counts(0).num_tokens == plan.counts(0).num_slots == 300 * 2**24
    assert plan.report().num_tokens == 300 * 2**24


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"global_batch_size": 0}, "train.global_batch_size is 0; expected at least 1"),
        ({"num_supervised": np.ones(3, np.int32)}, "lengths has 203 samples, num_supervised 3"),
        ({"num_supervised": np.zeros(203, np.int32)}, "data.train has 203 samples and not one"),
        (
            {"lengths": np.zeros(0, np.int32), "num_supervised": np.zeros(0, np.int32)},
            "data.train has 0 samples",
        ),
        ({"capacity": 50}, r"expected 1 to 50 \(packing.capacity\)"),
        ({"strategy": "ffd"}, "packing.strategy is 'ffd'"),
    ],
    ids=str,
)
def test_step_plan_says_what_is_wrong(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_step_plan(**changes)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(3, 1), (1, 3), (4, 4), (16, 1)])
def test_an_uneven_split_names_the_keys(dp_size: int, micro_batch_size: int) -> None:
    problem = (
        rf"train.global_batch_size is 8; expected a multiple of train.micro_batch_size "
        rf"\({micro_batch_size}\) x data-parallel size \({dp_size}\) = {dp_size * micro_batch_size}"
    )
    with pytest.raises(ValueError, match=problem):
        make_step_plan().micro_batches(0, 0, dp_size, micro_batch_size)


@pytest.mark.parametrize(
    ("dp_rank", "dp_size", "micro_batch_size"), [(2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)]
)
def test_ranks_that_do_not_exist(dp_rank: int, dp_size: int, micro_batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"data-parallel rank {dp_rank} of {dp_size}"):
        make_step_plan().micro_batches(0, dp_rank, dp_size, micro_batch_size)


def test_steps_that_do_not_exist() -> None:
    plan = make_step_plan()
    for step in (-1, plan.num_steps_per_epoch):
        with pytest.raises(ValueError, match=f"step is {step}; an epoch has"):
            plan.step_bins(0, step)
    with pytest.raises(ValueError, match="epoch is -1"):
        plan.counts(-1)


def test_the_fingerprint_tells_plans_apart() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 8},
        {"capacity": 257},
        {"strategy": "none"},
        {"global_batch_size": 16},
    ]
    assert len({make_step_plan(**change).fingerprint for change in changes}) == len(changes)


def test_report_by_hand() -> None:
    # 9, 6+4 and 5+3+2 in rows of 10; steps of 2 rows need one empty row.
    lengths = np.array([6, 5, 4, 3, 2, 9], np.int32)
    plan = StepPlan(lengths, np.array([3, 1, 0, 0, 0, 1]), capacity=10, global_batch_size=2)
    report = plan.report()
    assert (report.num_samples, report.num_tokens, report.num_supervised) == (6, 29, 5)
    assert (report.num_bins, report.num_empty_bins, report.num_steps) == (3, 1, 2)
    assert (report.lower_bound, report.efficiency) == (3, 1.0)
    assert report.padding_share == pytest.approx(11 / 40)
    assert report.supervised_share == pytest.approx(5 / 29)
    assert (report.samples_per_bin, report.max_samples_per_bin) == (2.0, 3)
    assert "6 samples, 29 tokens (17.2% supervised) in 3 rows of 10" in str(report)


def test_planning_needs_no_torch() -> None:
    code = "import sys, sft_fast.packing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
