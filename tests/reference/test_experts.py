"""The oracles are proved by computing every expert for every token, and by finite differences."""

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.reference.experts import expert_mlp, grouped_matmul


def problem(num_tokens: int = 7, num_experts: int = 4, num_chosen: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, 5), (num_experts, 6, 5), (num_experts, 5, 3), (num_tokens, num_chosen)
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]
    # Expert 0 gets no token.
    scores = torch.rand(num_tokens, num_experts - 1, generator=generator)
    return *inputs, scores.topk(num_chosen).indices + 1


def test_equals_all_experts_weighted_by_zero() -> None:
    hidden, gate_up, down, probs, experts = problem()
    gate, up = torch.einsum("th,efh->tef", hidden, gate_up).chunk(2, dim=2)
    everything = torch.einsum("tef,ehf->teh", functional.silu(gate) * up, down)
    chosen = functional.one_hot(experts, 4).to(probs) * probs.unsqueeze(2)
    expected = torch.einsum("teh,tke->th", everything, chosen)
    actual = expert_mlp(hidden, gate_up, down, probs, experts)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    upstream, inputs = torch.randn_like(hidden), (hidden, gate_up, down, probs)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    ours = torch.autograd.grad(actual, inputs, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert not ours[1][0].any() and not ours[2][0].any()


def test_grouped_products_equal_a_matrix_for_each_row() -> None:
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    of_row = torch.tensor([0, 0, 0, 2, 3, 3])
    expected = torch.einsum("ri,roi->ro", x, weight[of_row])
    actual = grouped_matmul(x, weight, torch.tensor([0, 3, 3, 4, 6]))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_gradients_equal_finite_differences() -> None:
    *inputs, experts = problem()
    assert torch.autograd.gradcheck(lambda *inputs: expert_mlp(*inputs, experts), tuple(inputs))
    offsets = torch.tensor([0, 3, 3, 7, 7])
    assert torch.autograd.gradcheck(
        lambda x, weight: grouped_matmul(x, weight, offsets), (inputs[0], inputs[1])
    )
