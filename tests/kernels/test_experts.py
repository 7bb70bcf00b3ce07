"""Grouped products and the layer of experts against their oracles, with loads that break them.

kernel_pool.py says where the kernels run.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from closeness import assert_bit_zero, assert_no_worse
from kernel_pool import ON_GPU, seeded
from rank_pool import RankPool
from sft_fast.kernels import expert_copies, expert_mlp, router
from sft_fast.kernels import grouped_matmul as grouped
from sft_fast.kernels.backends import import_backend
from sft_fast.kernels.routing import Routing
from sft_fast.reference import experts as reference

pytest.importorskip("triton")

# The interpreter cuts bfloat16 off where GPUs round to nearest.
DTYPES = [torch.float32, torch.bfloat16 if ON_GPU else torch.float16]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def use(backend: str) -> ExitStack:
    """Makes the public functions call one backend, whatever the device."""
    stack = ExitStack()

    def load(operation: str, name: str, device_type: str) -> Any:
        return import_backend(operation, backend)

    for module in (grouped, expert_copies):
        stack.enter_context(mock.patch.object(module, "load_backend", load))
    stack.enter_context(mock.patch.object(grouped, "fits_torch_grouped_mm", return_value=False))
    return stack


def activate_by(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    block = import_backend("block", backend)
    return lambda gate_up, factors: block.gated_activation(gate_up, "silu", factors)


LOADS = {
    "uneven": [3, 0, 40, 1, 0, 17],
    "all to one": [0, 50, 0],
    "all to the last": [0, 0, 33],
    "one row each": [1, 1, 1, 1],
    "one group": [19],
    "no rows": [0, 0],
}
SHAPES = [(32, 48), (13, 21), (1, 3)]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def results(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, computed in dtype."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def compare(
    ours: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: list[Tensor],
    upstream: Tensor,
    dtype: torch.dtype,
    orders: tuple[float, ...] = (torch.inf, 2),
) -> None:
    inputs = [tensor.to(dtype) for tensor in inputs]
    actual = results(ours, inputs, upstream.to(dtype), dtype)
    eager = results(oracle, inputs, upstream.to(dtype), dtype)
    truth = results(oracle, inputs, upstream.to(dtype), torch.float64)
    for one, plain, true in zip(actual, eager, truth, strict=True):
        assert one.dtype == dtype and one.shape == true.shape
        if len(one) > 0:
            assert_no_worse(one, plain, true, orders)


def run_products(backend: str, counts: list[int], shape: tuple[int, int], dtype: Any) -> None:
    generator, offsets = seeded(sum(counts)), offsets_of(counts)
    x = torch.randn(sum(counts), shape[0], generator=generator)
    weight = torch.randn(len(counts), shape[1], shape[0], generator=generator)
    upstream = torch.randn(sum(counts), shape[1], generator=generator)
    with use(backend):
        compare(
            lambda x, weight: grouped.grouped_matmul(x, weight, offsets),
            lambda x, weight: reference.grouped_matmul(x, weight, offsets),
            [x, weight],
            upstream,
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_products_are_no_worse_than_eager(
    kernel_rank: RankPool, backend: str, load: str, dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_products, backend, LOADS[load], SHAPES[0], dtype)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_products_of_odd_widths(
    kernel_rank: RankPool, backend: str, shape: tuple[int, int]
) -> None:
    kernel_rank.run(1, run_products, backend, LOADS["uneven"], shape, torch.float32)


def run_behind(backend: str) -> None:
    """Rows behind the last group: what was in memory shows in neither direction."""
    generator, offsets = seeded(9), offsets_of([4, 0, 5])
    x = torch.randn(14, 12, generator=generator)
    x[9:] = torch.nan
    upstream = torch.randn(14, 7, generator=generator)
    upstream[9:] = torch.nan
    weight = torch.randn(3, 7, 12, generator=generator)
    bias = torch.randn(3, 7, generator=generator)
    with use(backend):
        ours = results(
            lambda x, weight, bias: grouped.grouped_matmul(x, weight, offsets, bias),
            [x, weight, bias],
            upstream,
            torch.float32,
        )
    group = torch.tensor([0] * 4 + [2] * 5)
    truth = results(
        lambda x, weight, bias: reference.grouped_matmul(x, weight, offsets) + bias[group],
        [x[:9], weight, bias],
        upstream[:9],
        torch.float32,
    )
    for name, one, true in zip(("output", "x", "weight", "bias"), ours, truth, strict=True):
        if name in ("output", "x"):
            assert_bit_zero(one[9:])
            one = one[:9]
        torch.testing.assert_close(one, true, msg=name)
    assert_bit_zero(ours[2][1])
    assert_bit_zero(ours[3][1])


def test_rows_behind_the_last_group_are_zero_and_a_bias_is_added(
    kernel_rank: RankPool, backend: str
) -> None:
    kernel_rank.run(1, run_behind, backend)


def run_main_grad(backend: str, dtype: torch.dtype) -> None:
    """Two backward passes add to what main_grad holds; groups without rows are not touched."""
    counts = [5, 0, 28]
    generator, offsets = seeded(7), offsets_of(counts)
    x = torch.randn(33, 24, generator=generator).to(dtype)
    weight = torch.nn.Parameter(torch.randn(3, 20, 24, generator=generator).to(dtype))
    upstream = torch.randn(33, 20, generator=generator).to(dtype)
    before = torch.randn(3, 20, 24, generator=generator)
    parameter: Any = weight
    parameter.main_grad, parameter.grad_added_to_main_grad = before.clone(), False
    with use(backend):
        for _ in range(2):
            grouped.grouped_matmul(x, weight, offsets).backward(upstream)
    assert parameter.grad_added_to_main_grad
    # What autograd gets in its place takes no memory.
    assert weight.grad is not None and weight.grad.data_ptr() == weight.data_ptr()
    assert torch.equal(parameter.main_grad[1], before[1])
    (wide,) = results(
        lambda weight: reference.grouped_matmul(x.double(), weight, offsets),
        [weight.detach()],
        upstream,
        torch.float64,
    )[1:]
    # Products of rounded numbers are exact in fp32: nothing is rounded to dtype on the way.
    torch.testing.assert_close(parameter.main_grad, (before + 2 * wide).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_go_into_main_grad(
    kernel_rank: RankPool, backend: str, dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_main_grad, backend, dtype)


def run_chosen_rows(backend: str) -> None:
    """The gradient finds its inputs by number, where the copies are not kept."""
    generator, offsets = seeded(8), offsets_of([4, 0, 9])
    x, grad = torch.randn(6, 10, generator=generator), torch.randn(13, 7, generator=generator)
    rows = torch.randint(6, (13,), generator=generator).to(torch.int32)
    totals = torch.empty(3, 7, 10), torch.empty(3, 7, 10)
    with use(backend):
        grouped.add_outer_products(totals[0], grad, x, offsets, rows, accumulate=False)
        grouped.add_outer_products(totals[1], grad, x[rows], offsets, None, accumulate=False)
    assert torch.equal(*totals)


def test_inputs_are_found_by_number(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_chosen_rows, backend)


def make_layer(
    num_tokens: int, num_experts: int, num_chosen: int, width: int, how: str
) -> tuple[list[Tensor], Tensor, Tensor]:
    """hidden, gate_up, down, probs; experts; an upstream gradient."""
    generator = seeded(num_tokens + num_experts)
    shapes = (num_tokens, 20), (num_experts, 2 * width, 20), (num_experts, 20, width)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs.append(torch.rand(num_tokens, num_chosen, generator=generator))
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if how == "all to the same":
        scores[:, -num_chosen:] += 1
    upstream = torch.randn(num_tokens, 20, generator=generator)
    return inputs, scores.topk(num_chosen).indices, upstream


LAYERS = [
    (1, 4, 2, 8, "even"),
    (37, 6, 2, 13, "even"),
    (20, 8, 3, 16, "all to the same"),
    (9, 1, 1, 300, "even"),
    (0, 4, 2, 8, "even"),
]


def run_layer(backend: str, layer: tuple[Any, ...], dtype: torch.dtype) -> None:
    inputs, experts, upstream = make_layer(*layer)
    order = expert_copies.sort_copies(experts, layer[1])
    with use(backend):

        def ours(hidden: Tensor, gate_up: Tensor, down: Tensor, probs: Tensor) -> Tensor:
            arguments = hidden, gate_up, down, probs.float(), order
            return expert_mlp.expert_mlp(*arguments, activate_by(backend))

        oracle = functools.partial(reference.expert_mlp, experts=experts)
        orders = (torch.inf, 2) if dtype == torch.float32 else (2,)
        compare(ours, oracle, inputs, upstream, dtype, orders)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # torch's has the roundings of eager in another order.
    [("torch", torch.float32), *(("triton", dtype) for dtype in DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_is_no_worse_than_eager(
    kernel_rank: RankPool, backend: str, layer: tuple[Any, ...], dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_layer, backend, layer, dtype)


def test_a_layer_equals_finite_differences() -> None:
    inputs, experts, _ = make_layer(5, 3, 2, 4, "even")
    order = expert_copies.sort_copies(experts, 3)
    leaves = tuple(tensor.double().requires_grad_() for tensor in inputs)
    activate = activate_by("torch")
    assert torch.autograd.gradcheck(
        lambda *inputs: expert_mlp.expert_mlp(*inputs, order, activate), leaves
    )


def biased_layer(
    layer: tuple[Any, ...],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As make_layer, with biases of both products behind the other inputs."""
    inputs, experts, upstream = make_layer(*layer)
    generator = seeded(7)
    shapes = [(len(inputs[1]), matrices.shape[1]) for matrices in inputs[1:3]]
    inputs += [torch.randn(shape, generator=generator) for shape in shapes]
    return inputs, experts, upstream


