"""SwiGLU and its kin in every backend, against the oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor

from block_cases import DTYPES, Step, compare, load, outputs_and_gradients
from kernel_pool import ON_GPU, seeded
from rank_pool import RankPool
from sft_fast.reference import block as reference

pytest.importorskip("triton")

KINDS = ["silu", "gelu_tanh", "clamped_silu"]
SHAPES = [(1, 1), (7, 13), (3, 2, 768), (5, 2501)]


def step_of(backend: str, kind: str) -> Step:
    """(gate_up, and where rows have one their scale) -> output."""

    def step(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        output: Tensor = load(backend).gated_activation(gate_up, kind, scale)
        return output

    return step


def oracle(kind: str) -> Step:
    def step(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        output = reference.gated_activation(gate_up, kind)
        return output if scale is None else output * scale[..., None]

    return step


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, has_scale: bool) -> list[Tensor]:
    """gate_up [..., 2 n], and the scale in fp32 as routers give it."""
    generator = seeded(sum(shape))
    gate_up = 4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    scale = [torch.rand(shape[:-1], generator=generator)] if has_scale else []
    return [gate_up.to(dtype), *scale]


@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_equals_the_oracle(kind: str, has_scale: bool) -> None:
    inputs = make_inputs((5, 3, 100), torch.float32, has_scale)
    found = outputs_and_gradients(step_of("torch", kind), inputs)
    truth = outputs_and_gradients(oracle(kind), inputs)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-4)


def run_kind(kind: str, has_scale: bool) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            inputs = make_inputs(shape, dtype, has_scale)
            compare(step_of("triton", kind), step_of("torch", kind), oracle(kind), inputs)


@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_no_worse_than_eager(kernel_rank: RankPool, kind: str, has_scale: bool) -> None:
    kernel_rank.run(1, run_kind, kind, has_scale)


def run_overwrite() -> None:
    """The gradient takes the input's place; who then asks again is told so."""
    (gate_up,) = make_inputs((5, 300), torch.float32, False)
    leaf = gate_up.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(step_of("triton", "silu")(leaf).sum(), leaf)
    assert torch.equal(leaf, gate_up), "overwritten without leave"
    output = load("triton").gated_activation(leaf, "silu", may_overwrite=True)
    assert torch.equal(leaf, gate_up)
    (gradient,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
    assert gradient.data_ptr() == leaf.data_ptr() and torch.equal(gradient, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), leaf)


def test_gradient_in_place_of_the_input(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_overwrite)


def run_extremes(kind: str) -> None:
    """Gates that overflow exp, infinities and NaN: as in PyTorch, and in their own channel only."""
    gates = torch.tensor([1e4, -1e4, 100.0, -100.0, 0.0, torch.inf, torch.nan, 1.0, 2.0])
    partners = torch.tensor([1.0, 2.0, 1e30, 1e30, torch.inf, 1.0, 1.0, torch.nan, 3.0])
    inputs = [torch.cat([gates, partners])[None]]
    found = outputs_and_gradients(step_of("triton", kind), inputs)
    theirs = outputs_and_gradients(step_of("torch", kind), inputs)
    torch.testing.assert_close(found[0], theirs[0], equal_nan=True)
    gradient, their_gradient = (each.view(2, 9) for each in (found[1], theirs[1]))
    # The slope where a number is infinite or NaN is anybody's guess.
    known = [0, 1, 2, 3, 8]
    torch.testing.assert_close(gradient[:, known], their_gradient[:, known], equal_nan=True)
    assert gradient[:, 8].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_as_in_torch(kernel_rank: RankPool, kind: str) -> None:
    kernel_rank.run(1, run_extremes, kind)


def run_hostile() -> None:
    """Strides, no rows, an expanded upstream gradient; the same twice."""
    gate_up, scale = make_inputs((6, 40), torch.float32, True)
    step = step_of("triton", "silu")
    strided = gate_up.t().contiguous().t()
    assert torch.equal(step(strided), step(gate_up))
    leaf = gate_up[:0].clone().requires_grad_()
    assert torch.autograd.grad(step(leaf, scale[:0]).sum(), leaf)[0].shape == (0, 80)
    first, second = (outputs_and_gradients(step, [gate_up, scale]) for _ in range(2))
    assert all(map(torch.equal, first, second))
    leaf = strided.detach().requires_grad_()
    ones = torch.ones(1, 1).expand(6, 40)
    gradients = [torch.autograd.grad(step(leaf), leaf, each) for each in (ones, ones.contiguous())]
    assert torch.equal(gradients[0][0], gradients[1][0])


def test_hostile_inputs(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_hostile)


def run_writing() -> None:
    """The same bits again, in the memory that is given."""
    for backend in ("torch", "triton"):
        kernels = load(backend)
        for has_scale in (False, True):
            gate_up, *scale = make_inputs((5, 2501), torch.float16, has_scale)
            out = torch.empty(5, 2501, dtype=torch.float16)
            kernels.write_gated_activation(out, gate_up, "silu", *(scale or [None]))
            assert out.equal(step_of(backend, "silu")(gate_up, *scale))


def test_written_again_it_is_the_same(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_writing)


def run_opcheck() -> None:
    from sft_fast.kernels import gated_activation_triton as kernels

    gate_up, scale = make_inputs((4, 30), torch.float32, True)
    grads = torch.empty(4, 60), torch.empty(4), torch.randn(4, 30)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (kernels.write_gated_activation, (grads[2], gate_up, "silu", None)),
        (kernels.write_gated_activation, (grads[2], gate_up, "gelu_tanh", scale)),
        (kernels.write_gradient, (*grads, gate_up, scale, "silu")),
        (kernels.write_gradient, (grads[0], None, grads[2], gate_up, None, "silu")),
    ]
    for operation, arguments in cases:
        torch.library.opcheck(
            operation.registered, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_operations_are_described_truly(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_opcheck)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_elements_than_an_int32_counts() -> None:
    gate_up = torch.ones((1 << 16) + 3, 1 << 15, device="cuda", dtype=torch.bfloat16)
    gate_up[-1].uniform_(-3, 3)
    gate_up.requires_grad_()
    scale = torch.ones(len(gate_up), device="cuda", requires_grad=True)
    output = load("triton").gated_activation(gate_up, "silu", scale)
    last = gate_up[-1:].detach().requires_grad_()
    wanted = load("torch").gated_activation(last, "silu", scale[-1:])
    torch.testing.assert_close(output[-1:], wanted)
    gradient, scale_gradient = torch.autograd.grad(output, (gate_up, scale), output.detach())
    (true_gradient,) = torch.autograd.grad(wanted, last, wanted.detach())
    torch.testing.assert_close(gradient[-1:], true_gradient, rtol=2e-2, atol=2e-2)
    assert scale_gradient.isfinite().all()
