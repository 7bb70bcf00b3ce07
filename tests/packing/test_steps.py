"""Bins, steps, and that neither depends on how the run is spread over ranks."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast import _C
from sft_fast.megatron.checkpoint.fingerprint import changed_fields, run_fields
from sft_fast.packing.balance import DEFAULT_COST_MODEL
from sft_fast.packing.bins import BinPlan, PackingOptions, choose_strategy, plan_bins
from sft_fast.packing.choices import STRATEGY_HELP, Strategy
from sft_fast.packing.report import packing_report, plot_plan
from sft_fast.packing.steps import StepPlan
from sft_fast.reference.packing import Window, best_fit_decreasing, next_fit, random_order, shuffle

all_strategies = pytest.mark.parametrize("strategy", sorted(_C.STRATEGIES))
random_strategies = pytest.mark.parametrize("strategy", sorted({*_C.STRATEGIES} - {"sequential"}))


def test_strategies_are_listed_and_explained() -> None:
    assert get_args(Strategy) == ("auto", *_C.STRATEGIES)
    assert all(f"{name} = " in STRATEGY_HELP.replace("\n", " ") for name in get_args(Strategy))


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


@settings(deadline=None)
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


def check_bins(bins: list[list[int]], lengths: list[int], capacity: int) -> None:
    assert sorted(sample for one in bins for sample in one) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in one) <= capacity for one in bins)


def fewest_bins(lengths: tuple[int, ...], capacity: int) -> int:
    """The optimum of lengths in descending order, by trying every bin for every sample."""

    def search(sample: int, free: tuple[int, ...], best: int) -> int:
        if len(free) >= best or sample == len(lengths):
            return min(best, len(free))
        for b in {free.index(room) for room in free if room >= lengths[sample]}:
            rest = free[b] - lengths[sample]
            best = search(sample + 1, (*free[:b], rest, *free[b + 1 :]), best)
        return search(sample + 1, (*free, capacity - lengths[sample]), best)

    return search(0, (), len(lengths) + 1)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 6])
def test_all_instances_of_up_to_8_samples(capacity: int) -> None:
    for num_samples in range(9):
        every = combinations_with_replacement(range(capacity, 0, -1), num_samples)
        for lengths in every:
            best = fewest_bins(lengths, capacity)
            given = np.array(lengths, np.int32)
            bins = {name: bins_of(plan_bins(given, capacity, name)) for name in _C.STRATEGIES}
            for one in bins.values():
                check_bins(one, list(lengths), capacity)
            assert best <= len(bins["bfd"]) <= 3 * best // 2
            # The pool holds all of them, and its rest is packed in the better of two ways.
            assert best <= len(bins["window"]) <= len(bins["bfd"])
            assert len(bins["none"]) == num_samples


# Where bins of one kind abound, they are filled a block at a time.
@pytest.mark.parametrize(("longest", "capacity"), [(700, 2048), (9, 18)])
def test_bfd_on_many_samples(longest: int, capacity: int) -> None:
    lengths = random_lengths(20_000, longest)
    bins = bins_of(plan_bins(lengths, capacity))
    check_bins(bins, lengths.tolist(), capacity)
    # Short samples abound, so the bound itself is reached.
    assert len(bins) == -(-int(lengths.sum()) // capacity)


@settings(deadline=None)
@given(packing_problems(), st.none() | st.integers(1, 9))
def test_sequential_is_next_fit(
    problem: tuple[list[int], int], max_samples_per_bin: int | None
) -> None:
    lengths, capacity = problem
    options = PackingOptions(max_samples_per_bin=max_samples_per_bin)
    plan = plan_bins(np.array(lengths, np.int32), capacity, "sequential", options=options)
    assert bins_of(plan) == next_fit(lengths, capacity, max_samples_per_bin)


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    # Long enough for the pool to be full for a while, with a few lengths or with many.
    capacity = draw(st.integers(1, 400))
    longest = draw(st.integers(max(1, capacity // 20), capacity))
    step = draw(st.sampled_from([1, 1, 7]))
    lengths = random_lengths(draw(st.integers(0, 300)), longest, draw(st.integers(0, 2**32)))
    return np.minimum(-(-lengths // step) * step, capacity).astype(np.int32), capacity


@settings(deadline=None)
@given(
    streams(),
    st.none() | st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)
def test_window_equals_the_oracle(
    stream: tuple[np.ndarray, int],
    max_samples: int | None,
    pool_size: int,
    seed: int,
    epoch: int,
) -> None:
    lengths, capacity = stream
    options = PackingOptions(max_samples_per_bin=max_samples, pool_size=pool_size)
    bins = bins_of(plan_bins(lengths, capacity, "window", seed, epoch, options))
    check_bins(bins, lengths.tolist(), capacity)
    oracle = Window(capacity, max_samples, pool_size, seed, epoch)
    expected = []
    for sample in random_order(len(lengths), seed, epoch, stream=4):
        oracle.pool.append((sample, int(lengths[sample])))
        if not oracle.needs_more():
            expected.append(oracle.take_bin())
    assert bins[: len(expected)] == expected
    rest = [length for _, length in oracle.pool]
    drained = []
    while oracle.pool:
        drained.append(oracle.take_bin())
    if max_samples is None:
        num_decreasing = len(best_fit_decreasing(rest, capacity))
        assert len(bins) - len(expected) == min(len(drained), num_decreasing)
        if len(drained) > num_decreasing:
            return
    elif len(bins) - len(expected) < len(drained):
        return
    assert bins[len(expected) :] == drained


@pytest.mark.parametrize("longest", [500, 1365])
def test_window_is_dense_and_mixes_lengths(longest: int) -> None:
    lengths = random_lengths(50_000, longest)
    plan = StepPlan(lengths, lengths, capacity=4096, strategy="window", global_batch_size=1)
    report = packing_report(plan)
    assert report.num_bins <= 1.0005 * report.lower_bound + 1
    assert abs(report.length_correlation) < 0.15
    decreasing = StepPlan(lengths, lengths, capacity=4096, strategy="bfd", global_batch_size=1)
    assert packing_report(decreasing).length_correlation > 0.5


@all_strategies
@settings(deadline=None)
@given(problem=packing_problems(), alignment=st.integers(1, 20), seed=st.integers(0, 9))
def test_alignment_is_packing_in_larger_units(
    strategy: str, problem: tuple[list[int], int], alignment: int, seed: int
) -> None:
    units, capacity = problem
    shorter_by = np.random.default_rng(seed).integers(0, alignment, len(units))
    lengths = np.array(units, np.int64) * alignment - shorter_by
    options = PackingOptions(alignment=alignment)
    aligned = plan_bins(lengths, capacity * alignment, strategy, seed, options=options)
    assert bins_of(aligned) == bins_of(
        plan_bins(np.array(units, np.int32), capacity, strategy, seed)
    )


@all_strategies
@settings(deadline=None)
@given(problem=packing_problems(), max_samples=st.integers(1, 10))
def test_no_bin_holds_more_samples_than_allowed(
    strategy: str, problem: tuple[list[int], int], max_samples: int
) -> None:
    lengths, capacity = problem
    options = PackingOptions(max_samples_per_bin=max_samples)
    bins = bins_of(plan_bins(np.array(lengths, np.int32), capacity, strategy, options=options))
    check_bins(bins, lengths, capacity)
    assert all(len(one) <= max_samples for one in bins)


@all_strategies
def test_a_limit_that_no_bin_reaches_changes_nothing(strategy: str) -> None:
    lengths = random_lengths(500, 100)
    options = PackingOptions(max_samples_per_bin=500)
    limited = plan_bins(lengths, 256, strategy, options=options)
    assert bins_of(limited) == bins_of(plan_bins(lengths, 256, strategy))


@pytest.mark.parametrize(
    ("low", "high", "max_samples_per_bin", "expected"),
    [
        (1, 300, None, "window"),
        # No two fit, so nothing can be filled by choice; both need a bin each.
        (2049, 4096, None, "window"),
        # Many samples are large against the bin, so few partners fit.
        (1, 4097, None, "bfd"),
        # Decreasing order fills bins of short samples by number.
        (1, 300, 20, "window"),
    ],
)
def test_auto_takes_what_is_dense(
    low: int, high: int, max_samples_per_bin: int | None, expected: str
) -> None:
    lengths = np.random.default_rng(0).integers(low, high, 20_000)
    options = PackingOptions(max_samples_per_bin=max_samples_per_bin)
    num_bins = {
        name: plan_bins(lengths, 4096, name, options=options).num_bins for name in ("window", "bfd")
    }
    assert (num_bins["window"] > 1.002 * num_bins["bfd"]) == (expected == "bfd")
    strategy, reason = choose_strategy(lengths, 4096, options)
    assert strategy == expected
    assert f"{num_bins['window']} bins by window and {num_bins['bfd']} by bfd" in reason
    auto = plan_bins(lengths, 4096, "auto", seed=3, options=options)
    assert bins_of(auto) == bins_of(plan_bins(lengths, 4096, expected, seed=3, options=options))


def test_auto_samples_large_and_empty_data() -> None:
    # Sorted data: the trial must not see the short samples only.
    lengths = np.sort(np.random.default_rng(0).integers(1, 4097, 250_000))
    assert choose_strategy(lengths, 4096)[0] == "bfd"
    assert plan_bins(np.zeros(0, np.int32), 4096, "auto").num_bins == 0


def test_none_puts_each_sample_alone() -> None:
    bins = bins_of(plan_bins(random_lengths(100, 5), 5, "none"))
    assert sorted(bins) == [[sample] for sample in range(100)]
    assert bins != sorted(bins)


@pytest.mark.parametrize("num_samples", [2**16, 2**16 + 1, 2**16 + 40])
def test_orders_of_many_are_those_of_the_oracle(num_samples: int) -> None:
    order = plan_bins(np.ones(num_samples, np.int32), 1, "none", seed=7, epoch=2).order
    assert order.tolist() == random_order(num_samples, 7, 2, stream=3)


@pytest.mark.parametrize("num_samples", [5, 2**8 + 1, 2**16 + 17])
def test_equals_are_shuffled_as_by_the_oracle(num_samples: int) -> None:
    lengths = np.ones(num_samples, np.int32)
    expected = list(range(num_samples))
    shuffle(expected, 0, num_samples, 7, 2, stream=1)
    assert plan_bins(lengths, 1, "bfd", seed=7, epoch=2).sample_ids.tolist() == expected


@pytest.mark.parametrize("num_samples", [*range(1, 10), 50, 300])
def test_bins_are_shuffled_as_by_the_oracle(num_samples: int) -> None:
    lengths = np.arange(1, num_samples + 1, dtype=np.int32)
    capacity = int(lengths.sum())
    plan = plan_bins(lengths, capacity, "bfd", seed=7, epoch=2)
    expected = list(range(num_samples))
    shuffle(expected, 0, num_samples, 7, 2, stream=2)
    assert plan.sample_ids.tolist() == expected


@pytest.mark.slow
def test_more_equals_than_two_draws_can_share() -> None:
    lengths = np.ones(2**24 + 3, np.int32)
    plan = plan_bins(lengths, 2**20, "bfd")
    assert plan.num_bins == 17
    assert np.array_equal(np.sort(plan.sample_ids), np.arange(len(lengths)))
    # Uniform: the ids of a bin have the mean of all, to four standard deviations.
    bins = [plan.bin(index) for index in range(plan.num_bins)]
    means = [one.mean() for one in bins if len(one) == 2**20]
    assert len(means) == 16
    np.testing.assert_allclose(means, len(lengths) / 2, atol=4 * len(lengths) / np.sqrt(12 * 2**20))


@random_strategies
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


def test_sequential_is_the_same_in_every_epoch() -> None:
    lengths = random_lengths(100, 100)
    plans = [bins_of(plan_bins(lengths, 256, "sequential", seed, seed)) for seed in range(3)]
    assert plans[0] == plans[1] == plans[2]


def test_the_plan_of_record() -> None:
    # A change here changes the data order of every run, and needs another packing.VERSION.
    lengths = np.array([5, 3, 8, 1, 2, 7, 4, 4, 6, 2, 1, 3], np.int32)
    bfd = plan_bins(lengths, 10, "bfd", seed=1234, epoch=0)
    assert bins_of(bfd) == [[1, 5], [9, 2], [3, 4, 11], [7, 0, 10], [8, 6]]
    window = plan_bins(lengths, 10, "window", seed=1234, epoch=0)
    assert bins_of(window) == [[3, 4, 9, 0], [11, 10, 8], [5, 1], [2], [6, 7]]
    none = plan_bins(lengths, 10, "none", seed=1234, epoch=1)
    assert none.order.tolist() == [8, 11, 7, 2, 3, 0, 5, 6, 1, 10, 4, 9]


def test_a_checkpoint_of_other_planners_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sft_fast.megatron.checkpoint.fingerprint.tokenizer_digest", lambda tokenizer: ""
    )

    def fields(version: int) -> dict[str, str]:
        monkeypatch.setattr("sft_fast.megatron.checkpoint.fingerprint.VERSION", version)
        run: Any = SimpleNamespace(
            seed=0, model=SimpleNamespace(dtype="bf16"), parts={}, chat_template=None
        )
        architecture: Any = PackingOptions()
        return run_fields(run.model, run.seed, run, run, make_step_plan(), architecture, "")

    assert changed_fields(fields(1), fields(1), (), Path("saved")) == set()
    problem = "packing: was .* version=1, is .* version=2\n.*--allow-change packing"
    with pytest.raises(ValueError, match=problem):
        changed_fields(fields(1), fields(2), (), Path("saved"))


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
        ({"strategy": "ffd"}, "packing.strategy is 'ffd'; expected one of auto, bfd, window, seq"),
        ({"capacity": 0}, "packing.capacity is 0"),
        ({"capacity": 2**70}, "packing.capacity is 1180591620717411303424"),
        ({"options": PackingOptions(alignment=3)}, r"16; expected a multiple of .*alignment \(3\)"),
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


@pytest.mark.parametrize("name", ["alignment", "max_samples_per_bin", "pool_size"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**70])
def test_options_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"packing.{name} is {value}; expected 1 to"):
        PackingOptions(**{name: value})


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
    assert sorted(sum(one[0].size == 0 for one in share) for share in shares) == [1, 2, 2, 2]


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8, 16, 32, 64])
def test_every_rank_computes_the_same_plan(dp_size: int) -> None:
    expected = ids_of(make_step_plan(global_batch_size=64, strategy="auto").step_bins(1, 0))
    together = []
    for rank in range(dp_size):
        # As in a run: each process makes its own.
        plan = make_step_plan(global_batch_size=64, strategy="auto")
        share = plan.micro_batches(plan.num_steps_per_epoch, rank, dp_size, 1)
        together += [one for bins in share for one in ids_of(bins)]
    assert sorted(together) == sorted(expected)


@pytest.mark.parametrize("global_batch_size", [1, 4])
def test_epochs_of_window_have_equal_steps(global_batch_size: int) -> None:
    lengths = random_lengths(200, 256)
    options = PackingOptions(pool_size=10)
    plan = make_step_plan(
        200,
        strategy="window",
        lengths=lengths,
        num_supervised=lengths,
        options=options,
        global_batch_size=global_batch_size,
    )
    alone = [plan_bins(lengths, 256, "window", 7, epoch, options).num_bins for epoch in range(20)]
    # Otherwise this would show nothing.
    assert len(set(alone)) > 1
    seen = set()
    for epoch in range(20):
        steps = [plan.step_bins(epoch, step) for step in range(plan.num_steps_per_epoch)]
        assert all(any(one.size for one in bins) for bins in steps)
        flat = [one for bins in steps for one in ids_of(bins) if one]
        check_bins(flat, lengths.tolist(), 256)
        seen.add(str(flat))
        if -(-alone[epoch] // global_batch_size) == plan.num_steps_per_epoch:
            assert flat == bins_of(plan_bins(lengths, 256, "window", 7, epoch, options))
    assert len(seen) == 20


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
        assert count.capacity_tokens == 8 * 256
    assert sum(count.num_samples for count in counts) == len(plan.lengths)


def test_counts_beyond_int32() -> None:
    lengths = np.full(300, 2**24, np.int32)
    plan = StepPlan(lengths, lengths - 1, capacity=2**24, global_batch_size=300)
    assert plan.counts(0).num_supervised == 300 * (2**24 - 1)
    assert plan.counts(0).num_tokens == plan.counts(0).capacity_tokens == 300 * 2**24
    assert packing_report(plan).num_tokens == 300 * 2**24


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
        rf"(?s)train.global_batch_size, train.micro_batch_size.*"
        rf"a multiple of {dp_size} x {micro_batch_size} = {dp_size * micro_batch_size}"
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
        {"options": PackingOptions(max_samples_per_bin=3)},
        {"options": PackingOptions(pool_size=3)},
        {"options": PackingOptions(alignment=2)},
    ]
    assert len({make_step_plan(**change).fingerprint for change in changes}) == len(changes)


def test_the_fingerprint_does_not_tell_who_computes_what() -> None:
    costly_head = replace(DEFAULT_COST_MODEL, head=10**6)
    assert make_step_plan(cost_model=costly_head).fingerprint == make_step_plan().fingerprint
    # Auto is named as what it chose: asking for that by name continues the run.
    assert make_step_plan(strategy="auto").fingerprint == (
        make_step_plan(strategy=make_step_plan(strategy="auto").strategy).fingerprint
    )


def test_report_by_hand() -> None:
    # 9, 6+4 and 5+3+2 in packs of 10; steps of 2 packs need one empty pack.
    lengths = np.array([6, 5, 4, 3, 2, 9], np.int32)
    plan = StepPlan(lengths, np.array([3, 1, 0, 0, 0, 1]), capacity=10, global_batch_size=2)
    report = packing_report(plan)
    assert (report.num_samples, report.num_tokens, report.num_supervised) == (6, 29, 5)
    assert (report.num_bins, report.num_empty_bins, report.num_steps) == (3, 1, 2)
    assert (report.lower_bound, report.efficiency) == (3, 1.0)
    assert (report.alignment_padding, report.tail_padding, report.empty_bin_padding) == (0, 1, 10)
    assert report.padding_share == pytest.approx(11 / 40)
    assert report.supervised_share == pytest.approx(5 / 29)
    assert (report.samples_per_bin, report.max_samples_per_bin) == (2.0, 3)
    assert "6 samples, 29 tokens (17.2% supervised) in 3 packs of 10" in str(report)
    assert "27.50% padding (alignment 0.00%, pack ends 2.50%, last step 25.00%)" in str(report)
    assert json.loads(json.dumps(report.record()))["efficiency"] == 1.0


def test_report_of_alignment() -> None:
    # Slots of 8, 8 and 4: the first two in one row of 16, the third in another.
    plan = StepPlan(
        np.array([5, 8, 4]),
        np.array([1, 1, 1]),
        capacity=16,
        global_batch_size=1,
        strategy="sequential",
        options=PackingOptions(alignment=4),
    )
    report = packing_report(plan)
    assert (report.alignment_padding, report.tail_padding, report.num_bins) == (3, 12, 2)
    assert (report.max_places_moved, report.strategy, report.reason) == (
        0,
        "sequential",
        "as configured",
    )


def test_report_of_places_moved() -> None:
    lengths = random_lengths(3000, 100)
    options = PackingOptions(pool_size=50)
    plan = StepPlan(
        lengths,
        lengths,
        capacity=256,
        global_batch_size=1,
        strategy="window",
        seed=3,
        options=options,
    )
    stream = _C.sample_order(3000, 3, 0).tolist()
    packed = [sample for one in bins_of(plan.plan(0)) for sample in one]
    moved = [abs(packed.index(sample) - place) for place, sample in enumerate(stream)]
    assert packing_report(plan).max_places_moved == max(moved) < 100
    assert packing_report(make_step_plan(strategy="bfd")).max_places_moved is None


def test_report_of_length_correlation() -> None:
    def correlation(lengths: list[int]) -> float:
        plan = StepPlan(
            np.array(lengths),
            np.array(lengths),
            capacity=20,
            global_batch_size=1,
            strategy="sequential",
            options=PackingOptions(max_samples_per_bin=2),
        )
        return packing_report(plan).length_correlation

    assert correlation([3, 3, 9, 9]) == pytest.approx(1)
    assert correlation([3, 9, 3, 9]) == pytest.approx(-1)
    assert math.isnan(correlation([3]))
    assert math.isnan(correlation([20, 20]))
    assert math.isnan(correlation([5, 5, 5, 5]))


def test_balance_shows_in_the_report() -> None:
    # A long tail of lengths, and ten full steps.
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 6000).clip(1, 8192).astype(np.int32)
    plan = make_step_plan(
        lengths=lengths,
        num_supervised=lengths // 2 + 1,
        capacity=8192,
        global_batch_size=64,
        strategy="window",
    )
    report = packing_report(plan, dp_size=8, micro_batch_size=1)
    assert 1 < report.cost_imbalance < report.cost_imbalance_round_robin
    assert (
        packing_report(plan).cost_imbalance == packing_report(plan).cost_imbalance_round_robin == 1
    )


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    plot_plan(make_step_plan(), path)
    assert path.stat().st_size > 5000


def test_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="needs matplotlib: pip install"):
        plot_plan(make_step_plan(), tmp_path / "plan.png")


def test_planning_needs_no_torch() -> None:
    code = "import sys, sft_fast.packing.steps; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