def biased(order: Any, backend: str, drop: Any = None) -> Callable[..., Tensor]:
    """The layer as gpt-oss has it; with `drop` the one that has dropout before its adapters."""
    block = import_backend("block", backend)

    def activate(gate_up: Tensor, factors: Tensor) -> Tensor:
        return block.gated_activation(gate_up, "clamped_silu", factors)

    def layer(
        hidden: Tensor, gate_up: Tensor, down: Tensor, probs: Tensor, *biases: Tensor
    ) -> Tensor:
        probs = probs if probs.dtype == torch.float64 else probs.float()
        matrices = hidden, gate_up, down, probs, order, activate, None, None
        if drop is not None:
            return expert_mlp.expert_mlp_with_dropout(*matrices, (drop, drop), (*biases,))
        return expert_mlp.expert_mlp(*matrices, (*biases,))

    return layer


def biased_oracle(experts: Tensor) -> Callable[..., Tensor]:
    def layer(hidden: Tensor, *rest: Tensor) -> Tensor:
        return reference.biased_expert_mlp(hidden, *rest[:3], (rest[3], rest[4]), experts)

    return layer


def run_biased(backend: str, layer: tuple[Any, ...], dtype: torch.dtype) -> None:
    inputs, experts, upstream = biased_layer(layer)
    order = expert_copies.sort_copies(experts, layer[1])
    orders = (torch.inf, 2) if dtype == torch.float32 else (2,)
    with use(backend):
        layer_of = biased(order, backend)
        compare(layer_of, biased_oracle(experts), inputs, upstream, dtype, orders)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), ("triton", DTYPES[0])])
