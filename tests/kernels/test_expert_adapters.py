"""Experts with low-rank adapters against one expert after the other, with loads that break them."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_bit_zero, assert_no_worse
from kernel_pool import ON_GPU, seeded
from rank_pool import RankPool
from sft_fast.kernels import expert_copies
from sft_fast.kernels import grouped_matmul as grouped
from sft_fast.kernels.backends import import_backend
from sft_fast.kernels.expert_adapters import GroupedAdapters
from sft_fast.kernels.expert_mlp import expert_mlp, expert_mlp_with_dropout
from sft_fast.reference import experts as reference

pytest.importorskip("triton")

SCALE, HIDDEN, RANK = 0.7, 20, 3
DTYPES = [torch.float32, torch.bfloat16 if ON_GPU else torch.float16]
# tokens, experts, experts of a token, width; experts without rows are among them
LAYERS = [(1, 4, 2, 8), (37, 6, 2, 13), (5, 16, 2, 8), (9, 1, 1, 30), (0, 4, 2, 8)]
LARGE = (65, 6, 2, 24)  # so large that chance evens out


def make_layer(
    num_tokens: int, num_experts: int, num_chosen: int, width: int
) -> tuple[list[Tensor], Tensor]:
    """hidden, gate_up, down, probs, A and B of gate_up, A and B of down; experts."""
    generator = seeded(num_tokens + num_experts)
    shapes = [
        *((num_tokens, HIDDEN), (num_experts, 2 * width, HIDDEN), (num_experts, HIDDEN, width)),
        (num_tokens, num_chosen),
        *((num_experts, 2 * RANK, HIDDEN), (num_experts, 2 * width, 2 * RANK)),
        *((num_experts, RANK, width), (num_experts, HIDDEN, RANK)),
    ]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[3].abs_()
    for matrix in (*inputs[1:3], *inputs[4:]):
        matrix.mul_(matrix.shape[2] ** -0.5)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return inputs, scores.topk(num_chosen).indices


def oracle(*inputs: Tensor, experts: Tensor) -> Tensor:
    hidden, gate_up, down, probs, *pairs = inputs
    return reference.adapted_expert_mlp(
        hidden, gate_up, down, probs, tuple(pairs[:2]), tuple(pairs[2:]), experts, SCALE
    )


def ours(*inputs: Tensor, order: Any, backend: str, drop: Any = None) -> Tensor:
    hidden, gate_up, down, probs, a_wide, b_wide, a_narrow, b_narrow = inputs
    activation = import_backend("block", backend).gated_activation
    arguments = (
        *(hidden, gate_up, down, probs if probs.dtype == torch.float64 else probs.float(), order),
        lambda wide, factors: activation(wide, "silu", factors),
        GroupedAdapters(tuple(a_wide.chunk(2, dim=1)), b_wide, SCALE),
        GroupedAdapters((a_narrow,), b_narrow, SCALE),
    )
    if drop is None:
        return expert_mlp(*arguments)
    return expert_mlp_with_dropout(*arguments, (drop, drop))


def results(function: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of all but the matrices."""
    leaves = [tensor.to(dtype).requires_grad_(i not in (1, 2)) for i, tensor in enumerate(inputs)]
    output = function(*leaves)
    upstream = torch.randn(output.shape, generator=seeded(0)).to(output.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, upstream)]


def run_layer(backend: str, layer: Any, dtype: torch.dtype) -> None:
    from unittest import mock

    inputs, experts = make_layer(*layer)
    order = expert_copies.sort_copies(experts, layer[1])
    rounded = [tensor.to(dtype) for tensor in inputs]
    loop = functools.partial(oracle, experts=experts)
    eager, truth = results(loop, rounded, dtype), results(loop, rounded, torch.float64)

    def load(operation: str, name: str, device_type: str) -> Any:
        return import_backend(operation, backend)

    with (
        mock.patch.object(grouped, "load_backend", load),
        mock.patch.object(expert_copies, "load_backend", load),
        mock.patch.object(grouped, "fits_torch_grouped_mm", return_value=False),
    ):
        found = results(functools.partial(ours, order=order, backend=backend), rounded, dtype)
        kept = functools.partial(ours, order=order, backend=backend, drop=lambda x: x)
        without_dropout = results(kept, rounded, dtype)
    # With dropout each A has a product and a rounding of its own.
    for all_found in (found, without_dropout) if dtype == torch.float32 else (found,):
        for one, plain, true in zip(all_found, eager, truth, strict=True):
            assert one.dtype == dtype and one.shape == true.shape
            if len(one) > 0:
                assert_no_worse(one, plain, true, (2,))
    # Experts that no token has get gradients of zero, not what was there before.
    idle = sorted(set(range(layer[1])) - set(experts.flatten().tolist()))
    for gradient in found[3:]:
        assert_bit_zero(gradient[idle])


