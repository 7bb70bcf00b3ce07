"""The oracles are proved by computing every expert for every token, and by finite differences."""

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.kernels.routing import Routing
from sft_fast.reference.experts import balance_loss, choose_experts, expert_mlp, grouped_matmul


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


def test_experts_are_chosen_as_deepseek_chooses_them() -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = deepseek.DeepseekV3Config(
        hidden_size=5,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    theirs = deepseek.DeepseekV3TopkRouter(config)
    torch.manual_seed(3)
    theirs.weight.data.normal_()
    theirs.e_score_correction_bias.normal_()
    logits, expected, chosen = theirs(torch.randn(20, 5))
    routing = Routing(3, True, "sigmoid", 2.5, num_groups=4, groups_chosen=2)
    weights, experts = choose_experts(logits, routing, theirs.e_score_correction_bias)
    order = chosen.argsort(1), experts.argsort(1)
    assert torch.equal(chosen.gather(1, order[0]), experts.gather(1, order[1]))
    torch.testing.assert_close(weights.gather(1, order[1]), expected.gather(1, order[0]))


def test_the_loss_of_balance_is_that_of_transformers() -> None:
    """Of one layer; theirs is of the means over all layers."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(1)
    loss = balance_loss(probs, probs.topk(2, dim=1).indices)
    torch.testing.assert_close(loss, load_balancing_loss_func((logits,), 6, 2).to(loss))
    assert loss > 2
    even = torch.full((6, 6), 1 / 6)
    spread = torch.arange(12).view(6, 2) % 6
    assert balance_loss(even, spread).item() == 2.0
