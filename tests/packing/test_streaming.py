"""Packing a stream: every sample once, bounded memory, and a state that continues exactly."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast import _C
from sft_fast.data.memory_store import StreamSample
from sft_fast.data.store import DataReport
from sft_fast.data.stream import StreamState
from sft_fast.packing.bins import PackingOptions, plan_bins
from sft_fast.packing.micro_batch import fill_micro_batch
from sft_fast.packing.steps import Step
from sft_fast.packing.streaming import StreamPlan, StreamPlanState


class Endless:
    """Sample i consists of tokens i, as many as lengths[i % len(lengths)]; i % 3 are supervised.

    Every fifth sample has the weight 1 + i / 8.
    """

    def __init__(self, lengths: Any, begin: int = 0, end: int | None = None) -> None:
        numbers = count(begin) if end is None else range(begin, end)
        self.samples: Iterator[StreamSample] = (self.sample(i, lengths) for i in numbers)

    def sample(self, number: int, lengths: Any) -> StreamSample:
        length = int(lengths[number % len(lengths)])
        supervised = np.arange(length) >= length - number % 3
        weights = np.full(length, 1 + number / 8, np.float16) if number % 5 == 0 else None
        return StreamSample(
            np.full(length, number, np.uint32), supervised, weights, f"a.jsonl:{number}"
        )

    def __next__(self) -> StreamSample:
        return next(self.samples)

    def state(self) -> StreamState:
        return StreamState((), DataReport(), (), (), 0, ())

    def restore(self, state: StreamState) -> None:
        pass


def make_plan(samples: Any, **changes: Any) -> StreamPlan:
    options: dict[str, Any] = {
        "capacity": 100,
        "global_batch_size": 4,
        "seed": 3,
        "options": PackingOptions(pool_size=20),
    }
    return StreamPlan(samples, **(options | changes))


def numbers_of(step: Step) -> list[list[int]]:
    """The samples of each bin, by their number in the stream."""
    assert step.store is not None
    first = step.store.tokens[step.store.offsets[:-1]]
    return [first[one].tolist() for one in step.bins]


def random_lengths(number: int, longest: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest + 1, number)


@settings(deadline=None, max_examples=50)
@given(
    longest=st.integers(1, 100),
    pool_size=st.integers(1, 40),
    max_samples=st.none() | st.integers(1, 5),
    global_batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
)
def test_no_sample_twice_none_lost_and_no_bin_over_capacity(
    longest: int, pool_size: int, max_samples: int | None, global_batch_size: int, seed: int
) -> None:
    lengths = random_lengths(97, longest)
    options = PackingOptions(4, max_samples, pool_size)
    plan = make_plan(
        Endless(lengths), options=options, global_batch_size=global_batch_size, seed=seed
    )
    steps = [plan.step(number) for number in range(20)]
    bins = [one for step in steps for one in numbers_of(step)]
    assert [len(step.bins) for step in steps] == [global_batch_size] * 20
    packed = [number for one in bins for number in one]
    held = plan.snapshot().ids.tolist()
    assert sorted(packed + held) == list(range(plan.num_read))
    for one in bins:
        assert 0 < sum(-(-int(lengths[n % 97]) // 4) * 4 for n in one) <= 100
        assert len(one) <= (max_samples or 100)


def test_equals_the_window_strategy_in_the_same_order() -> None:
    lengths = random_lengths(500).astype(np.int32)
    options = PackingOptions(pool_size=30)
    planned = plan_bins(lengths, 100, "window", seed=3, epoch=0, options=options)
    order = _C.sample_order(500, 3, 0)
    plan = make_plan(Endless(lengths[order]), options=options)
    # The end of an epoch packs what is left; a stream never comes there.
    num_steps = planned.num_bins // 4 - 20
    streamed = [one for step in range(num_steps) for one in numbers_of(plan.step(step))]
    expected = [planned.bin(index).tolist() for index in range(4 * num_steps)]
    assert [order[one].tolist() for one in streamed] == expected


@pytest.mark.parametrize("stop", [1, 2, 30])
def test_a_saved_plan_continues_exactly(tmp_path: Path, stop: int) -> None:
    lengths = random_lengths(101)
    straight = make_plan(Endless(lengths))
    first = make_plan(Endless(lengths))
    # What was made ahead of the saved step does not count.
    first.step(stop + 3)
    path = tmp_path / "stream.safetensors"
    path.write_bytes(first.state(stop).to_bytes())
    state = StreamPlanState.read(path)
    resumed = make_plan(Endless(lengths, state.num_read))
    resumed.restore(state, stop)
    for number in range(stop + 20):
        expected = straight.step(number)
        if number < stop:
            continue
        for plan in (resumed, first):
            step = plan.step(number)
            assert step.counts() == expected.counts()
            assert numbers_of(step) == numbers_of(expected)
            assert step.store is not None and expected.store is not None
            for name in ("tokens", "supervised_bits", "offsets", "weights", "origins"):
                np.testing.assert_array_equal(
                    getattr(step.store, name), getattr(expected.store, name)
                )


def test_memory_is_bounded_and_what_is_held_came_last() -> None:
    plan = make_plan(Endless(random_lengths(1000, 100)))
    held = []
    for number in range(300):
        plan.counts(number)
        held.append(len(plan.held))
        assert len(plan.made) == 1
    assert max(held) < 100
    assert min(plan.held) > plan.num_read - 300


def test_steps_feed_filling_and_ranks() -> None:
    lengths = random_lengths(200)
    plan = make_plan(Endless(lengths))
    for number in range(20):
        step, seen, num_supervised = plan.step(number), [], 0
        assert step.store is not None
        for rank in range(2):
            for bins in step.micro_batches(rank, dp_size=2, micro_batch_size=1):
                batch = fill_micro_batch(step.store, np.concatenate(bins), 100)
                batch.check(10**6)
                seen += batch.tokens[0, batch.cu_seqlens[:-1].long()].tolist()
                num_supervised += batch.num_supervised
        counts = step.counts()
        assert sorted(seen) == sorted(n for one in numbers_of(step) for n in one)
        assert counts.num_supervised == num_supervised
        assert counts.num_samples == len(seen)
        assert counts.num_tokens == sum(lengths[n % 200] for n in seen)
        assert counts.capacity_tokens == 400


def test_samples_know_their_record() -> None:
    step = make_plan(Endless([30])).step(0)
    assert step.store is not None
    for place, number in enumerate(n for one in numbers_of(step) for n in one):
        tokens, supervised = step.store.sample(place)
        assert tokens.tolist() == [number] * 30
        assert supervised.tolist() == [False] * (30 - number % 3) + [True] * (number % 3)
        assert step.store.origin(place) == f"a.jsonl:{number}"


def test_a_sample_longer_than_a_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 2 has 101 tokens"):
        make_plan(Endless([5, 6, 101])).step(0)


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
        make_plan(Endless([1]), **changes)


def test_asking_in_two_threads_gives_the_same_steps() -> None:
    lengths = random_lengths(103)
    plan, alone = make_plan(Endless(lengths)), make_plan(Endless(lengths))
    with ThreadPoolExecutor(4) as pool:
        steps = list(pool.map(plan.step, [*range(40), *range(40)]))
    expected = [numbers_of(alone.step(number)) for number in range(40)]
    assert [numbers_of(step) for step in steps] == expected * 2
