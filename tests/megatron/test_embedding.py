"""The gradient of the embedding goes to the rows of its tokens."""

from typing import Any

import pytest
import torch

from kernel_pool import ON_GPU

DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize("num_tokens", [1, 2, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added_and_nothing_else(num_tokens: int, dtype: torch.dtype) -> None:
    from sft_fast.megatron.embedding import add_rows_

    generator = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randint(0, 40, (num_tokens,), generator=generator).to(DEVICE)
    rows = torch.randn(num_tokens, 24, generator=generator).to(DEVICE, dtype)
    total = torch.randn(50, 24, generator=generator).to(DEVICE)
    expected = total.double().index_add_(0, tokens, rows.double())
    found = total.clone()
    add_rows_(found, tokens, rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    untouched = torch.ones(50, dtype=torch.bool).index_fill_(0, tokens.cpu(), False)
    assert found.cpu()[untouched].equal(total.cpu()[untouched])
    for _ in range(3):
        again = total.clone()
        add_rows_(again, tokens, rows)
        assert again.equal(found)


@pytest.mark.parametrize("has_head", [False, True])
def test_the_stand_in_tells_ddp_what_was_done(has_head: bool) -> None:
    from sft_fast.megatron.embedding import RowLookup

    weight: Any = torch.nn.Parameter(torch.randn(7, 3))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(7, 3), False
    tokens = torch.tensor([[2, 5, 2]])
    RowLookup.apply(tokens, weight, has_head).sum().backward()
    expected = torch.zeros(7, 3)
    expected[2], expected[5] = 2, 1
    assert weight.main_grad.equal(expected)
    assert weight.grad_added_to_main_grad is not has_head
    assert (weight.grad is None) is has_head
