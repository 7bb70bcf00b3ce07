"""The layer's oracles: proved by PyTorch's functions, by properties and finite differences."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.reference import block


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("is_zero_centered", [False, True])
def test_norm(is_zero_centered: bool) -> None:
    x, weight = random(5, 7), random(7)
    normed = block.rms_norm(x, weight, 1e-3, is_zero_centered)
    factor = weight + is_zero_centered
    torch.testing.assert_close(normed, functional.rms_norm(x, (7,), factor, 1e-3))
    rows = block.rms_norm(x, torch.full((7,), 1.0 - is_zero_centered), 0.0, is_zero_centered)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(5, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, weight: block.rms_norm(x, weight, 1e-3, is_zero_centered), (x, weight)
    )


def turns(angles: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angles), angles)


def test_rotation_keeps_what_depends_on_the_distance_only() -> None:
    """Scores of queries and keys depend on the difference of their positions."""
    query, key = random(1, 2, 8), random(1, 3, 8)
    frequencies = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)

    def score(query_position: int, key_position: int) -> Tensor:
        turned_query = block.rotate(query, turns(query_position * frequencies[None]))
        turned_key = block.rotate(key, turns(key_position * frequencies[None]))
        return turned_query[0] @ turned_key[0].T

    torch.testing.assert_close(score(7, 5), score(102, 100))
    assert not torch.allclose(score(7, 5), score(7, 4))
    torch.testing.assert_close(score(0, 0), query[0] @ key[0].T)


def test_rotation_by_a_quarter_turn() -> None:
    heads = torch.arange(6.0, dtype=torch.float64).view(1, 1, 6)
    angles = torch.full((1, 2), math.pi / 2, dtype=torch.float64)
    turned = block.rotate(heads, 2 * turns(angles))
    expected = torch.tensor([-4.0, -6.0, 0.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(turned[0, 0], expected)


def test_rotation_gradient() -> None:
    numbers = 1.5 * turns(random(3, 2).detach())
    assert torch.autograd.gradcheck(lambda heads: block.rotate(heads, numbers), random(3, 2, 6))


def test_split_finds_every_head() -> None:
    """Two groups of three queries: the number of each head is written in its channels."""
    size = 2 * (3 + 2)
    numbers = torch.arange(size, dtype=torch.float64).repeat_interleave(4).expand(3, -1)
    query, key, value = block.split_qkv(numbers, 2, 4)
    assert query.shape == (3, 6, 4) and key.shape == value.shape == (3, 2, 4)
    assert query[2, :, 3].tolist() == [0, 1, 2, 5, 6, 7]
    assert key[2, :, 0].tolist() == [3, 8] and value[2, :, 0].tolist() == [4, 9]


def test_gates_equal_pytorch() -> None:
    gate_up = 3 * random(4, 10).detach()
    gate, up = gate_up.chunk(2, dim=1)
    silu, gelu = functional.silu(gate) * up, functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(block.gated_activation(gate_up, "silu"), silu)
    torch.testing.assert_close(block.gated_activation(gate_up, "gelu_tanh"), gelu)


def test_clamped_gate() -> None:
    """Beyond the limit of 7 nothing changes, for the partner on both sides."""
    gates_and_partners = [7.0, 70.0, 7.0, -7.0, -90.0, 90.0]
    gate_up = torch.tensor(gates_and_partners, dtype=torch.float64)
    gate = 7 * torch.tensor(1.702 * 7, dtype=torch.float64).sigmoid()
    expected = torch.stack([-6 * gate, -6 * gate, 8 * gate])
    torch.testing.assert_close(block.gated_activation(gate_up, "clamped_silu"), expected)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "clamped_silu"])
def test_gate_gradient(kind: str) -> None:
    gate_up = (5 * random(3, 8)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block.gated_activation(x, kind), gate_up)
