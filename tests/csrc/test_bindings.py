"""The C++ boundary: what it accepts, what it refuses, that it releases the GIL."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from sft_fast import _C

MAX_CAPACITY = 2**24

all_planners = pytest.mark.parametrize(
    "planner", [partial(_C.plan, name) for name in _C.STRATEGIES], ids=_C.STRATEGIES
)


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@all_planners
@pytest.mark.parametrize(
    ("lengths", "problem"),
    [
        (int32(3, -1, 2), "sample 1 has -1 tokens"),
        (int32(3, 2, 0), "sample 2 has 0 tokens"),
        (int32(9, 2), "sample 0 has 9 tokens; expected 1 to 8 .packing.capacity"),
        (int32(-(2**31)), "sample 0 has -2147483648 tokens"),
        (int32(2**31 - 1), "sample 0 has 2147483647 tokens"),
        (np.array([3, 2]), "int64 array; expected .* int32"),
        (np.array([3, 2], dtype=np.uint32), "uint32 array"),
        (np.array([3, 2], dtype=">i4"), ">i4 array"),
        (np.array([3.0]), "float64 array"),
        (np.array([None]), "object array"),
        (int32(1, 2, 3, 4)[::2], "contiguous"),
        (int32(1, 2, 3, 4)[::-1], "contiguous"),
        (int32(1, 2, 3, 4).reshape(2, 2), "2-d int32"),
        (np.zeros((), np.int32), "0-d int32"),
        (np.frombuffer(b"\0" * 9, dtype=np.int32, offset=1, count=2), "aligned"),
    ],
    ids=str,
)
def test_planners_refuse_bad_lengths(
    planner: Callable[..., Any], lengths: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        planner(lengths, capacity=8, seed=0, epoch=0)


@all_planners
@pytest.mark.parametrize("lengths", [[3, 2], None, "32", 3])
def test_planners_convert_nothing(planner: Callable[..., Any], lengths: Any) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        planner(lengths, capacity=8, seed=0, epoch=0)


@all_planners
@pytest.mark.parametrize("capacity", [0, -1, -(2**63), MAX_CAPACITY + 1, 2**63 - 1])
def test_planners_refuse_bad_capacity(planner: Callable[..., Any], capacity: int) -> None:
    with pytest.raises(ValueError, match=f"packing.capacity is {capacity}; expected 1 to"):
        planner(int32(1), capacity=capacity, seed=0, epoch=0)


@all_planners
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alignment": 0}, "packing.alignment is 0; expected 1 to 8"),
        ({"alignment": -(2**63)}, "packing.alignment is -9223372036854775808"),
        ({"alignment": 9}, "packing.alignment is 9; expected 1 to 8"),
        ({"alignment": 3}, "packing.capacity is 8; expected a multiple of packing.alignment .3."),
        ({"max_samples": -1}, "packing.max_samples_per_bin is -1; expected 0 to"),
        ({"max_samples": 2**31}, "packing.max_samples_per_bin is 2147483648"),
        ({"pool_size": 0}, "packing.pool_size is 0; expected 1 to"),
        ({"pool_size": 2**40}, "packing.pool_size is 1099511627776"),
    ],
    ids=str,
)
def test_planners_refuse_bad_options(
    planner: Callable[..., Any], options: dict[str, int], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        planner(int32(1), capacity=8, seed=0, epoch=0, **options)


@pytest.mark.parametrize("order", [_C.bin_order, _C.sample_order])
def test_orders(order: Callable[[int, int, int], np.ndarray]) -> None:
    assert order(0, 1, 2).tolist() == []
    assert sorted(order(100, 1, 2).tolist()) == list(range(100))
    for count in (-1, 2**31, 2**63 - 1):
        with pytest.raises(ValueError, match=f"count is {count}; expected 0 to"):
            order(count, 1, 2)


def test_orders_of_bins_and_samples_are_not_the_same() -> None:
    assert _C.bin_order(100, 1, 2).tolist() != _C.sample_order(100, 1, 2).tolist()


@all_planners
def test_planners_without_samples(planner: Callable[..., Any]) -> None:
    sample_ids, bin_offsets, order = planner(int32(), capacity=8, seed=0, epoch=0)
    assert (sample_ids.tolist(), bin_offsets.tolist(), order.tolist()) == ([], [0], [])
    assert (sample_ids.dtype, bin_offsets.dtype, order.dtype) == (np.uint32, np.int64, np.uint32)


@all_planners
@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4096, 4097, MAX_CAPACITY])
def test_planners_with_one_sample_that_fills_its_bin(
    planner: Callable[..., Any], capacity: int
) -> None:
    sample_ids, bin_offsets, order = planner(int32(capacity), capacity, seed=1, epoch=1)
    assert (sample_ids.tolist(), bin_offsets.tolist(), order.tolist()) == ([0], [0, 1], [0])


def test_more_tokens_than_int32() -> None:
    # 300 bins of 2^24 tokens are 5e9 tokens.
    lengths = np.tile(int32(MAX_CAPACITY - 1, 1), 300)
    sample_ids, bin_offsets, _ = _C.plan("bfd", lengths, MAX_CAPACITY, 0, 0)
    assert bin_offsets.tolist() == list(range(0, 601, 2))
    assert sorted(sample_ids.tolist()) == list(range(600))


@all_planners
def test_results_outlive_the_call_and_are_writeable(planner: Callable[..., Any]) -> None:
    results = [planner(np.full(1000, i + 1, np.int32), 16, seed=i, epoch=0)[0] for i in range(9)]
    assert all(sorted(sample_ids.tolist()) == list(range(1000)) for sample_ids in results)
    results[0][:] = 7
    assert results[0].sum() == 7000


def test_seed_and_epoch_use_all_64_bits() -> None:
    lengths = np.ones(50, np.int32)
    arguments = [(0, 0), (2**63, 0), (2**64 - 1, 0), (0, 2**63), (0, 2**64 - 1), (1, 0), (0, 1)]
    orders = [_C.plan("none", lengths, 1, *pair)[2].tolist() for pair in arguments]
    assert len({tuple(order) for order in orders}) == len(arguments)


def test_planning_releases_the_gil() -> None:
    lengths = np.full(3_000_000, 3, np.int32)
    interval = sys.getswitchinterval()
    # From here on a thread keeps the GIL until it blocks or lets go of it.
    sys.setswitchinterval(1000.0)
    try:
        # A released GIL may still be noticed late on a busy machine; a kept one never is.
        assert any(runs_beside_the_planner(lengths) for _ in range(10))
    finally:
        sys.setswitchinterval(interval)


def runs_beside_the_planner(lengths: np.ndarray) -> bool:
    """True if this thread got to run while another was inside the planner."""
    started, finished = threading.Event(), threading.Event()

    def plan() -> None:
        started.set()
        _C.plan("bfd", lengths, 100, 0, 0)
        finished.set()

    thread = threading.Thread(target=plan)
    thread.start()
    started.wait()
    was_beside = not finished.is_set()
    thread.join()
    return was_beside


def fill_arguments(length: int = 8, num_samples: int = 2) -> dict[str, Any]:
    """Arguments of a valid fill: two samples of 3 and 4 tokens."""
    return {
        "store_tokens": np.arange(10, 17, dtype=np.uint32),
        "supervised_bits": np.array([0xFF], dtype=np.uint8),
        "offsets": np.array([0, 3, 7]),
        "sample_ids": np.arange(num_samples),
        "ignore_index": -100,
        "tokens": np.full(length, -7),
        "labels": np.full(length, -7),
        "position_ids": np.full(length, -7),
        "cu_seqlens": np.full(num_samples + 1, -7, np.int32),
        "active_tokens": np.full(length, -7),
    }


OUTPUTS = ["tokens", "labels", "position_ids", "cu_seqlens", "active_tokens"]


def test_fill_writes_in_place() -> None:
    arguments = fill_arguments()
    assert _C.fill_micro_batch(**arguments) == (7, 5, 4)
    assert arguments["tokens"].tolist() == [10, 11, 12, 13, 14, 15, 16, 0]
    assert arguments["labels"].tolist() == [11, 12, -100, 14, 15, 16, -100, -100]
    assert arguments["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert arguments["cu_seqlens"].tolist() == [0, 3, 7]
    assert arguments["active_tokens"].tolist() == [0, 1, 3, 4, 5, -7, -7, -7]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sample_ids": np.array([0, 2])}, "sample 2 was asked for, .* holds 2 samples"),
        ({"sample_ids": np.array([-1, 0])}, "sample -1 was asked for"),
        ({"sample_ids": np.array([2**62, 0])}, "sample 4611686018427387904"),
        ({"sample_ids": np.array([1, 1, 0]), "cu_seqlens": np.zeros(4, np.int32)}, "token 11 of 8"),
        ({"offsets": np.zeros(0, np.int64)}, "offsets is empty"),
        ({"offsets": np.array([0, 3, 8])}, "damaged: sample 1 spans tokens 3 to 8 of 7"),
        ({"offsets": np.array([0, 3, 2])}, "damaged: sample 1"),
        ({"offsets": np.array([0, 3, 3])}, "damaged: sample 1"),
        ({"offsets": np.array([-1, 3, 7])}, "damaged: sample 0"),
        ({"offsets": np.array([0, 2**63 - 1, 7])}, "damaged: sample 0"),
        ({"offsets": np.array([-(2**63), 3, 7])}, "damaged: sample 0"),
        ({"supervised_bits": np.zeros(0, np.uint8)}, "supervised_bits has 0 .* expected 1"),
        ({"supervised_bits": np.zeros(2, np.uint8)}, "supervised_bits has 2 .* expected 1"),
        ({"store_tokens": np.zeros(7, np.int64)}, "store_tokens is a 1-d int64"),
        ({"store_tokens": np.zeros(14, np.uint32)[::2]}, "store_tokens .* contiguous"),
        ({"sample_ids": np.zeros(2, np.int32)}, "sample_ids is a 1-d int32"),
        ({"cu_seqlens": np.zeros(3, np.int64)}, "cu_seqlens is a 1-d int64"),
        ({"cu_seqlens": np.zeros(2, np.int32)}, "cu_seqlens has 2 elements, expected 3"),
        ({"labels": np.zeros(9, np.int64)}, "labels has 9 elements, expected 8"),
        ({"position_ids": np.zeros(7, np.int64)}, "position_ids has 7 elements, expected 8"),
        ({"active_tokens": np.zeros(5, np.int64)}, "active_tokens has 5 elements, expected 8"),
        ({"tokens": np.zeros(16, np.int64)[::2]}, "tokens .* contiguous"),
        ({"tokens": np.zeros((1, 8), np.int64)}, "tokens is a 2-d"),
        ({"tokens": np.zeros(8, np.int32)}, "labels is a 1-d int64 array; expected .* int32"),
        ({"labels": np.zeros(8, np.int32)}, "labels is a 1-d int32 array; expected .* int64"),
        ({"weights": np.zeros(8, np.float32)}, "weights has 8 elements, expected 0"),
        ({"token_weights": np.ones(7, np.uint16)}, "weights has 0 elements, expected 8"),
        ({"token_weights": np.ones(6, np.uint16)}, "token_weights has 6 elements, expected 7"),
        ({"token_weights": np.ones(7, np.float16)}, "token_weights is a 1-d float16"),
        ({"alignment": 0}, "packing.alignment is 0"),
        ({"alignment": 2**62}, "packing.alignment is 4611686018427387904"),
        ({"alignment": 5}, "sample 1 ends at token 10 of 8"),
        ({"cp_size": 2}, "packing.alignment is 1; expected a multiple of 4"),
        ({"cp_size": 2**62}, "context-parallel rank 0 of 4611686018427387904"),
        ({"cp_rank": 1}, "context-parallel rank 1 of 1"),
        ({"cp_size": 0}, "context-parallel rank 0 of 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_fill_refuses_and_writes_nothing(change: dict[str, Any], problem: str) -> None:
    arguments = fill_arguments() | change
    before = {name: arguments[name].copy() for name in OUTPUTS}
    with pytest.raises(ValueError, match=problem):
        _C.fill_micro_batch(**arguments)
    for name in OUTPUTS:
        np.testing.assert_array_equal(arguments[name], before[name])


@pytest.mark.parametrize("name", OUTPUTS)
def test_fill_refuses_read_only_buffers(name: str) -> None:
    arguments = fill_arguments()
    arguments[name].setflags(write=False)
    with pytest.raises(ValueError, match=f"{name} is read-only"):
        _C.fill_micro_batch(**arguments)


def test_fill_never_changes_its_inputs() -> None:
    arguments = fill_arguments()
    inputs = ["store_tokens", "supervised_bits", "offsets", "sample_ids"]
    before = {name: arguments[name].copy() for name in inputs}
    for name in inputs:
        arguments[name].setflags(write=False)
    _C.fill_micro_batch(**arguments)
    for name in inputs:
        np.testing.assert_array_equal(arguments[name], before[name])


def test_fill_refuses_labels_that_int32_cannot_mark() -> None:
    narrow = {name: np.zeros(8, np.int32) for name in ("tokens", "labels", "position_ids")}
    with pytest.raises(ValueError, match="ignore_index is -2147483649"):
        _C.fill_micro_batch(**(fill_arguments() | narrow | {"ignore_index": -(2**31) - 1}))


def make_stream(**changes: int) -> _C.StreamPacker:
    return _C.StreamPacker(**({"capacity": 8, "seed": 0, "pool_size": 3} | changes))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"capacity": 0}, "packing.capacity is 0"),
        ({"capacity": 2**40}, "packing.capacity is 1099511627776"),
        ({"alignment": 3}, "expected a multiple of packing.alignment .3."),
        ({"max_samples": -1}, "packing.max_samples_per_bin is -1"),
        ({"pool_size": 0}, "packing.pool_size is 0"),
    ],
    ids=str,
)
def test_streams_refuse_bad_options(change: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_stream(**change)


@pytest.mark.parametrize("length", [0, -1, 9, 2**31, 2**63 - 1, -(2**63)])
def test_streams_refuse_bad_lengths(length: int) -> None:
    stream = make_stream()
    stream.add(0, 5)
    with pytest.raises(ValueError, match=f"sample 7 has {length} tokens; expected 1 to 8"):
        stream.add(7, length)
    assert stream.ids().tolist() == [0]


def test_an_empty_stream() -> None:
    stream = make_stream()
    assert stream.needs_more()
    assert stream.ids().tolist() == []
    with pytest.raises(ValueError, match="the pool holds no sample"):
        stream.take_bin()
