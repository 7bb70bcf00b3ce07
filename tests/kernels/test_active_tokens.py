"""The split of active tokens among the ranks that own parts of a sequence."""

import pytest
import torch

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.active_tokens import select_active_tokens


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("active", [[], [0], [11], [2, 3, 5, 6], list(range(12)), [3, 4, 5, 9]])
@pytest.mark.parametrize("is_given", [True, False])
def test_every_active_token_has_one_owner(
    active: list[int], num_parts: int, is_given: bool
) -> None:
    labels = torch.full((12,), IGNORE_INDEX)
    labels[active] = 7
    given = torch.tensor(active, dtype=torch.int64) if is_given else None
    size = 12 // num_parts
    for part in range(num_parts):
        chosen = select_active_tokens(labels, given, num_parts, part)
        assert chosen.indices.tolist() == active
        assert chosen.counts == [sum(i // size == p for i in active) for p in range(num_parts)]
        own = [i - part * size for i in active if i // size == part]
        assert chosen.own_indices.tolist() == own
