"""Activations without memory between the forward and the backward pass."""

import pytest
import torch
from torch import Tensor

from sft_fast.megatron.recompute import free_until_backward, trains


def test_the_memory_is_free_until_the_gradient_comes() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    kept = x.detach().clone()
    expected = torch.autograd.grad((torch.sin(x) @ weight).square().sum(), (x, weight))
    fills = []

    def write(out: Tensor) -> None:
        fills.append(len(fills))
        out.copy_(torch.sin(kept))

    hidden = torch.sin(x)
    result = hidden @ weight
    free_until_backward(hidden, write, result)
    assert hidden.untyped_storage().nbytes() == 0 and not fills
    found = torch.autograd.grad(result.square().sum(), (x, weight))
    assert fills == [0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nothing_is_freed_that_no_gradient_will_bring_back() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    with torch.no_grad():
        free_until_backward(hidden, pytest.fail, hidden @ weight)
    free_until_backward(hidden, pytest.fail, hidden @ weight.detach())
    assert hidden.untyped_storage().nbytes() > 0


def test_a_view_is_refused() -> None:
    hidden, weight = torch.randn(6, 4)[:3], torch.randn(4, 2, requires_grad=True)
    with pytest.raises(AssertionError, match="a view of something larger"):
        free_until_backward(hidden, pytest.fail, hidden @ weight)


def test_trains() -> None:
    frozen, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    frozen.requires_grad_(False)
    assert trains(frozen, trained) and not trains(frozen)
