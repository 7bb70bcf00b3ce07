"""Heads of the fused projection, normalised and rotated, in every backend, against the oracle."""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from block_cases import DTYPES, Step, compare, load, outputs_and_gradients
from kernel_pool import ON_GPU, seeded
from rank_pool import RankPool
from sft_fast.reference import block as reference

pytest.importorskip("triton")

EPS = 1e-3


class Layout(NamedTuple):
    groups: int
    queries: int
    """per group"""
    head_dim: int
    rotated: int
    has_norm: bool = False
    is_zero_centered: bool = False


LAYOUTS = [
    Layout(2, 4, 16, 16),
    Layout(1, 1, 8, 8, True),
    Layout(3, 3, 24, 12, True, True),  # not powers of two
    Layout(3, 2, 24, 18),  # halves of 9 channels
    Layout(5, 2, 16, 0, True),  # without positions
    Layout(5, 1, 16, 0),
    Layout(3, 20, 64, 64, True),  # several blocks of queries
    Layout(20, 2, 128, 128),  # and of keys
]
TOKENS = 7, 2


def table_of(layout: Layout) -> Tensor | None:
    """Cosines, then sines, of any angles, times a factor as of YaRN: fp32 [tokens, rotated]."""
    if not layout.rotated:
        return None
    angles = 5 * torch.randn(TOKENS[0] * TOKENS[1], layout.rotated // 2, generator=seeded(3))
    return 1.3 * torch.cat([angles.cos(), angles.sin()], dim=1)


def make_inputs(layout: Layout, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The projection's output [7, 2, ...], and with a norm the two weights."""
    generator = seeded(layout.head_dim)
    size = layout.groups * (layout.queries + 2) * layout.head_dim
    tensors = [2 * torch.randn(*TOKENS, size, generator=generator)]
    if layout.has_norm:
        tensors += [torch.randn(layout.head_dim, generator=generator) for _ in range(2)]
    return [tensor.to(dtype) for tensor in tensors]


def step_of(backend: str, layout: Layout) -> Step:
    """(qkv, and with a norm two weights) -> queries, keys, values."""
    table = table_of(layout)

    def step(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        options = *(weights or (None, None)), EPS, layout.is_zero_centered
        heads = load(backend).rotate_qkv(qkv, table, layout.groups, layout.head_dim, *options)
        return tuple(heads)

    return step


def oracle(layout: Layout) -> Step:
    table = table_of(layout)

    def step(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = reference.split_qkv(qkv.flatten(0, 1), layout.groups, layout.head_dim)
        heads = [query, key]
        if weights:
            how = EPS, layout.is_zero_centered
            heads = [reference.rms_norm(*pair, *how) for pair in zip(heads, weights, strict=True)]
        if table is not None:
            turns = torch.complex(*table.to(qkv.dtype).chunk(2, dim=1))
            heads = [reference.rotate(part, turns) for part in heads]
        return tuple(part.unflatten(0, TOKENS) for part in (*heads, value))

    return step


@pytest.mark.parametrize("layout", LAYOUTS[:6], ids=str)
def test_torch_equals_the_oracle(layout: Layout) -> None:
    inputs = make_inputs(layout)
    found = outputs_and_gradients(step_of("torch", layout), inputs)
    truth = outputs_and_gradients(oracle(layout), inputs)
    torch.testing.assert_close(found, truth)


def run_layout(layout: Layout) -> None:
    for dtype in DTYPES:
        steps = [step_of(backend, layout) for backend in ("triton", "torch")]
        compare(*steps, oracle(layout), make_inputs(layout, dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_triton_is_no_worse_than_eager(kernel_rank: RankPool, layout: Layout) -> None:
    kernel_rank.run(1, run_layout, layout)


def run_few_programs() -> None:
    """Programs of several tokens give the same gradients, the same twice."""
    from sft_fast.kernels import rotary_triton as kernels

    layout = LAYOUTS[2]
    inputs = make_inputs(layout)
    for programs in (1, 5):
        with mock.patch.multiple(kernels, MAX_PROGRAMS=programs, MIN_TOKENS_PER_PROGRAM=1):
            steps = [step_of(backend, layout) for backend in ("triton", "torch")]
            compare(*steps, oracle(layout), inputs)
            first, second = (outputs_and_gradients(steps[0], inputs) for _ in range(2))
            assert all(map(torch.equal, first, second)), "not deterministic"


def test_programs_of_several_tokens(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_few_programs)


def run_main_grad() -> None:
    """Gradients of trained weights are added to main_grad; of a frozen one nothing is computed."""
    layout = LAYOUTS[1]
    qkv, *weights = make_inputs(layout)
    q_weight, k_weight = map(torch.nn.Parameter, weights)
    step = step_of("triton", layout)
    wanted = torch.autograd.grad(
        step(qkv, q_weight, k_weight)[:2],
        (q_weight, k_weight),
        [torch.ones(*TOKENS, heads, layout.head_dim) for heads in (layout.queries, 1)],
    )
    for weight in (q_weight, k_weight):
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(layout.head_dim), False
    sum(heads.sum() for heads in step(qkv, q_weight, k_weight)[:2]).backward()
    for weight, gradient in zip((q_weight, k_weight), wanted, strict=True):
        torch.testing.assert_close(weight.main_grad, 1 + gradient)
        assert weight.grad_added_to_main_grad
    q_weight.requires_grad_(False)
    q_weight.main_grad.fill_(torch.nan)
    query, key, _ = step(qkv.requires_grad_(), q_weight, k_weight)
    (query.sum() + key.sum()).backward()
    torch.testing.assert_close(k_weight.main_grad, 1 + 2 * wanted[1])
    assert qkv.grad.isfinite().all()


def test_weight_gradients_go_into_main_grad(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_main_grad)


def run_values() -> None:
    """Values arrive bit by bit, whatever they hold, and nothing of them in queries and keys."""
    for layout in (LAYOUTS[2], LAYOUTS[3]):
        qkv, *weights = make_inputs(layout, torch.float16)
        fused = qkv.unflatten(-1, (layout.groups, -1, layout.head_dim))
        fused[..., -1, ::2], fused[..., -1, 1::4] = torch.inf, torch.nan
        before = fused[..., -1, :].clone()
        qkv.requires_grad_()
        query, key, value = step_of("triton", layout)(qkv, *weights)
        assert torch.equal(value.view(torch.int16), before.view(torch.int16))
        assert query.isfinite().all() and key.isfinite().all()
        upstream = torch.full_like(value, torch.inf)
        (gradient,) = torch.autograd.grad(
            (query, key, value), qkv, (query.detach(), key.detach(), upstream)
        )
        gradient = gradient.view_as(fused)
        assert gradient[..., :-1, :].isfinite().all() and gradient[..., -1, :].isinf().all()


def test_values_are_left_alone(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_values)


def run_strides() -> None:
    """Gradients as attention gives them: parts of one buffer, transposed, expanded."""
    layout = LAYOUTS[0]
    (qkv,) = make_inputs(layout)
    shapes = [(*TOKENS, heads, layout.head_dim) for heads in (8, 2, 2)]
    plain = [torch.randn(shape, generator=seeded(5)) for shape in shapes]
    joint = torch.cat(plain, dim=-2)
    views = {
        "one buffer": joint.split([8, 2, 2], dim=-2),
        "heads first": [part.transpose(0, 2).contiguous().transpose(0, 2) for part in plain],
        "channels first": [part.transpose(0, 3).contiguous().transpose(0, 3) for part in plain],
    }
    qkv.requires_grad_()
    (wanted,) = torch.autograd.grad(step_of("triton", layout)(qkv), qkv, plain)
    for name, upstream in views.items():
        heads = step_of("triton", layout)(qkv)
        assert all(part.stride(-1) == 1 for part in heads)
        (gradient,) = torch.autograd.grad(heads, qkv, upstream)
        assert torch.equal(gradient, wanted), name
    ones = [torch.ones(1).expand(shape) for shape in shapes]
    (gradient,) = torch.autograd.grad(step_of("triton", layout)(qkv), qkv, ones)
    (wanted,) = torch.autograd.grad(step_of("torch", layout)(qkv), qkv, ones)
    torch.testing.assert_close(gradient, wanted)


def test_gradients_of_any_strides(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_strides)


def run_opcheck() -> None:
    from sft_fast.kernels import rotary_triton as kernels

    layout = LAYOUTS[2]
    qkv, *weights = make_inputs(layout)
    table, dims = table_of(layout), (layout.groups, layout.head_dim, EPS, True)
    heads = [torch.randn(*TOKENS, count, layout.head_dim) for count in (9, 3, 3)]
    totals = [torch.zeros(layout.head_dim) for _ in range(2)]
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (kernels.rotary_forward, (qkv, table, *weights, *dims)),
        (kernels.rotary_forward, (qkv, None, None, None, *dims)),
        (kernels.rotary_backward, (*heads, qkv, table, *weights, *totals, EPS, True)),
        (kernels.rotary_backward, (*heads, None, table, None, None, None, None, EPS, True)),
    ]
    for operation, arguments in cases:
        torch.library.opcheck(
            operation.registered, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_operations_are_described_truly(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_opcheck)


def run_no_tokens() -> None:
    layout = LAYOUTS[1]
    qkv, *weights = (tensor.requires_grad_() for tensor in make_inputs(layout))
    empty = qkv[:0].detach().requires_grad_()
    table = torch.zeros(0, layout.rotated)
    dims = layout.groups, layout.head_dim
    heads = load("triton").rotate_qkv(empty, table, *dims, *weights, EPS)
    gradients = torch.autograd.grad(sum(part.sum() for part in heads), (empty, *weights))
    assert gradients[0].shape == empty.shape and not any(part.any() for part in gradients[1:])


def test_no_tokens(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_no_tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("has_norm", [False, True])
def test_more_elements_than_an_int32_counts(has_norm: bool) -> None:
    tokens, dims = 1 << 19, (8, 128)
    qkv = torch.ones(tokens, 48 * 128, device="cuda", dtype=torch.bfloat16)
    qkv[-1].uniform_(-3, 3)
    table = torch.rand(tokens, 128, device="cuda")
    weights = [torch.rand(128, device="cuda", dtype=torch.bfloat16) for _ in range(2 * has_norm)]
    options = *(weights or (None, None)), EPS
    heads = load("triton").rotate_qkv(qkv.requires_grad_(), table, *dims, *options)
    last = qkv[-1:].detach().requires_grad_()
    wanted = load("torch").rotate_qkv(last, table[-1:], *dims, *options)
    # Eager rounds the normalised heads before it turns them.
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close([part[-1:] for part in heads], list(wanted), **tolerance)
    (gradient,) = torch.autograd.grad(heads, qkv, [part.detach() for part in heads])
    (true_gradient,) = torch.autograd.grad(wanted, last, [part.detach() for part in wanted])
    torch.testing.assert_close(gradient[-1:], true_gradient, **tolerance)
