"""Choices of the section `packing` of a configuration; imports nothing, for config imports it."""

from typing import Literal

Strategy = Literal["auto", "bfd", "window", "sequential", "none"]
"""Value of `packing.strategy`: a planner of sft_fast._C, or the choice between two of them."""

STRATEGY_HELP = (
    "bfd = best-fit decreasing: fewest rows, but short samples share rows with short ones; window "
    "= random order, each row filled exactly from the samples next in line; sequential = in the "
    "order of the data; none = one sample per row; auto = window, unless it needs over 0.2 % more "
    "rows than bfd."
)
"""The strategies in words, for the configuration's schema."""
