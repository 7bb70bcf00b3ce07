"""The oracle is proved by computing keys and values of every head, and by finite differences."""

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.reference.latent_attention import latent_attention

RANK, PLAIN, TURNED, VALUE, HEADS = 4, 3, 2, 5, 2


def problem(num_tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (
        (num_tokens, HEADS, PLAIN + TURNED),
        (num_tokens, RANK),
        (num_tokens, TURNED),
        (HEADS, PLAIN + VALUE, RANK),
    )
    return tuple(
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    )


def test_equals_attention_to_keys_and_values_of_each_head() -> None:
    queries, latents, turned_keys, up = inputs = problem(7)
    both = torch.einsum("tr,hor->hto", latents, up)
    keys, values = both.split([PLAIN, VALUE], dim=2)
    keys = torch.cat([keys, turned_keys.expand(HEADS, -1, -1)], dim=2)
    expected = functional.scaled_dot_product_attention(
        queries.transpose(0, 1), keys, values, is_causal=True, scale=0.3
    ).transpose(0, 1)
    actual = latent_attention(*inputs, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    ours = torch.autograd.grad(actual, inputs, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gradients_equal_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *inputs: latent_attention(*inputs, 0.3), problem(3))
