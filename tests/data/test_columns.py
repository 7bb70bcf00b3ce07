"""Columns of integers: what goes in comes out, at any width and any place."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast.data.columns import BLOCK, Column, ColumnEncoder

BOUNDS = [0, 1, 255, 256, 65535, 65536, 2**32 - 1]


@settings(deadline=None)
@given(st.data())
def test_values_and_sums_come_back(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 700]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = np.zeros(size, np.int64)
    for start in range(0, size, BLOCK):
        # Each block has a least value and a width of its own.
        low, high = sorted(data.draw(st.tuples(st.sampled_from(BOUNDS), st.sampled_from(BOUNDS))))
        part = values[start : start + BLOCK]
        part[:] = random.integers(low, high, len(part), endpoint=True)
        part[:1], part[-1:] = low, high
    column = Column.of(values.astype(np.uint32))
    stops = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    encoder, taken = ColumnEncoder(), []
    for start, stop in pairwise([0, *stops, size]):
        encoder.extend(values[start:stop].astype(np.uint32))
        taken.append(encoder.take(last=False))
    taken.append(encoder.take(last=True))
    for name, parts in zip(("blocks", "data"), zip(*taken, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), getattr(column, name))
    assert column.values().dtype == np.uint32
    np.testing.assert_array_equal(column.values(), values)
    for stop in {0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 300, size - 1, size} & {*range(size + 1)}:
        assert column.sum(stop) == values[:stop].sum()


@pytest.mark.parametrize(
    ("spread", "width"), [(0, 0), (1, 1), (255, 1), (256, 2), (65535, 2), (65536, 4)]
)
def test_a_block_takes_the_bytes_of_its_spread(spread: int, width: int) -> None:
    values = np.full(BLOCK, 10**9, np.uint32)
    values[7] += spread
    assert Column.of(values).data.size == width * BLOCK
