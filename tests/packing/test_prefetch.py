"""Prefetching: order, bounds, errors, and closing at any moment."""

import gc
import threading
import time
from collections.abc import Generator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast.packing.micro_batch import SequenceLayout, fill_micro_batch
from sft_fast.packing.prefetch import BatchLoader, PlannedSequence, Prefetcher
from token_stores import ArrayStore, make_store


def counting(log: list[int], stop: int = 10**9) -> Generator[int, None, None]:
    """0, 1, 2, ...; the log holds what was made, and -1 once the generator is closed."""
    try:
        for number in range(stop):
            log.append(number)
            yield number
    finally:
        log.append(-1)


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 5))
def test_all_items_in_order(count: int, depth: int) -> None:
    log: list[int] = []
    with Prefetcher(counting(log, count), depth) as items:
        assert list(items) == list(range(count))
        assert list(items) == []
    assert log == [*range(count), -1]
    assert not items.thread.is_alive()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_ahead(depth: int) -> None:
    log: list[int] = []
    with Prefetcher(counting(log), depth) as items:
        for number in range(20):
            # `depth` are waiting, and one more is made and has no room yet.
            wait_until(lambda made=number + depth + 1: len(log) >= made)
            time.sleep(0.001)
            assert len(log) <= number + depth + 1
            assert next(items) == number


def wait_until(holds: object) -> None:
    end = time.monotonic() + 30
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.0005)


@pytest.mark.parametrize("error", [ValueError("bad sample"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_comes_where_its_item_would(error: BaseException) -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise error

    with Prefetcher(source(), 5) as items:
        assert (next(items), next(items)) == (1, 2)
        with pytest.raises(type(error)) as raised:
            next(items)
        assert raised.value is error
        assert list(items) == []


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 3), st.sampled_from([0.0, 0.0005]))
def test_closing_at_any_moment(num_taken: int, depth: int, pause_s: float) -> None:
    log: list[int] = []
    items = Prefetcher(counting(log), depth)
    assert [next(items) for _ in range(num_taken)] == list(range(num_taken))
    time.sleep(pause_s)
    items.close()
    items.close()
    assert not items.thread.is_alive()
    # The generator was closed, by the thread that ran it.
    assert log[-1] == -1
    assert list(items) == []


def test_closing_while_the_source_works_and_while_a_consumer_waits() -> None:
    started, may_go_on = threading.Event(), threading.Event()

    def source() -> Generator[int, None, None]:
        started.set()
        may_go_on.wait(30)
        yield 1

    items = Prefetcher(source())
    taken: list[list[int]] = []
    consumer = threading.Thread(target=lambda: taken.append(list(items)))
    consumer.start()
    started.wait(30)
    closer = threading.Thread(target=items.close)
    closer.start()
    consumer.join(30)
    # The consumer was let go at once, though the source is still busy.
    assert taken == [[]]
    may_go_on.set()
    closer.join(30)
    assert not items.thread.is_alive()


def test_closing_from_many_threads() -> None:
    for _ in range(50):
        log: list[int] = []
        items = Prefetcher(counting(log), 2)
        closers = [threading.Thread(target=items.close) for _ in range(4)]
        for closer in closers:
            closer.start()
        for _ in items:
            pass
        for closer in closers:
            closer.join(30)
        assert log[-1] == -1


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetcher(counting([]), 0)


def sequences_of(store: ArrayStore, count: int) -> list[PlannedSequence]:
    random = np.random.default_rng(0)
    sequences = []
    for _ in range(count):
        sample_ids = random.integers(0, len(store.offsets) - 1, random.integers(0, 5))
        length = 4 * int(random.integers(20, 40)) * 4
        sequences.append(PlannedSequence(store, sample_ids, length))
    return sequences


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("reuse_buffers", [None, True])
def test_loading_equals_filling(reuse_buffers: bool | None, dtype: torch.dtype) -> None:
    store = make_store([3, 9, 1, 12, 60], [True] * 85)
    store.tokens >>= np.uint32(1)
    sequences, layout = sequences_of(store, 60), SequenceLayout(4, 2, 1)
    with BatchLoader(
        iter(sequences),
        "cpu",
        max_length=1000,
        max_samples=5,
        layout=layout,
        dtype=dtype,
        reuse_buffers=reuse_buffers,
    ) as loader:
        # All are kept until the end, so a buffer that was used again too early would show.
        batches = list(loader)
    assert len(batches) == len(sequences)
    for batch, (_, sample_ids, seq_length) in zip(batches, sequences, strict=True):
        batch.check(2**32)
        expected = fill_micro_batch(store, sample_ids, seq_length, layout=layout, dtype=dtype)
        for name in ("tokens", "labels", "position_ids", "cu_seqlens", "active_tokens"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))


def test_loading_says_what_is_wrong_and_stops() -> None:
    store = make_store([3, 9], [True] * 12)
    lengths = {0: 8, 7: 8, 1: 9}
    sequences = [PlannedSequence(store, np.array([id]), n) for id, n in lengths.items()]
    with BatchLoader(sequences, "cpu", max_length=9, max_samples=2) as loader:
        assert next(loader).num_tokens == 3
        with pytest.raises(ValueError, match="sample 7 was asked for"):
            next(loader)
    with (
        BatchLoader(sequences, "cpu", max_length=4, max_samples=2, reuse_buffers=True) as loader,
        pytest.raises(ValueError, match="buffers hold 4 tokens"),
    ):
        next(loader)


def test_early_close_of_a_loader_leaves_no_thread_and_no_crash() -> None:
    store = make_store([500] * 50, [True] * 25_000)
    threads = threading.active_count()
    for number in range(30):
        sequences = (PlannedSequence(store, np.arange(50), 25_000) for _ in range(1000))
        loader = BatchLoader(
            sequences, "cpu", max_length=25_000, max_samples=50, reuse_buffers=number % 2 == 0
        )
        for _ in range(number % 4):
            next(loader)
        loader.close()
        del loader
        gc.collect()
    assert threading.active_count() == threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loading_to_a_gpu_does_not_mix_batches() -> None:
    store = make_store([3, 9, 1, 12, 60] * 50, [True] * 4250)
    sequences = [
        PlannedSequence(store, np.random.default_rng(i).integers(0, 250, 40), 2400)
        for i in range(200)
    ]
    with BatchLoader(sequences, "cuda", max_length=2400, max_samples=40) as loader:
        batches = list(loader)
    for batch, sequence in zip(batches, sequences, strict=True):
        expected = fill_micro_batch(*sequence)
        assert torch.equal(batch.tokens.cpu(), expected.tokens)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        assert torch.equal(batch.active_tokens, expected.active_tokens)
