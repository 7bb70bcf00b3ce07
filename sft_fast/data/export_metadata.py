"""What an export says of the data; every checkpoint has it, so that exporting reads no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_fast.data.stream import TrainingData

NUM_SAMPLES_READ = 1000


@dataclass(frozen=True)
class ExportMetadata:
    """Facts about the data."""

    fingerprint: str
    """Of the store; see store.TokenStore, and stream.SampleStream."""
    end_ids: list[int]
    """Ids of the special tokens that samples end with, ascending."""


def export_metadata(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> ExportMetadata:
    """Reads the first samples."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = {int(token) for token in data.last_tokens(NUM_SAMPLES_READ)}
    return ExportMetadata(data.fingerprint, sorted(special & ends))
