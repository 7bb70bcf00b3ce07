"""Planning and filling: nanoseconds per sample and per token, against the oracles and a copy.

pytest benchmarks/bench_packing.py -m "not slow"
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from sft_fast import _C
from sft_fast.batch import fill_micro_batch
from sft_fast.constants import IGNORE_INDEX
from sft_fast.packing import BinPlan, plan_bins
from sft_fast.reference.packing import best_fit_decreasing, fill_row

# Lognormal lengths: mean, sigma of the logarithm, shortest. Shaped like instruction, chat and code.
LENGTHS = {"instruction": (150, 0.65, 16), "chat": (1200, 0.75, 32), "code": (3000, 1.2, 32)}
CAPACITIES = (4096, 32768)
# The textbook algorithm is quadratic, so it is timed and compared on fewer samples.
NUM_ORACLE_SAMPLES = 2000
NUM_STORE_TOKENS = 40_000_000
NUM_ROWS_PER_ROUND = 1_048_576


def draw_lengths(family: str, num_samples: int, capacity: int) -> NDArray[np.int32]:
    mean, sigma, shortest = LENGTHS[family]
    logarithms = np.random.default_rng(0).normal(np.log(mean) - sigma**2 / 2, sigma, num_samples)
    return np.exp(logarithms).clip(shortest, capacity).astype(np.int32)


def seconds(function: Callable[[], object], rounds: int = 3) -> float:
    """The fastest of a few runs."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def fastest_s(benchmark: BenchmarkFixture) -> float:
    """The fastest round of a benchmark that has run."""
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.min)


def loads(plan: BinPlan, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.add.reduceat(lengths[plan.sample_ids].astype(np.int64), plan.bin_offsets[:-1])


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("family", LENGTHS)
@pytest.mark.parametrize("num_samples", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_plan_bfd(
    benchmark: BenchmarkFixture, num_samples: int, family: str, capacity: int
) -> None:
    lengths = draw_lengths(family, num_samples, capacity)
    few = lengths[:NUM_ORACLE_SAMPLES]
    oracle = best_fit_decreasing(few.tolist(), capacity)
    oracle_loads = sorted(int(few[one].sum()) for one in oracle)
    assert sorted(loads(plan_bins(few, capacity), few)) == oracle_loads
    plan = plan_bins(lengths, capacity)
    assert loads(plan, lengths).max() <= capacity
    assert np.array_equal(np.sort(plan.sample_ids), np.arange(num_samples))

    benchmark.group = f"plan, {num_samples} samples"
    benchmark.pedantic(plan_bins, (lengths, capacity), rounds=20, warmup_rounds=2)
    oracle_s = seconds(lambda: best_fit_decreasing(few.tolist(), capacity), rounds=1)
    ns_per_sample = fastest_s(benchmark) / num_samples * 1e9
    bound = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    outputs = (plan.sample_ids, plan.bin_offsets, plan.order)
    benchmark.extra_info.update(
        ns_per_sample=round(ns_per_sample, 2),
        bins_over_bound=round(plan.num_bins / bound - 1, 6),
        bytes=lengths.nbytes + sum(array.nbytes for array in outputs),
        times_oracle_per_sample=round(oracle_s / NUM_ORACLE_SAMPLES * 1e9 / ns_per_sample),
    )


@dataclass
class ArrayStore:
    """A token store in memory."""

    tokens: NDArray[np.uint32]
    supervised_bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]


def make_store(family: str, capacity: int) -> ArrayStore:
    """Random tokens; the first third of every sample is a prompt."""
    lengths = draw_lengths(family, NUM_STORE_TOKENS // LENGTHS[family][0], capacity)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.random.default_rng(0).integers(0, 128_000, offsets[-1], dtype=np.uint32)
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    supervised = position >= np.repeat(lengths // 3, lengths)
    return ArrayStore(tokens, np.packbits(supervised, bitorder="little"), offsets)


def row_buffers(num_rows: int) -> dict[str, NDArray[Any]]:
    names = ("tokens", "labels", "position_ids", "active_rows")
    return {name: np.empty(num_rows, np.int64) for name in names}


@pytest.mark.parametrize("target", ["reused buffers", "new tensors"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("family", LENGTHS)
def test_fill(benchmark: BenchmarkFixture, family: str, capacity: int, target: str) -> None:
    store = make_store(family, capacity)
    plan = plan_bins(np.diff(store.offsets), capacity)
    num_bins = min(NUM_ROWS_PER_ROUND // capacity, plan.num_bins)
    bins = [plan.bin(index) for index in range(num_bins)]
    buffers = row_buffers(capacity)

    def fill_reused() -> None:
        for sample_ids in bins:
            _C.fill_micro_batch(
                store.tokens,
                store.supervised_bits,
                store.offsets,
                sample_ids,
                ignore_index=IGNORE_INDEX,
                cu_seqlens=np.empty(len(sample_ids) + 1, np.int32),
                **buffers,
            )

    def fill_new() -> None:
        for sample_ids in bins:
            fill_micro_batch(store, sample_ids, capacity)

    # The oracle unpacks the whole mask each time; that is its own cost, so it gets a store of one
    # bin's samples.
    expected = oracle_row(store, bins[-1], capacity)
    batch = fill_micro_batch(store, bins[-1], capacity)
    fill_reused()
    for name in ("tokens", "labels", "position_ids"):
        wanted = getattr(expected, name)
        np.testing.assert_array_equal(getattr(batch, name).numpy()[0], wanted)
        np.testing.assert_array_equal(buffers[name], wanted)
    np.testing.assert_array_equal(batch.active_rows.numpy(), expected.active_rows)

    benchmark.group = f"fill, rows of {capacity}"
    fill = fill_reused if target == "reused buffers" else fill_new
    benchmark.pedantic(fill, rounds=10, warmup_rounds=2)
    num_tokens = int(sum(np.diff(store.offsets)[sample_ids].sum() for sample_ids in bins))
    num_written = num_bins * capacity
    # Read: ids of 4 bytes. Written: tokens, labels and positions of 8.
    num_bytes = 4 * num_tokens + 24 * num_written
    source, copy = np.ones(capacity * 3, np.int64), np.empty(capacity * 3, np.int64)
    copy_s = num_bins * seconds(lambda: np.copyto(copy, source), rounds=50)
    oracle_s = num_bins * seconds(lambda: oracle_row(store, bins[-1], capacity))
    elapsed_s = fastest_s(benchmark)
    benchmark.extra_info.update(
        ns_per_token=round(elapsed_s / num_tokens * 1e9, 3),
        bytes=num_bytes,
        gb_per_s=round(num_bytes / elapsed_s / 1e9, 1),
        times_copy=round(elapsed_s / copy_s, 2),
        times_oracle=round(oracle_s / elapsed_s, 1),
    )


def oracle_row(store: ArrayStore, sample_ids: NDArray[np.int64], num_rows: int) -> Any:
    """The oracle over a store that holds only `sample_ids`."""
    spans = [slice(store.offsets[i], store.offsets[i + 1]) for i in sample_ids]
    supervised = [
        np.unpackbits(
            store.supervised_bits[span.start // 8 : -(-span.stop // 8)], bitorder="little"
        )[span.start % 8 :][: span.stop - span.start]
        for span in spans
    ]
    return fill_row(
        np.concatenate([store.tokens[span] for span in spans]),
        np.packbits(np.concatenate(supervised), bitorder="little"),
        np.cumsum([0, *(span.stop - span.start for span in spans)]),
        range(len(spans)),
        num_rows,
    )
