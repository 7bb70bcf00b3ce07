"""Choices of the config section `data`; imports nothing, because config imports it."""

from typing import Literal

Part = Literal["train", "eval"]
"""Data that is trained on, or data that is evaluated on."""

TrainOn = Literal["all_turns", "last_turn"]
"""Value of `data.train_on`: every assistant turn, or the last that is trained at all."""

ChangingHistory = Literal["error", "expand"]
"""Value of `data.changing_history`: expand = one sample per answer."""

OverLength = Literal["error", "drop", "truncate_right", "truncate_left", "split_turns"]
"""Value of `data.over_length`: what happens to a sample longer than a pack."""

OnBadRecord = Literal["error", "skip"]
"""Value of `data.on_bad_row`: a record that cannot be used stops the run, or is left out."""

NearDuplicates = Literal["keep", "drop"]
"""Value of `data.near_duplicates`: what happens to samples that are nearly the same as another."""
