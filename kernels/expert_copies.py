"""Where the copies of each token lie when they are sorted by expert, and how they get there.

A token has a copy for each of its k experts. Copies move by `places` in both directions: a token is
read once and written k times, or its k rows are read and summed in order. Every result is written
by one program, so it is the same in every run.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.backends import load_backend


@dataclass(frozen=True)
class CopyOrder:
    """The order of R = T k rows, those of expert 0 first; rows of an expert follow their tokens."""

    offsets: Tensor
    """[E + 1] int32: the rows of expert e are offsets[e] to offsets[e + 1] - 1"""
    copy_numbers: Tensor
    """[R] int32: which copy a row is, token * k + number"""
    tokens: Tensor
    """[R] int32: the token of a row"""
    places: Tensor
    """[T, k] int32: the row of each copy"""


def sort_copies(experts: Tensor, num_experts: int) -> CopyOrder:
    """Sorts the copies of tokens by their experts; the host does not wait.

    Args:
        experts: [T, k] integers, 0 to num_experts - 1.
        num_experts: less than 32768.
    """
    assert 0 < num_experts < 2**15, num_experts
    # Sorting 16 bits takes a quarter of the passes of 64.
    numbers, copy_numbers = experts.flatten().to(torch.int16).sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=torch.int16, device=experts.device)
    offsets = torch.searchsorted(numbers, edges, out_int32=True)
    rows = torch.arange(len(copy_numbers), dtype=torch.int32, device=experts.device)
    places = torch.empty_like(rows).scatter_(0, copy_numbers, rows).view(experts.shape)
    copy_numbers = copy_numbers.to(torch.int32)
    return CopyOrder(offsets, copy_numbers, copy_numbers // experts.shape[1], places)


class CopyKernels(Protocol):
    """What expert_copies_torch and expert_copies_triton have in common; the former documents it."""

    def scatter_copies(self, x: Tensor, places: Tensor) -> Tensor:
        """[R, n] of x [T, n]."""
        ...

    def sum_copies(self, rows: Tensor, places: Tensor) -> Tensor:
        """[T, n] of rows [R, n]."""
        ...


def copy_kernels(rows: Tensor) -> CopyKernels:
    """Those for the device of a tensor of any shape."""
    kernels: CopyKernels = load_backend("expert_copies", "auto", rows.device.type)
    return kernels


def copies_of(x: Tensor, order: CopyOrder) -> Tensor:
    """[R, n]: the copies of each row of x [T, n] in their order, differentiable."""
    return cast(Tensor, Copies.apply(x, order.places))


def sums_of(rows: Tensor, order: CopyOrder) -> Tensor:
    """[T, n]: the sum of each token's copies among rows [R, n], differentiable."""
    return cast(Tensor, Sums.apply(rows, order.places))


class Copies(torch.autograd.Function):
    """(x, places) -> rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        """[R, n]."""
        ctx.save_for_backward(places)
        return copy_kernels(x).scatter_copies(x, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[T, n]."""
        return copy_kernels(grad).sum_copies(grad, *ctx.saved_tensors), None


class Sums(torch.autograd.Function):
    """(rows, places) -> sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        """[T, n]."""
        ctx.save_for_backward(places)
        return copy_kernels(rows).sum_copies(rows, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[R, n]."""
        return copy_kernels(grad).scatter_copies(grad, *ctx.saved_tensors), None
