"""Packing a stream: every sample once, bounded memory, and a state that continues exactly."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast import _C
from sft_fast.packing.bins import PackingOptions, plan_bins
from sft_fast.packing.micro_batch import fill_micro_batch
from sft_fast.packing.streaming import StreamPlan, StreamSample, StreamState, StreamStep


def stream(lengths: list[int] | np.ndarray) -> Iterator[StreamSample]:
    """Sample i consists of tokens i; its last tokens are supervised, i % 3 of them.

    Every fifth sample has the weight 1 + i / 8.
    """
    for number, length in enumerate(lengths):
        supervised = np.arange(length) >= length - number % 3
        weights = np.full(length, 1 + number / 8, np.float16) if number % 5 == 0 else None
        yield StreamSample(np.full(length, number, np.uint32), supervised, weights)


def make_plan(samples: Iterator[StreamSample], **changes: Any) -> StreamPlan:
    options: dict[str, Any] = {
        "capacity": 100,
        "global_batch_size": 4,
        "seed": 3,
        "options": PackingOptions(pool_size=20),
    }
    return StreamPlan(samples, **(options | changes))


def numbers_of(step: StreamStep) -> list[list[int]]:
    """The samples of each bin, by their number in the stream."""
    first = step.store.tokens[step.store.offsets[:-1]]
    return [first[one].tolist() for one in step.bins]


def weights_of(step: StreamStep) -> np.ndarray:
    """The weight of each token."""
    weights = step.store.weights
    return np.ones(len(step.store.tokens)) if weights is None else weights


def random_lengths(count: int, longest: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest + 1, count)


@settings(deadline=None)
@given(
    count=st.integers(0, 250),
    longest=st.integers(1, 100),
    pool_size=st.integers(1, 40),
    max_samples=st.none() | st.integers(1, 5),
    global_batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_sample_once_and_no_bin_over_capacity(
    count: int,
    longest: int,
    pool_size: int,
    max_samples: int | None,
    global_batch_size: int,
    seed: int,
) -> None:
    lengths = random_lengths(count, longest)
    options = PackingOptions(4, max_samples, pool_size)
    steps = list(
        make_plan(
            stream(lengths),
            capacity=100,
            options=options,
            global_batch_size=global_batch_size,
            seed=seed,
        )
    )
    bins = [one for step in steps for one in numbers_of(step)]
    assert all(len(step.bins) == global_batch_size for step in steps)
    assert sorted(number for one in bins for number in one) == list(range(count))
    for one in bins:
        assert sum(-(-int(lengths[number]) // 4) * 4 for number in one) <= 100
        assert len(one) <= (max_samples or count)
    # Only the last step is completed, at its end.
    num_empty = bins.count([])
    assert num_empty < global_batch_size
    assert [] not in bins[: len(bins) - num_empty]


def test_equals_the_window_strategy_in_the_same_order() -> None:
    lengths = random_lengths(500).astype(np.int32)
    options = PackingOptions(pool_size=30)
    planned = plan_bins(lengths, 100, "window", seed=3, epoch=0, options=options)
    order = _C.sample_order(500, 3, 0)
    steps = make_plan(stream(lengths[order]), options=options)
    streamed = [one for step in steps for one in numbers_of(step) if one]
    expected = [planned.bin(index).tolist() for index in range(planned.num_bins)]
    assert [order[one].tolist() for one in streamed] == expected


@pytest.mark.parametrize("stop", [0, 1, 5, -3, -2, -1])
def test_a_saved_stream_continues_exactly(tmp_path: Path, stop: int) -> None:
    lengths = random_lengths(400)
    straight = list(make_plan(stream(lengths)))
    stop %= len(straight) + 1
    first = make_plan(stream(lengths))
    for _ in range(stop):
        next(first)
    state = first.state()
    state.save(tmp_path / "stream.npz")
    loaded = StreamState.load(tmp_path / "stream.npz")
    for field in fields(state):
        value, expected = getattr(loaded, field.name), getattr(state, field.name)
        assert type(value) is type(expected)
        np.testing.assert_array_equal(value, expected)
    resumed = list(make_plan(islice(stream(lengths), loaded.num_read, None), state=loaded))
    # Asking for the state changed nothing.
    continued = list(first)
    assert len(resumed) == len(continued) == len(straight) - stop
    for ours, theirs, expected_step in zip(resumed, continued, straight[stop:], strict=True):
        assert ours.counts() == expected_step.counts()
        for step in (ours, theirs):
            for name in ("tokens", "supervised_bits", "offsets"):
                expected = getattr(expected_step.store, name)
                np.testing.assert_array_equal(getattr(step.store, name), expected)
            np.testing.assert_array_equal(weights_of(step), weights_of(expected_step))
        assert numbers_of(ours) == numbers_of(expected_step)


def test_memory_is_bounded_on_an_endless_stream() -> None:
    def endless() -> Iterator[StreamSample]:
        random = np.random.default_rng(0)
        while True:
            length = int(random.integers(1, 101))
            yield StreamSample(np.zeros(length, np.uint32), np.ones(length, np.bool_))

    plan = make_plan(endless())
    held = []
    for _ in range(300):
        next(plan)
        held.append(len(plan.held))
        assert plan.state().ids.size == len(plan.held)
    assert max(held) < 100
    # And what is held is what came last.
    assert min(plan.held) > plan.num_read - 300


def test_steps_feed_filling_and_ranks() -> None:
    lengths = random_lengths(200)
    for step in make_plan(stream(lengths)):
        counts, seen = step.counts(), []
        num_supervised = 0
        for rank in range(2):
            for bins in step.micro_batches(rank, dp_size=2, micro_batch_size=1):
                batch = fill_micro_batch(step.store, np.concatenate(bins), 100)
                batch.check(1000)
                seen += batch.tokens[0, batch.cu_seqlens[:-1].long()].tolist()
                num_supervised += batch.num_supervised
        assert sorted(seen) == sorted(number for one in numbers_of(step) for number in one)
        assert counts.num_supervised == num_supervised
        assert counts.num_samples == len(seen)
        assert counts.num_tokens == sum(lengths[number] for number in seen)
        assert counts.capacity_tokens == 400


def test_supervised_tokens_exclude_the_first() -> None:
    sample = StreamSample(np.array([5, 6, 7], np.uint32), np.array([True, False, True]))
    step = next(make_plan(iter([sample])))
    assert step.counts().num_supervised == 1


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (
            StreamSample(np.zeros(101, np.uint32), np.zeros(101, np.bool_)),
            "sample 2 has 101 tokens",
        ),
        (StreamSample(np.zeros(0, np.uint32), np.zeros(0, np.bool_)), "sample 2 has 0 tokens"),
        (StreamSample(np.zeros(3, np.int64), np.zeros(3, np.bool_)), "sample 2 .* int64 tokens"),
        (StreamSample(np.zeros(3, np.uint32), np.zeros(3, np.uint8)), "a uint8 mask"),
        (StreamSample(np.zeros(3, np.uint32), np.zeros(4, np.bool_)), "expected equal shapes"),
        (StreamSample(np.zeros((1, 3), np.uint32), np.zeros((1, 3), np.bool_)), "2-d uint32"),
    ],
)
def test_a_bad_sample_is_named(sample: StreamSample, problem: str) -> None:
    samples = [*stream([5, 6]), sample]
    with pytest.raises(ValueError, match=problem):
        next(make_plan(iter(samples)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"capacity": 0}, "packing.capacity is 0"),
        ({"capacity": 2**70}, "packing.capacity is 1180591620717411303424"),
        ({"seed": -1}, "seed -1"),
        ({"global_batch_size": 0}, "train.global_batch_size 0"),
        ({"options": PackingOptions(alignment=7)}, "multiple of packing.alignment .7."),
    ],
    ids=str,
)
def test_arguments_out_of_range(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_plan(stream([1]), **changes)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 4}, {"capacity": 120}, {"options": PackingOptions()}, {"global_batch_size": 5}],
    ids=str,
)
def test_a_state_of_other_options_is_refused(changes: dict[str, Any]) -> None:
    state = make_plan(stream([1, 2])).state()
    with pytest.raises(ValueError, match="the saved stream was packed with version="):
        make_plan(stream([1, 2]), state=state, **changes)
