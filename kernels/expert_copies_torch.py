"""How copies of tokens move to their experts and back, in PyTorch."""

import torch
from torch import Tensor


def scatter_copies(x: Tensor, places: Tensor) -> Tensor:
    """[R, n]: row places[t, j] is x[t]; the gradient of `sum_copies`.

    Args:
        x: [T, n].
        places: [T, k] int32, each row once.
    """
    rows = x.new_empty((places.numel(), x.shape[1]))
    copies = x.unsqueeze(1).expand(-1, places.shape[1], -1).flatten(0, 1)
    return rows.index_copy_(0, places.flatten().long(), copies)


def sum_copies(rows: Tensor, places: Tensor) -> Tensor:
    """[T, n]: the sum over j of rows[places[t, j]], in fp32 or wider; gradient of `scatter_copies`.

    Args:
        rows: [R, n].
        places: [T, k] int32.
    """
    copies = rows.index_select(0, places.flatten()).unflatten(0, places.shape)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return copies.sum(1, dtype=dtype).to(rows.dtype)