@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[2], LAYERS[4]], ids=str)
def test_experts_with_biases_are_no_worse_than_eager(
    kernel_rank: RankPool, backend: str, layer: tuple[Any, ...], dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_biased, backend, layer, dtype)


@pytest.mark.parametrize("drop", [None, lambda x: x], ids=["one function", "with dropout"])
def test_biases_equal_finite_differences_and_what_transformers_computes(drop: Any) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    inputs, experts, _ = biased_layer((5, 3, 2, 4, "even"))
    leaves = tuple(tensor.double().requires_grad_() for tensor in inputs)
    layer = biased(expert_copies.sort_copies(experts, 3), "torch", drop)
    assert torch.autograd.gradcheck(layer, leaves)

    config = GptOssConfig(hidden_size=20, intermediate_size=4, num_local_experts=3)
    theirs = GptOssExperts(config).double()
    hidden, gate_up, down, probs, bias_wide, bias_narrow = leaves
    # It has gates and partners alternate, and matrices [in, out].
    alternate = torch.arange(8).view(2, 4).t().flatten()
    values = {
        "gate_up_proj": gate_up[:, alternate].transpose(1, 2),
        "gate_up_proj_bias": bias_wide[:, alternate],
        "down_proj": down.transpose(1, 2),
        "down_proj_bias": bias_narrow,
    }
    expected = torch.func.functional_call(theirs, values, (hidden, experts, probs))
    assert (gate_up @ hidden.t()).abs().max() > 7.5  # some are clamped
    for result in (layer(*leaves), biased_oracle(experts)(*leaves)):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.ones_like(expected)
        ours = torch.autograd.grad(result, leaves, upstream)
        truth = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


