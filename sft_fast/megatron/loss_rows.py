"""The last layer computes only the tokens whose loss counts.

What the last attention has mixed belongs to one token from there on: output projection, norms, MLP
and head of a token without a label are read by nobody, and their gradient is zero.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.active_tokens import copy_to
from sft_fast.kernels.masked_cross_entropy import scatter_tokens


def loss_rows(active_tokens: Tensor | None, device: torch.device) -> Tensor | None:
    """int64 [max(A, 1)] on the device, for `select_rows`; None = the tokens are not known.

    Without active tokens it is the first: every weight must get its (zero) gradient.

    Args:
        active_tokens: int64 [A], ascending, on the host.
        device: that computes.
    """
    if active_tokens is None:
        return None
    rows = active_tokens if len(active_tokens) else active_tokens.new_zeros(1)
    return copy_to(rows, device)


def select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """[A, 1, width]: the rows [A] int64, each once, of a tensor [s, b, width]."""
    return cast(Tensor, SelectRows.apply(tensor, rows))


class SelectRows(torch.autograd.Function):
    """(tensor [s, b, width], rows [A]) -> [A, 1, width]; index_select adds up its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor) -> Tensor:
        """[A, 1, width]."""
        ctx.save_for_backward(rows)
        ctx.shape = tensor.shape
        return tensor.flatten(0, 1).index_select(0, rows).unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[s, b, width], 0 in all other rows."""
        (rows,) = ctx.saved_tensors
        num_tokens = math.prod(ctx.shape[:-1])
        return scatter_tokens(grad.squeeze(1), rows, num_tokens).view(ctx.shape), None
