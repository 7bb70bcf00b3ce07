"""Filling and copying micro-batches to the device while it computes.

    pytest benchmarks/bench_loader.py

`alone_us` is what a micro-batch costs when nobody computes; `wait_share` the part of the time that
a consumer, which multiplies matrices for some milliseconds per micro-batch, waits for the next one.
"""

import time

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sft_fast.packing.prefetch import BatchLoader, PlannedSequence
from timing import DEVICE, ON_GPU
from tiny import ListStore

SEQ_LENGTH = 8192
NUM_BATCHES = 50


def make_store(num_tokens: int) -> ListStore:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4.8, 0.65, num_tokens // 100)).clip(16, 2048).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = rng.integers(0, 128256, offsets[-1], dtype=np.uint32)
    bits = np.packbits(rng.random(offsets[-1]) < 0.4, bitorder="little")
    return ListStore(tokens, bits, offsets)


def open_loader(store: ListStore) -> BatchLoader:
    ends = store.offsets[1:]
    edges = np.searchsorted(ends, np.arange(1, NUM_BATCHES + 1) * (SEQ_LENGTH - 2048))
    sequences = [
        PlannedSequence(store, np.arange(first, last), SEQ_LENGTH)
        for first, last in zip(np.concatenate([[0], edges[:-1]]), edges, strict=True)
    ]
    return BatchLoader(sequences, DEVICE, max_length=SEQ_LENGTH, max_samples=SEQ_LENGTH)


@pytest.mark.parametrize("size", [2048, 6144] if ON_GPU else [256, 512])
def test_overlap(benchmark: BenchmarkFixture, size: int) -> None:
    store = make_store(NUM_BATCHES * SEQ_LENGTH)
    with open_loader(store) as loader:
        begin = time.perf_counter()
        num_tokens = sum(batch.num_tokens for batch in loader)
        synchronise()
        alone_s = time.perf_counter() - begin
    factor = torch.randn(size, size, device=DEVICE)
    waited_s, begin = 0.0, time.perf_counter()
    with open_loader(store) as loader:
        for _ in range(NUM_BATCHES):
            asked = time.perf_counter()
            next(loader)
            waited_s += time.perf_counter() - asked
            for _ in range(8):
                factor @ factor
            synchronise()
        total_s = time.perf_counter() - begin
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        alone_us=1e6 * alone_s / NUM_BATCHES,
        tokens_per_s_alone=num_tokens / alone_s,
        consumer_ms=1e3 * (total_s - waited_s) / NUM_BATCHES,
        wait_share=waited_s / total_s,
    )


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