@pytest.mark.parametrize(
    ("backend", "layer", "dtype"),
    [
        # torch's has the roundings of eager in another order.
        *(("torch", layer, torch.float32) for layer in LAYERS),
        *(("triton", layer, torch.float32) for layer in (LAYERS[1], LAYERS[2], LAYERS[4])),
        ("triton", LARGE, DTYPES[1]),
    ],
    ids=str,
)
def test_it_is_no_worse_than_a_loop(
    kernel_rank: RankPool, backend: str, layer: Any, dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_layer, backend, layer, dtype)


def test_the_oracle_is_the_layer_with_merged_matrices() -> None:
    inputs, experts = make_layer(11, 4, 2, 6)
    hidden, gate_up, down, probs, a_wide, b_wide, a_narrow, b_narrow = map(Tensor.double, inputs)
    merged = gate_up + SCALE * b_wide @ a_wide, down + SCALE * b_narrow @ a_narrow
    expected = reference.expert_mlp(hidden, *merged, probs, experts)
    torch.testing.assert_close(oracle(*map(Tensor.double, inputs), experts=experts), expected)


def test_it_equals_finite_differences() -> None:
    inputs, experts = make_layer(5, 4, 2, 4)
    order = expert_copies.sort_copies(experts, 4)
    leaves = [tensor.double().requires_grad_(i not in (1, 2)) for i, tensor in enumerate(inputs)]
    assert torch.autograd.gradcheck(
        functools.partial(ours, order=order, backend="torch"), tuple(leaves)
    )


@pytest.mark.parametrize("missing", ["wide", "narrow"])
def test_one_matrix_may_have_none(missing: str) -> None:
    inputs, experts = make_layer(7, 4, 2, 6)
    order = expert_copies.sort_copies(experts, 4)
    hidden, gate_up, down, probs, a_wide, b_wide, a_narrow, b_narrow = inputs
    activation = import_backend("block", "torch").gated_activation
    pairs = {
        "wide": GroupedAdapters((a_wide,), b_wide, SCALE),
        "narrow": GroupedAdapters((a_narrow,), b_narrow, SCALE),
    }
    matrices = hidden, gate_up, down, probs, order, lambda x, f: activation(x, "silu", f)
    zeros = replace(pairs[missing], b=torch.zeros_like(pairs[missing].b))
    expected = expert_mlp(*matrices, **(pairs | {missing: zeros}))
    found = expert_mlp(*matrices, **(pairs | {missing: None}))
    torch.testing.assert_close(found, expected)


def test_what_is_kept_is_the_input_the_first_product_and_the_low_rank_ones() -> None:
    inputs, experts = make_layer(50, 8, 4, 16)
    order, kept = expert_copies.sort_copies(experts, 8), dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    leaves = [tensor.requires_grad_(i not in (1, 2)) for i, tensor in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours(*leaves, order=order, backend="torch")
    rows = 4 * 50
    of_rows = rows * (2 * 16 + 3 * RANK) + 3 * rows  # factors, tokens and places
    adapters = sum(tensor.numel() for tensor in inputs[4:])
    matrices = sum(tensor.numel() for tensor in inputs[:3])
    assert sum(kept.values()) == 4 * (matrices + adapters + of_rows + 8 + 1)


def run_sums(backend: str, dtype: torch.dtype) -> None:
    """Products are added to what is there; groups without rows add none."""
    products = import_backend("grouped_matmul", backend)
    generator, offsets = seeded(5), torch.tensor([0, 3, 3, 20, 20], dtype=torch.int32)
    x = torch.randn(20, RANK, generator=generator).to(dtype)
    matrices = torch.randn(4, 21, RANK, generator=generator).to(dtype).transpose(1, 2)
    total = torch.randn(20, 21, generator=generator).to(dtype)
    found = total.clone()
    products.add_products(found, x, matrices, offsets)
    added = torch.cat([x[:3] @ matrices[0], x[3:] @ matrices[2]])
    truth = torch.cat(
        [x[:3].double() @ matrices[0].double(), x[3:].double() @ matrices[2].double()]
    )
    assert_no_worse(found, total + added, total.double() + truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_products_are_added(kernel_rank: RankPool, backend: str, dtype: torch.dtype) -> None:
    kernel_rank.run(1, run_sums, backend, dtype)
