"""Planning and filling: nanoseconds per sample and per token, against others and plain copies.

pytest benchmarks/bench_packing.py -m "not slow"
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from sft_fast import _C
from sft_fast.constants import IGNORE_INDEX
from sft_fast.data.targets import count_targets
from sft_fast.packing.bins import BinPlan, plan_bins
from sft_fast.packing.micro_batch import MicroBatch, SequenceBuffers, fill_micro_batch
from sft_fast.packing.report import length_correlation, packing_report
from sft_fast.packing.steps import StepPlan
from sft_fast.reference.packing import best_fit_decreasing, fill_sequence

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


def peak_bytes(function: Callable[[], object]) -> int:
    """Resident memory that a call needs at most, beyond what was there before."""
    # What earlier calls freed is given back, and the peak starts anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    kept = function()
    peak = peak_resident_bytes() - before
    del kept
    return peak


def peak_resident_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def loads(plan: BinPlan, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.add.reduceat(lengths[plan.sample_ids].astype(np.int64), plan.bin_offsets[:-1])


def check_plan(plan: BinPlan, lengths: NDArray[np.int32], capacity: int) -> None:
    assert loads(plan, lengths).max() <= capacity
    assert np.array_equal(np.sort(plan.sample_ids), np.arange(len(lengths)))


def skip_unless_available(num_bytes: int) -> None:
    available = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if available < num_bytes:
        pytest.skip(f"needs {num_bytes >> 20} MB of memory, {available >> 20} are available")


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("family", LENGTHS)
@pytest.mark.parametrize("strategy", ["bfd", "window"])
@pytest.mark.parametrize(
    "num_samples",
    [100_000, *(pytest.param(10**n, marks=pytest.mark.slow, id=f"1e{n}") for n in (6, 7, 8))],
)
def test_plan(
    benchmark: BenchmarkFixture, num_samples: int, strategy: str, family: str, capacity: int
) -> None:
    # Lengths, plan, and what the checks make of them.
    skip_unless_available(64 * num_samples)
    lengths = draw_lengths(family, num_samples, capacity)
    few = lengths[:NUM_ORACLE_SAMPLES]
    oracle = best_fit_decreasing(few.tolist(), capacity)
    if strategy == "bfd":
        oracle_loads = sorted(int(few[one].sum()) for one in oracle)
        assert sorted(loads(plan_bins(few, capacity), few)) == oracle_loads
    plan = plan_bins(lengths, capacity, strategy)
    check_plan(plan, lengths, capacity)

    benchmark.group = f"plan, {num_samples} samples"
    rounds = 20 if num_samples <= 10**6 else 4
    benchmark.pedantic(plan_bins, (lengths, capacity, strategy), rounds=rounds, warmup_rounds=2)
    oracle_s = seconds(lambda: best_fit_decreasing(few.tolist(), capacity), rounds=1)
    ns_per_sample = fastest_s(benchmark) / num_samples * 1e9
    bound = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    benchmark.extra_info.update(
        ns_per_sample=round(ns_per_sample, 2),
        bins_over_bound=round(plan.num_bins / bound - 1, 6),
        length_correlation=round(length_correlation(plan, lengths), 3),
        peak_bytes_per_sample=round(
            peak_bytes(lambda: plan_bins(lengths, capacity, strategy)) / num_samples, 1
        ),
        times_oracle_per_sample=round(oracle_s / NUM_ORACLE_SAMPLES * 1e9 / ns_per_sample),
    )


def lightbinpack_obfd(lengths: NDArray[np.int32], capacity: int) -> Callable[[], int]:
    lightbinpack = pytest.importorskip("lightbinpack")
    as_list = lengths.tolist()
    return lambda: len(lightbinpack.obfd(as_list, capacity))


def trl_bfd(lengths: NDArray[np.int32], capacity: int) -> Callable[[], int]:
    data_utils = pytest.importorskip("trl.data_utils")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"input_ids": [np.zeros(n, np.int8) for n in lengths]})

    def pack() -> int:
        # All rows at once; by default it packs 1000 at a time, which is denser in no case.
        options = {"batch_size": None, "load_from_cache_file": False}
        return len(data_utils.pack_dataset(rows, capacity, strategy="bfd", map_kwargs=options))

    return pack


def llamafactory_knapsack(lengths: NDArray[np.int32], capacity: int) -> Callable[[], int]:
    module = pytest.importorskip("llamafactory.data.processor.processor_utils")
    # It empties its list.
    return lambda: len(module.greedy_knapsack(lengths.tolist(), capacity))


def axolotl_multipack(lengths: NDArray[np.int32], capacity: int) -> Callable[[], int]:
    module = pytest.importorskip("axolotl.utils.samplers.multipack")
    options = (capacity, len(lengths), len(lengths), False)
    module.pack_group(lengths[:10].astype(np.int64), 0, *options)  # compiles
    wide = lengths.astype(np.int64)
    return lambda: len(module.pack_group(wide, 0, *options))


PEERS = {
    "lightbinpack": (lightbinpack_obfd, 1_000_000, True),
    "trl": (trl_bfd, 20_000, True),
    "llamafactory": (llamafactory_knapsack, 100_000, False),
    "axolotl": (axolotl_multipack, 100_000, False),
}
"""Name -> how to make a function that packs, the samples it is given, and whether it is best-fit
decreasing as well. What is quadratic gets fewer samples, to its advantage."""


@pytest.mark.slow
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("family", LENGTHS)
@pytest.mark.parametrize("peer", PEERS)
def test_peers(benchmark: BenchmarkFixture, peer: str, family: str, capacity: int) -> None:
    make, num_samples, is_best_fit = PEERS[peer]
    lengths = draw_lengths(family, num_samples, capacity)
    pack = make(lengths, capacity)
    num_bins, num_bins_of_peer = plan_bins(lengths, capacity).num_bins, pack()
    slack = 0.0005 * num_bins + 1
    assert num_bins <= num_bins_of_peer + slack
    assert not is_best_fit or num_bins_of_peer <= num_bins + slack
    benchmark.group = f"peers, {num_samples} samples"
    benchmark.pedantic(pack, rounds=3)
    ours_s = seconds(lambda: plan_bins(lengths, capacity), rounds=20)
    benchmark.extra_info.update(
        ns_per_sample=round(fastest_s(benchmark) / num_samples * 1e9, 2),
        times_ours=round(fastest_s(benchmark) / ours_s, 1),
        bins_over_ours=round(num_bins_of_peer / num_bins - 1, 4),
    )


@pytest.mark.parametrize("num_bins", [64, 512])
def test_micro_batches(benchmark: BenchmarkFixture, num_bins: int) -> None:
    lengths = draw_lengths("chat", 100_000, 32768)
    plan = StepPlan(
        lengths,
        lengths,
        capacity=32768,
        global_batch_size=num_bins,
        strategy="window",
    )
    shares = [plan.micro_batches(0, rank, 8, 1) for rank in range(8)]
    ids = np.concatenate([one for share in shares for bins in share for one in bins])
    assert np.array_equal(np.sort(ids), np.sort(np.concatenate(plan.step_bins(0, 0))))
    benchmark.group = "one rank's share of a step"
    benchmark.pedantic(plan.micro_batches, (0, 3, 8, 1), rounds=50, warmup_rounds=2)
    report = packing_report(plan, dp_size=8)
    benchmark.extra_info.update(
        cost_imbalance=round(report.cost_imbalance, 4),
        cost_imbalance_round_robin=round(report.cost_imbalance_round_robin, 4),
    )


@dataclass
class ArrayStore:
    """A token store in memory."""

    tokens: NDArray[np.uint32]
    supervised_bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float16] | None = None


def make_store(family: str, capacity: int) -> ArrayStore:
    """Random tokens; the first third of every sample is a prompt."""
    lengths = draw_lengths(family, NUM_STORE_TOKENS // LENGTHS[family][0], capacity)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.random.default_rng(0).integers(0, 128_000, offsets[-1], dtype=np.uint32)
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    supervised = position >= np.repeat(lengths // 3, lengths)
    return ArrayStore(tokens, np.packbits(supervised, bitorder="little"), offsets)


def numpy_row(
    store: ArrayStore, supervised: NDArray[np.bool_], sample_ids: NDArray[np.int64], seq_length: int
) -> tuple[NDArray[np.int64], ...]:
    """What is usually written: slices of each sample, concatenated; the mask already unpacked."""
    spans = [slice(store.offsets[i], store.offsets[i + 1]) for i in sample_ids]
    tokens = np.concatenate([store.tokens[span] for span in spans]).astype(np.int64)
    is_target = np.concatenate([supervised[span] for span in spans])
    labels = np.where(is_target, tokens, IGNORE_INDEX)
    labels[:-1] = labels[1:]
    lengths = [span.stop - span.start for span in spans]
    cu_seqlens = np.cumsum([0, *lengths])
    labels[cu_seqlens[1:] - 1] = IGNORE_INDEX
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    padding = (0, seq_length - len(tokens))
    return (
        np.pad(tokens, padding),
        np.pad(labels, padding, constant_values=IGNORE_INDEX),
        np.pad(position_ids, padding),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("target", ["C++ alone", "reused buffers", "new tensors"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("family", LENGTHS)
def test_fill(
    benchmark: BenchmarkFixture, family: str, capacity: int, target: str, dtype: torch.dtype
) -> None:
    store = make_store(family, capacity)
    lengths = np.diff(store.offsets)
    plan = plan_bins(lengths, capacity)
    num_bins = min(NUM_ROWS_PER_ROUND // capacity, plan.num_bins)
    bins = [plan.bin(index) for index in range(num_bins)]
    buffers = SequenceBuffers(capacity, max(map(len, bins)), dtype=dtype)

    arrays = {name: getattr(buffers, name).numpy() for name in ("tokens", "labels", "position_ids")}
    cu_seqlens, active_tokens = buffers.cu_seqlens.numpy(), buffers.active_tokens.numpy()

    def fill_alone() -> None:
        for sample_ids in bins:
            _C.fill_micro_batch(
                store.tokens,
                store.supervised_bits,
                store.offsets,
                sample_ids,
                IGNORE_INDEX,
                *arrays.values(),
                cu_seqlens[: len(sample_ids) + 1],
                active_tokens,
            )

    def fill() -> MicroBatch:
        for sample_ids in bins:
            batch = fill_micro_batch(
                store,
                sample_ids,
                capacity,
                dtype=dtype,
                buffers=buffers if target == "reused buffers" else None,
            )
        return batch

    # The oracle unpacks the whole mask each time; that is its own cost, so it gets a store of one
    # bin's samples.
    expected = oracle_row(store, bins[-1], capacity)
    batch = fill()
    supervised = np.unpackbits(store.supervised_bits, bitorder="little").astype(np.bool_)
    by_numpy = numpy_row(store, supervised, bins[-1], capacity)
    for name, row in zip(("tokens", "labels", "position_ids"), by_numpy, strict=True):
        np.testing.assert_array_equal(getattr(batch, name).numpy()[0], getattr(expected, name))
        np.testing.assert_array_equal(row, getattr(expected, name))
    np.testing.assert_array_equal(batch.active_tokens.numpy(), expected.active_tokens)

    benchmark.group = f"fill, rows of {capacity}, {dtype}"
    run = fill_alone if target == "C++ alone" else fill
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    num_tokens = int(sum(lengths[sample_ids].sum() for sample_ids in bins))
    num_written = num_bins * capacity
    num_active = int(count_targets(store)[0][np.concatenate(bins)].sum())
    # Read: ids of 4 bytes. Written: tokens, labels and positions, and the active rows.
    num_bytes = 4 * num_tokens + 3 * dtype.itemsize * num_written + 8 * num_active
    # The least that can be done: ids copied twice, constants written, in cache.
    ids = store.tokens[:capacity].view(np.int32)
    row = np.empty((3, capacity), np.dtype(str(dtype).removeprefix("torch.")))
    active = np.empty(num_active // num_bins, np.int64)

    def plain_fill() -> None:
        for _ in range(num_bins):
            row[0] = ids
            row[1] = ids
            row[2] = 1
            active[:] = 1

    def fill_by_numpy() -> None:
        for sample_ids in bins:
            numpy_row(store, supervised, sample_ids, capacity)

    elapsed_s = fastest_s(benchmark)
    benchmark.extra_info.update(
        ns_per_token=round(elapsed_s / num_tokens * 1e9, 3),
        bytes=num_bytes,
        gb_per_s=round(num_bytes / elapsed_s / 1e9, 1),
        times_plain_fill=round(elapsed_s / seconds(plain_fill, rounds=20), 2),
        numpy_times_ours=round(seconds(fill_by_numpy) / elapsed_s, 1),
    )


def oracle_row(store: ArrayStore, sample_ids: NDArray[np.int64], seq_length: int) -> Any:
    """The oracle over a store that holds only `sample_ids`."""
    spans = [slice(store.offsets[i], store.offsets[i + 1]) for i in sample_ids]
    supervised = [
        np.unpackbits(
            store.supervised_bits[span.start // 8 : -(-span.stop // 8)], bitorder="little"
        )[span.start % 8 :][: span.stop - span.start]
        for span in spans
    ]
    return fill_sequence(
        np.concatenate([store.tokens[span] for span in spans]),
        np.packbits(np.concatenate(supervised), bitorder="little"),
        np.cumsum([0, *(span.stop - span.start for span in spans)]),
        range(len(spans)),
        seq_length,
    )
