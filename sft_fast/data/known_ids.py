"""Token ids of the data that the model has no embedding of.

A tokenizer may have more ids than its model, which are no problem until one occurs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from sft_fast.data.store import TokenStore

IDS_AT_A_TIME = 1 << 22


def check_ids(ids: npt.NDArray[np.uint32], num_known: int, origin: str) -> None:
    """Looks at the ids of one sample.

    Args:
        ids: uint32 [tokens].
        num_known: ids that the model has, from 0.
        origin: file:line of the sample.

    Raises:
        ValueError: one is unknown.
    """
    unknown = ids[ids >= num_known]
    if unknown.size:
        raise ValueError(
            f"{origin}: token {unknown[0]} occurs, and vocab_size of the model is {num_known}; "
            "expected tokens that the model knows: use its own tokenizer (tokenizer.path), or if "
            "it is that with more tokens, set model.new_embeddings=mean"
        )


def check_store(store: TokenStore, num_known: int) -> None:
    """Looks at every sample of a store; raises ValueError as `check_ids`."""
    for start in range(0, len(store.tokens), IDS_AT_A_TIME):
        unknown = store.tokens[start : start + IDS_AT_A_TIME] >= num_known
        if unknown.any():
            place = start + int(unknown.argmax())
            sample = int(np.searchsorted(store.offsets, place, side="right")) - 1
            check_ids(store.tokens[place : place + 1], num_known, store.origin(sample))
