"""What LoRA adds to a product, against the sum of the matrices."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_no_worse
from kernel_pool import ON_GPU
from sft_fast.kernels.low_rank import BlockLayout, adapted_product, add_up, project_down

SCALE = 0.7
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# projections of 3, 1 and 2 rows that alternate in blocks, one of them without an adapter; one alone
LAYOUTS = [
    BlockLayout(4, (3, 1, 2), (0, None, 1)),
    BlockLayout(1, (5, 5), (0, 1)),
    BlockLayout(2, (1, 3), (None, 0)),
    BlockLayout(1, (7,), (0,)),
]


class FrozenProduct(torch.autograd.Function):
    """x W^T, with a gradient of x that nobody else has, as megatron's frozen layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.saved_tensors[0], None


class Passed(torch.autograd.Function):
    """Its input, as megatron's exchanges without other ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def make_inputs(
    layout: BlockLayout, dtype: torch.dtype, num_tokens: int = 5, num_inputs: int = 6
) -> list[Tensor]:
    """x [tokens, 1, in], the weight [out, in], every A [2, in], then every B [rows, 2]."""
    generator = torch.Generator().manual_seed(sum(layout.widths))
    rows = [
        layout.num_groups * width
        for width, number in zip(layout.widths, layout.adapters, strict=True)
        if number is not None
    ]
    shapes = [
        (num_tokens, 1, num_inputs),
        (layout.num_groups * sum(layout.widths), num_inputs),
        *[(2, num_inputs)] * len(rows),
        *[(count, 2) for count in rows],
    ]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def in_one(layout: BlockLayout, x: Tensor, weight: Tensor, *pairs: Tensor) -> Tensor:
    a, b = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    return adapted_product(x, weight, None, a, b, layout, SCALE)


def in_two(layout: BlockLayout, x: Tensor, weight: Tensor, *pairs: Tensor) -> Tensor:
    a, b = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    x, low_rank = project_down(x, a)
    output = Passed.apply(FrozenProduct.apply(x, weight))
    return add_up(output, low_rank, b, layout, SCALE)


def delta(layout: BlockLayout, weight: Tensor, *pairs: Tensor) -> Tensor:
    """[out, in]: B A of every row, one after the other."""
    a, b = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    rows, taken = [], [0] * len(b)
    for _ in range(layout.num_groups):
        for width, number in zip(layout.widths, layout.adapters, strict=True):
            for _ in range(width):
                if number is None:
                    rows.append(torch.zeros_like(weight[0]))
                else:
                    rows.append(b[number][taken[number]] @ a[number])
                    taken[number] += 1
    return torch.stack(rows)


def eager(layout: BlockLayout, x: Tensor, weight: Tensor, *pairs: Tensor) -> Tensor:
    """As PEFT: the product, and beside it those with A and B, scaled and added."""
    a, b = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    parts = [(x @ down.t()) @ up.t() * SCALE for down, up in zip(a, b, strict=True)]
    every = [
        x.new_zeros(*x.shape[:-1], layout.num_groups * width) if number is None else parts[number]
        for width, number in zip(layout.widths, layout.adapters, strict=True)
    ]
    grouped = [part.unflatten(-1, (layout.num_groups, -1)) for part in every]
    return x @ weight.t() + torch.cat(grouped, dim=-1).flatten(-2)


def results(function: Any, layout: BlockLayout, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all but the weight."""
    leaves = [tensor.clone().requires_grad_(i != 1) for i, tensor in enumerate(inputs)]
    output = function(layout, *leaves)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(output.shape, generator=generator).to(DEVICE, inputs[0].dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, upstream.to(output.dtype))]


@pytest.mark.parametrize("ours", [in_one, in_two])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_product_with_the_sum(layout: BlockLayout, ours: Any) -> None:
    inputs = make_inputs(layout, torch.float64)
    x, weight, *pairs = inputs
    expected = x @ (weight + SCALE * delta(layout, weight, *pairs)).t()
    torch.testing.assert_close(ours(layout, *inputs), expected)
    leaves = [tensor.requires_grad_(i != 1) for i, tensor in enumerate(inputs)]
    assert torch.autograd.gradcheck(lambda *args: ours(layout, *args), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ours", [in_one, in_two])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_no_worse_than_eager(layout: BlockLayout, dtype: torch.dtype, ours: Any) -> None:
    # So large that chance evens out.
    layout = replace(layout, widths=tuple(30 * width for width in layout.widths))
    inputs = make_inputs(layout, dtype, 500, 264)
    found, plain = results(ours, layout, inputs), results(eager, layout, inputs)
    truth = results(eager, layout, [tensor.double() for tensor in inputs])
    for result, same_dtype, true in zip(found, plain, truth, strict=True):
        assert result.dtype == dtype
        assert_no_worse(result, same_dtype, true, orders=(2,))


@pytest.mark.parametrize("ours", [in_one, in_two])
def test_without_a_gradient_of_the_input(ours: Any) -> None:
    layout = LAYOUTS[1]
    x, weight, *pairs = make_inputs(layout, torch.float64)
    pairs = [pair.requires_grad_() for pair in pairs]
    found = torch.autograd.grad(ours(layout, x, weight, *pairs).sum(), pairs)
    expected = torch.autograd.grad(eager(layout, x, weight, *pairs).sum(), pairs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_taken_apart_and_put_together_it_is_the_same(layout: BlockLayout) -> None:
    b = tuple(make_inputs(layout, torch.float32)[2 + layout.num_adapters :])
    for part, expected in zip(layout.take_apart(layout.assemble(b)), b, strict=True):
        assert part.equal(expected)


def test_a_bias_is_added() -> None:
    layout = LAYOUTS[0]
    x, weight, *pairs = make_inputs(layout, torch.float64)
    a, b, bias = tuple(pairs[:2]), tuple(pairs[2:]), weight[:, 0].clone()
    found = adapted_product(x, weight, bias, a, b, layout, SCALE)
    torch.testing.assert_close(found, eager(layout, x, weight, *pairs) + bias)
