"""Sums of the LM head's weight gradient that are wider than the factors of its products."""

import pytest
import torch

from closeness import assert_no_worse
from sft_fast.kernels.head_gradient import add_product_, weight_gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 8192, 8193])
def test_a_product_is_added_without_rounding_to_the_factors_type(
    dtype: torch.dtype, num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    left = torch.randn(num_rows, 5, generator=generator).to(dtype)
    right = torch.randn(5, 3, generator=generator).to(dtype)
    total = torch.randn(num_rows, 3, generator=generator)
    eager = total + left.float() @ right.float()
    truth = total.double() + left.double() @ right.double()
    add_product_(total, left, right)
    assert_no_worse(total, eager, truth)


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
def test_a_gradient_in_main_grad_leaves_a_stand_in(zero_out_wgrad: bool) -> None:
    weight, total = torch.zeros(4, 3, dtype=torch.bfloat16), torch.ones(4, 3)
    assert torch.equal(weight_gradient(weight, total, False), total.bfloat16())
    assert weight_gradient(weight, total, True) is None, "no DDP listens"
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, zero_out_wgrad
    stand_in = weight_gradient(weight, total, True)
    assert weight.grad_added_to_main_grad
    assert stand_in.shape == weight.shape and stand_in.dtype == weight.dtype
    assert not zero_out_wgrad or not stand_in.any()