def run_rows(backend: str, dtype: torch.dtype) -> None:
    """Copies and their sum, each the other's gradient."""
    generator, upstream = seeded(4), torch.randn(19, 37).to(dtype)
    x = torch.randn(19, 37, generator=generator).to(dtype).requires_grad_()
    rows = torch.randn(57, 37, generator=generator).to(dtype).requires_grad_()
    order = expert_copies.sort_copies(torch.rand(19, 7, generator=generator).topk(3).indices, 7)
    with use(backend):
        copies, sums = expert_copies.copies_of(x, order), expert_copies.sums_of(rows, order)
        (grad_x,) = torch.autograd.grad(copies, x, rows.detach())
        (grad_rows,) = torch.autograd.grad(sums, rows, upstream)
    assert torch.equal(copies, x[order.tokens]) and torch.equal(grad_rows, upstream[order.tokens])
    assert torch.equal(sums, grad_x)
    of_token = rows.detach()[order.places]
    assert_no_worse(sums.detach(), of_token.sum(1), of_token.double().sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_no_worse_than_eager(
    kernel_rank: RankPool, backend: str, dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_rows, backend, dtype)


def test_a_layer_keeps_its_input_and_the_first_product() -> None:
    inputs, experts, _ = make_layer(50, 8, 4, 16, "even")
    order, kept = expert_copies.sort_copies(experts, 8), dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        expert_mlp.expert_mlp(*leaves, order, activate_by("torch"))
    hidden, gate_up, down, _ = (tensor.nbytes for tensor in inputs)
    first_product, of_rows = 4 * (4 * 50) * (2 * 16), 3 * 4 * (4 * 50)
    offsets = 4 * (8 + 1)
    assert sum(kept.values()) == hidden + gate_up + down + first_product + of_rows + offsets


def run_frozen(backend: str) -> None:
    """A frozen layer passes gradients on and makes none of its own."""
    inputs, experts, upstream = make_layer(11, 4, 2, 8, "even")
    order = expert_copies.sort_copies(experts, 4)
    grads = []
    for is_trained in (True, False):
        hidden, gate_up, down, probs = (tensor.clone() for tensor in inputs)
        for tensor in (hidden, probs):
            tensor.requires_grad_()
        for tensor in (gate_up, down):
            tensor.requires_grad_(is_trained)
        with use(backend):
            arguments = hidden, gate_up, down, probs, order
            expert_mlp.expert_mlp(*arguments, activate_by(backend)).backward(upstream)
        assert (gate_up.grad is not None) == (down.grad is not None) == is_trained
        grads.append((hidden.grad, probs.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_frozen_experts(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_frozen, backend)


def test_the_order_of_rows() -> None:
    experts = torch.tensor([[2, 0], [0, 3], [2, 3]])
    order = expert_copies.sort_copies(experts, 5)
    assert order.offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert order.copy_numbers.tolist() == [1, 2, 0, 4, 3, 5]
    assert order.tokens.tolist() == [0, 1, 0, 2, 1, 2]
    assert order.places.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert {t.dtype for t in (order.offsets, order.copy_numbers, order.tokens, order.places)} == {
        torch.int32
    }


def run_expanded_gradient() -> None:
    """torch's product refuses a gradient that is one number expanded, as sum() gives."""
    offsets = offsets_of([3, 0, 13])
    x, weight = torch.randn(16, 8, requires_grad=True), torch.randn(3, 24, 8, requires_grad=True)
    with mock.patch.object(grouped, "fits_torch_grouped_mm", return_value=True):
        ours = torch.autograd.grad(grouped.grouped_matmul(x, weight, offsets).sum(), (x, weight))
        none = grouped.grouped_matmul(x[:0], weight, offsets_of([0, 0, 0]))
    truth = torch.autograd.grad(reference.grouped_matmul(x, weight, offsets).sum(), (x, weight))
    torch.testing.assert_close(ours, truth)
    assert none.shape == (0, 24)
    assert_bit_zero(ours[1][1])


def test_torch_products_get_what_they_can_take(kernel_rank: RankPool) -> None:
    if grouped.TORCH_GROUPED_MM is None:
        pytest.skip("torch has no grouped_mm")
    kernel_rank.run(1, run_expanded_gradient)


def test_torch_products_are_not_asked_for_what_they_cannot_do() -> None:
    x, weight = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 24).bfloat16()

    def fits(x: Tensor, matrices: Tensor) -> bool:
        x = mock.Mock(wraps=x, is_cuda=True, dtype=x.dtype, device=x.device)
        with mock.patch.object(grouped, "has_grouped_mm", return_value=True):
            return grouped.fits_torch_grouped_mm(x, matrices)

    assert fits(x, weight) and fits(x, weight.transpose(1, 2).contiguous().transpose(1, 2))
    assert not fits(x.float(), weight.float())
    assert not fits(x, torch.zeros(2, 16, 20).bfloat16())
    assert not fits(x, torch.zeros(2 * 16 * 24 + 1).bfloat16()[1:].view(2, 16, 24))


ROUTINGS = {
    "softmax": Routing(3),
    "softmax of the chosen": Routing(3, renormalise=True),
    "sigmoid": Routing(3, scores="sigmoid"),
    "sigmoid of the chosen": Routing(2, renormalise=True, scores="sigmoid", scale=2.5),
    "two groups of four": Routing(3, True, "sigmoid", 2.5, num_groups=4, groups_chosen=2),
    "best of a group": Routing(2, False, "softmax", 16.0, 4, 1, scores_of_group=1),
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_router_chooses_as_the_oracle(name: str, has_bias: bool) -> None:
    routing, generator = ROUTINGS[name], seeded(0)
    hidden = torch.randn(12, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(8, 6, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(8, dtype=torch.float64, generator=generator) if has_bias else None
    results = [
        choose(router.router_logits(hidden, weight), routing, bias)
        for choose in (router.choose_experts, reference.choose_experts)
    ]
    (weights, experts), (expected, theirs) = results
    assert torch.equal(experts, theirs)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    upstream = torch.randn(weights.shape, dtype=torch.float64, generator=generator)
    ours, true = (torch.autograd.grad(w, (hidden, weight), upstream) for w in (weights, expected))
    torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_router_are_not_rounded(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(33, 64).to(dtype), torch.randn(8, 64).to(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logits, upstream = router.router_logits(hidden, weight), torch.randn(33, 8)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    truth = wide[0] @ wide[1].t()
    assert logits.dtype == torch.float32
    assert_no_worse(logits.detach(), hidden.detach().float() @ weight.detach().float().t(), truth)
    eager = hidden @ weight.t()
    grads = torch.autograd.grad(logits, leaves, upstream)
    eager_grads = torch.autograd.grad(eager, leaves, upstream.to(dtype))
    for one, plain, true in zip(
        grads, eager_grads, torch.autograd.grad(truth, wide, upstream.double()), strict=True
    ):
        assert_no_worse(one, plain, true)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_is_no_worse_than_eager_and_never_waits(dtype: torch.dtype) -> None:
    """A layer of experts with its router, as it runs in a step: main_grad, uneven loads."""
    generator = torch.Generator("cuda").manual_seed(3)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cuda") / shape[-1] ** 0.5
        return values.to(dtype).requires_grad_()

    hidden, weight, gate_up, down = (
        random(1000, 256),
        random(16, 256),
        random(16, 2 * 384, 256),
        random(16, 256, 384),
    )
    matrices: list[Any] = [gate_up, down]
    for matrix in matrices:
        matrix.main_grad = torch.zeros(matrix.shape, device="cuda")
    upstream = torch.randn(1000, 256, generator=generator, device="cuda").to(dtype)

    def step() -> tuple[Tensor, Tensor]:
        probs, experts = router.choose_experts(
            router.router_logits(hidden, weight), Routing(4, renormalise=True)
        )
        order = expert_copies.sort_copies(experts, 16)
        activate = activate_by("triton")
        output = expert_mlp.expert_mlp(hidden, gate_up, down, probs, order, activate)
        output.backward(upstream)
        return output.detach(), experts

    step()
    for matrix in matrices:
        matrix.main_grad.zero_()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, experts = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad is not None and weight.grad is not None
    ours = [output, hidden.grad, weight.grad, gate_up.main_grad, down.main_grad]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, gate_up, down)
        ]
        logits = leaves[0] @ leaves[1].t()
        probs = logits.gather(1, experts).softmax(1)
        result = reference.expert_mlp(leaves[0], *leaves[2:], probs, experts)
        return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(dtype))]

    for one, plain, true in zip(ours, eager(dtype), eager(torch.float64), strict=True):
        assert_no_worse(one, plain, true, (2,))
