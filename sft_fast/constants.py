"""Numbers and roundings that more than one module must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sft_fast.models.choices import Dtype

Count = TypeVar("Count", int, "NDArray[Any]")

IGNORE_INDEX = -100
DTYPE_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Name of a dtype in the configuration -> size of one value."""


def ceil_div(count: Count, divisor: int) -> Count:
    """The least number of parts of `divisor` that hold `count`; elementwise for an array."""
    return -(-count // divisor)


def round_up(count: Count, multiple: int) -> Count:
    """The least multiple of `multiple` that is not below `count`; elementwise for an array."""
    return ceil_div(count, multiple) * multiple
