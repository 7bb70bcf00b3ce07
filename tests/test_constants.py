import numpy as np
import pytest

from sft_fast.constants import ceil_div, round_up


@pytest.mark.parametrize("divisor", [1, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 10**18 + 1])
def test_rounding_is_exact(count: int, divisor: int) -> None:
    parts = ceil_div(count, divisor)
    assert (parts - 1) * divisor < count <= parts * divisor
    assert round_up(count, divisor) == parts * divisor


def test_an_array_keeps_its_dtype() -> None:
    lengths = np.array([0, 1, 4, 5], np.int32)
    assert round_up(lengths, 4).dtype == np.int32
    assert round_up(lengths, 4).tolist() == [0, 4, 4, 8]
    assert ceil_div(lengths, 4).tolist() == [0, 1, 1, 2]
