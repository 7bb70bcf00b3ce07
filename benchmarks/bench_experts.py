"""Experts: grouped products against a dense one and a loop, a layer against transformers.

    pytest benchmarks/bench_experts.py

`fraction_of_limit` is the speed of one dense product with as many FLOPs on the same machine, or for
the layer the FLOPs of its products at that speed, over the measured time. Sizes on a GPU are those
of Qwen3-30B-A3B (128 experts, 8 of them a token) and 8192 tokens, on a CPU of a small model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from closeness import assert_no_worse
from sft_fast.kernels import grouped_matmul as grouped
from sft_fast.kernels.backends import load_backend
from sft_fast.kernels.expert_copies import sort_copies
from sft_fast.kernels.expert_mlp import expert_mlp
from sft_fast.kernels.router import choose_experts, router_logits
from sft_fast.kernels.routing import Routing
from sft_fast.reference import experts as reference
from timing import DEVICE, ON_GPU, median_s, peak_bytes_beyond

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS, HIDDEN, WIDTH, EXPERTS, CHOSEN = (
    (8192, 2048, 768, 128, 8) if ON_GPU else (256, 128, 96, 16, 4)
)
ROWS, ROUTING = TOKENS * CHOSEN, Routing(CHOSEN, renormalise=True)
LOADS = ("even", "uneven")
PRODUCTS = ("ours", "triton", "loop")


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal, so that a product with the last dimension has about the size of its factors."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=DEVICE)
    return (values / shape[-1] ** 0.5).to(DTYPE)


def offsets_of(load: str) -> Tensor:
    """Of ROWS rows: the same for each expert, or shares that differ by a factor of 20."""
    shares = torch.ones(EXPERTS) if load == "even" else torch.logspace(0, 1.3, EXPERTS)
    ends = (shares.cumsum(0) / shares.sum() * ROWS).round().to(torch.int32)
    return torch.cat([ends.new_zeros(1), ends]).to(DEVICE)


def multiply(how: str, x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    if how == "ours":
        return grouped.multiply_groups(x, matrices, offsets)
    backend = "torch" if how == "loop" else how
    products: grouped.GroupedProducts = load_backend("grouped_matmul", backend, DEVICE.type)
    return products.multiply_groups(x, matrices, offsets)


def record(
    benchmark: BenchmarkFixture, run: Callable[[], object], limit_s: float, flops: float
) -> None:
    """Times `run` and adds what it is held against."""
    seconds = median_s(run)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(
        ms=1e3 * seconds,
        tflops=flops / seconds / 1e12,
        flops=flops,
        fraction_of_limit=limit_s / seconds,
    )
    if ON_GPU:
        benchmark.extra_info["peak_bytes"] = peak_bytes_beyond(run)


@functools.cache
def dense_s(num_inputs: int, num_outputs: int) -> float:
    """Seconds of one product of all rows with one matrix."""
    x, matrix = random(ROWS, num_inputs), random(num_outputs, num_inputs)
    return median_s(lambda: x @ matrix.t())


@functools.cache
def dense_gradient_s(num_inputs: int, num_outputs: int) -> float:
    """Seconds of one product with as many FLOPs as all gradients of the matrices."""
    x, grad = random(ROWS, num_inputs), random(ROWS, num_outputs)
    return median_s(lambda: grad.t() @ x)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("how", PRODUCTS)
@pytest.mark.parametrize("what", ["gate_up", "down", "gate_up input", "down input"])
def test_products(benchmark: BenchmarkFixture, what: str, how: str, load: str) -> None:
    """`input`: the gradient of the inputs, for which matrices are read the other way."""
    if how == "triton" and not ON_GPU:
        pytest.skip("needs a GPU")
    is_gate_up, is_input = what.startswith("gate_up"), what.endswith("input")
    weight = random(EXPERTS, *((2 * WIDTH, HIDDEN) if is_gate_up else (HIDDEN, WIDTH)), seed=1)
    matrices, offsets = weight if is_input else weight.transpose(1, 2), offsets_of(load)
    x = random(ROWS, matrices.shape[1])
    result = multiply(how, x, matrices, offsets)
    last = slice(int(offsets[-2]), ROWS)
    truth = x[last].double() @ matrices[-1].double()
    assert_no_worse(result[last], x[last] @ matrices[-1], truth)
    limit = dense_s(matrices.shape[1], matrices.shape[2])
    flops = 2.0 * ROWS * matrices.shape[1] * matrices.shape[2]
    record(benchmark, lambda: multiply(how, x, matrices, offsets), limit, flops)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("how", ["ours", "by number", "grouped_mm", "loop"])
@pytest.mark.parametrize("what", ["gate_up", "down"])
def test_gradients(benchmark: BenchmarkFixture, what: str, how: str, load: str) -> None:
    """Into fp32; `by number`: inputs are found by number; `grouped_mm`: torch's, then added."""
    if how == "grouped_mm" and not (ON_GPU and grouped.has_grouped_mm(DEVICE)):
        pytest.skip("torch has no kernel for it here")
    num_outputs, num_inputs = (2 * WIDTH, HIDDEN) if what == "gate_up" else (HIDDEN, WIDTH)
    grad, x, offsets = random(ROWS, num_outputs), random(ROWS, num_inputs, seed=1), offsets_of(load)
    total = torch.zeros(EXPERTS, num_outputs, num_inputs, device=DEVICE)
    tokens, rows = x, None
    if how == "by number":
        generator = torch.Generator(DEVICE).manual_seed(2)
        order = torch.randperm(ROWS, generator=generator, device=DEVICE)
        tokens, rows = x[:TOKENS].contiguous(), (order // CHOSEN).to(torch.int32)
        x = tokens[rows]
    backend = load_backend("grouped_matmul", "torch" if how == "loop" else "auto", DEVICE.type)

    def run() -> None:
        if how == "grouped_mm":
            total.add_(grouped.TORCH_GROUPED_MM(grad.t(), x, offs=offsets[1:]))
        else:
            backend.add_outer_products(total, grad, tokens, offsets, rows, True)

    run()
    last = slice(int(offsets[-2]), ROWS)
    eager, truth = grad[last].t() @ x[last], grad[last].double().t() @ x[last].double()
    assert_no_worse(total[-1], eager, truth)
    limit, flops = dense_gradient_s(num_inputs, num_outputs), 2.0 * ROWS * num_outputs * num_inputs
    record(benchmark, run, limit, flops)
    benchmark.extra_info["bytes"] = 8 * total.numel() + 2 * (grad.numel() + x.numel())


class Layer(NamedTuple):
    """A router and its experts."""

    hidden: Tensor
    router: Tensor
    gate_up: Tensor
    down: Tensor


def make_layer() -> Layer:
    shapes = (TOKENS, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN)
    layer = Layer(
        *(random(*shape, seed=i) for i, shape in enumerate((*shapes, (EXPERTS, HIDDEN, WIDTH))))
    )
    layer.hidden.mul_(HIDDEN**0.5)
    for tensor in layer:
        tensor.requires_grad_()
    return layer


def ours(layer: Layer) -> Tensor:
    block = load_backend("block", "auto", DEVICE.type)
    probs, experts = choose_experts(router_logits(layer.hidden, layer.router), ROUTING)

    def activate(gate_up: Tensor, factors: Tensor) -> Tensor:
        result: Tensor = block.gated_activation(gate_up, "silu", factors, False)
        return result

    order = sort_copies(experts, EXPERTS)
    return expert_mlp(layer.hidden, layer.gate_up, layer.down, probs, order, activate)


def transformers_block(layer: Layer, implementation: str) -> Callable[[Layer], Tensor]:
    """Qwen3's block of experts with the layer's tensors as its parameters."""
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = modeling.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device(DEVICE):
        block = modeling.Qwen3MoeSparseMoeBlock(config).to(DTYPE)
    owners = (block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj")
    for (owner, name), tensor in zip(owners, layer[1:], strict=True):
        delattr(owner, name)
        setattr(owner, name, tensor)
    return lambda layer: block(layer.hidden.unsqueeze(0))[0]


def exact(layer: Layer) -> Tensor:
    """In fp64."""
    hidden, router, gate_up, down = (tensor.double() for tensor in layer)
    probs, experts = choose_experts(hidden @ router.t(), ROUTING)
    return reference.expert_mlp(hidden, gate_up, down, probs, experts)


@pytest.mark.parametrize("has_main_grad", [True, False], ids=["main_grad", "grad"])
@pytest.mark.parametrize("how", ["ours", "grouped_mm", "eager"])
def test_layer(benchmark: BenchmarkFixture, how: str, has_main_grad: bool) -> None:
    """Forward and backward. Gradients that transformers makes are added to fp32 for `main_grad`, as
    megatron's hook does."""
    layer = make_layer()
    run_layer: Callable[[Layer], Tensor] = ours
    if how != "ours":
        run_layer = transformers_block(layer, how)
    matrices: list[Any] = [layer.gate_up, layer.down]
    for matrix in matrices:
        total = torch.zeros(matrix.shape, device=DEVICE)
        if has_main_grad and how == "ours":
            matrix.main_grad = total
        elif has_main_grad:
            matrix.register_post_accumulate_grad_hook(functools.partial(add_gradient, total))
    upstream = random(TOKENS, HIDDEN, seed=9)

    def run() -> Tensor:
        for tensor in layer:
            tensor.grad = None
        result = run_layer(layer)
        result.backward(upstream)
        return result.detach()

    if how == "ours":
        with torch.no_grad():
            theirs, truth = transformers_block(layer, "grouped_mm")(layer), exact(layer)
        assert_no_worse(run(), theirs, truth, (2,))
    flops = 6.0 * ROWS * 3 * HIDDEN * WIDTH
    products = [(HIDDEN, 2 * WIDTH), (2 * WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    gradients = [(HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN)]
    limit = sum(dense_s(*p) for p in products) + sum(dense_gradient_s(*g) for g in gradients)
    record(benchmark, run, limit, flops)


def add_gradient(total: Tensor, parameter: Tensor) -> None:
    """As megatron's hook does."""
    assert parameter.grad is not None
    total.add_(parameter.grad)
    parameter.grad = None
