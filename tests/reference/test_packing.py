"""The packing oracles, proved against exhaustive search and against per-token definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_fast.constants import IGNORE_INDEX
from sft_fast.reference.packing import best_fit_decreasing, fill_row


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying every bin for every sample."""

    def search(sample: int, free: list[int], best: int) -> int:
        if len(free) >= best:
            return best
        if sample == len(lengths):
            return len(free)
        for b in range(len(free)):
            if free[b] >= lengths[sample]:
                free[b] -= lengths[sample]
                best = search(sample + 1, free, best)
                free[b] += lengths[sample]
        return search(sample + 1, [*free, capacity - lengths[sample]], best)

    return search(0, [], len(lengths) + 1)


@st.composite
def packing_problems(draw: st.DrawFn, max_size: int = 8) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 30))
    return draw(st.lists(st.integers(1, capacity), max_size=max_size)), capacity


@given(packing_problems())
def test_best_fit_decreasing_is_within_its_bound_of_the_optimum(
    problem: tuple[list[int], int],
) -> None:
    lengths, capacity = problem
    optimum = fewest_bins(lengths, capacity)
    # The absolute worst case of any-fit decreasing is 3/2 (D. Simchi-Levi, 1994).
    assert optimum <= len(best_fit_decreasing(lengths, capacity)) <= 3 * optimum // 2


@given(packing_problems(max_size=40))
def test_every_sample_once_and_no_bin_over_capacity(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(sample for one in bins for sample in one) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in one) <= capacity for one in bins)


def test_takes_the_fullest_bin_that_fits() -> None:
    # 6 and 5 open two bins; 4 fits both and must choose the fuller; 3 then fits only the other.
    assert best_fit_decreasing([3, 4, 5, 6], capacity=10) == [[3, 1], [2, 0]]


def test_is_not_always_optimal() -> None:
    # 4+3+3 and 4+3+3 fill two bins, but 4+4 are put together first.
    lengths = [3, 3, 3, 3, 4, 4]
    assert fewest_bins(lengths, 10) == 2
    assert len(best_fit_decreasing(lengths, 10)) == 3


@pytest.mark.parametrize("num_rows", [9, 12])
def test_fill_row_by_hand(num_rows: int) -> None:
    # Samples: 0 = [10 11 12*], 1 = [20* 21* 22 23*], 2 = [30* 31*]; * = supervised.
    tokens = np.array([10, 11, 12, 20, 21, 22, 23, 30, 31], dtype=np.uint32)
    supervised = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1], dtype=np.uint8)
    row = fill_row(
        tokens,
        np.packbits(supervised, bitorder="little"),
        np.array([0, 3, 7, 9]),
        sample_ids=[1, 2, 0],
        num_rows=num_rows,
    )
    pad, ignored = num_rows - 9, IGNORE_INDEX
    assert row.tokens.tolist() == [20, 21, 22, 23, 30, 31, 10, 11, 12] + [0] * pad
    labels = [21, ignored, 23, ignored, 31, ignored, ignored, 12, ignored]
    assert row.labels.tolist() == labels + [ignored] * pad
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2] + [0] * pad
    assert row.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert row.active_rows.tolist() == [0, 2, 4, 7]
    dtypes = {name: array.dtype for name, array in row._asdict().items()}
    assert dtypes.pop("cu_seqlens") == np.int32
    assert set(dtypes.values()) == {np.dtype(np.int64)}


def test_fill_row_without_samples_is_padding() -> None:
    row = fill_row(
        np.zeros(0, np.uint32), np.zeros(0, np.uint8), np.zeros(1, np.int64), [], num_rows=3
    )
    assert row.tokens.tolist() == row.position_ids.tolist() == [0, 0, 0]
    assert row.labels.tolist() == [IGNORE_INDEX] * 3
    assert row.cu_seqlens.tolist() == [0]
    assert row.active_rows.size == 0
