"""What an export says of the data; every checkpoint has it, so that exporting reads no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_fast.data.store import TokenStore

NUM_SAMPLES_READ = 1000


@dataclass(frozen=True)
class ExportMetadata:
    """Facts about a token store."""

    fingerprint: str
    """Of the store; see store.TokenStore."""
    end_ids: list[int]
    """Ids of the special tokens that samples end with, ascending."""


def export_metadata(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> ExportMetadata:
    """Reads the first samples of a store."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = store.offsets[1 : NUM_SAMPLES_READ + 1] - 1
    found = special & {int(token) for token in store.tokens[ends]}
    return ExportMetadata(store.fingerprint, sorted(found))
