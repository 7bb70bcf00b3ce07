"""Choices of the config section `packing`; imports nothing, because config imports it."""

from typing import Literal

MAX_CAPACITY = 2**24
"""Limit of `packing.capacity`, in tokens."""
MAX_POOL_SIZE = 2**22
"""Limit of `packing.pool_size`, in samples."""
MAX_SAMPLES_PER_BIN = 2**31 - 1
"""Limit of `packing.max_samples_per_bin`."""

Strategy = Literal["auto", "bfd", "window", "sequential", "none"]
"""Value of `packing.strategy`: a planner of sft_fast._C, or the choice between two of them."""

STRATEGY_HELP = (
    "bfd = best-fit decreasing: fewest packs, but short samples share them with short ones; window "
    "= random order, each pack filled exactly from the samples next in line; sequential = in the "
    "order of the data; none = one sample per pack; auto = window, unless it needs over 0.2 % more "
    "packs than bfd."
)
"""The strategies in words, for the configuration's schema."""
