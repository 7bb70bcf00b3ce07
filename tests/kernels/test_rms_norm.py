"""RMSNorm and its additions to the residual, in every backend, against the oracle."""

from functools import partial
from typing import Any
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
FORMS = ["rms_norm", "add_rms_norm", "rms_norm_add"]
SHAPES = [(7, 13), (5, 1, 100), (3, 2, 512), (9, 1100)]
if ON_GPU:
    # Of few elements the largest rounding in 16 bits is luck, on either side.
    SHAPES = [(1007, 13), (505, 1, 100), (203, 2, 512), (309, 1100)]


def oracle(form: str, is_zero_centered: bool) -> Step:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x, weight, EPS, is_zero_centered)

    return {
        "rms_norm": norm,
        "add_rms_norm": lambda x, residual, weight: (norm(x + residual, weight), x + residual),
        "rms_norm_add": lambda x, residual, weight: residual + norm(x, weight),
    }[form]


def step_of(backend: str, form: str, is_zero_centered: bool = False) -> Step:
    return partial(getattr(load(backend), form), eps=EPS, is_zero_centered=is_zero_centered)


def make_inputs(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, the residual where the form has one, and the weight."""
    generator = seeded(sum(shape))
    x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    tensors = [3 * x, weight] if form == "rms_norm" else [3 * x, residual, weight]
    return [tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize("is_zero_centered", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_torch_equals_the_oracle(form: str, is_zero_centered: bool) -> None:
    inputs = make_inputs(form, (5, 3, 100), torch.float32)
    found = outputs_and_gradients(step_of("torch", form, is_zero_centered), inputs)
    truth = outputs_and_gradients(oracle(form, is_zero_centered), inputs)
    torch.testing.assert_close(found, truth)


def run_form(form: str, is_zero_centered: bool) -> None:
    steps = [step_of(backend, form, is_zero_centered) for backend in ("triton", "torch")]
    for shape in SHAPES:
        for dtype in DTYPES:
            inputs = make_inputs(form, shape, dtype)
            compare(*steps, oracle(form, is_zero_centered), inputs)


@pytest.mark.parametrize("is_zero_centered", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_triton_is_no_worse_than_eager(
    kernel_rank: RankPool, form: str, is_zero_centered: bool
) -> None:
    kernel_rank.run(1, run_form, form, is_zero_centered)


def run_few_programs() -> None:
    """Programs of several rows, and one that has fewer than the others, give the same gradients."""
    from sft_fast.kernels import rms_norm_triton as kernels

    inputs = make_inputs("add_rms_norm", (11, 70), torch.float32)
    for programs in (1, 3, 11):
        with mock.patch.multiple(kernels, MAX_PROGRAMS=programs, MIN_ROWS_PER_PROGRAM=1):
            assert kernels.num_programs(11, True) == programs
            steps = [step_of(name, "add_rms_norm") for name in ("triton", "torch")]
            compare(*steps, oracle("add_rms_norm", False), inputs)
            first, second = (outputs_and_gradients(steps[0], inputs) for _ in range(2))
            assert all(map(torch.equal, first, second)), "not deterministic"


def test_programs_of_several_rows(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_few_programs)


def run_main_grad() -> None:
    """The weight's gradient is added in fp32 to what main_grad holds; autograd gets a stand-in."""
    x, residual, weight = make_inputs("add_rms_norm", (9, 40), torch.float16)
    x.requires_grad_()
    weight = torch.nn.Parameter(weight)
    step = step_of("triton", "add_rms_norm")
    (wanted,) = torch.autograd.grad(step(x, residual, weight)[0].sum(), weight)
    for zero_out in (False, True):
        weight.main_grad = torch.full((40,), 2.0)
        weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, zero_out
        weight.grad = None
        step(x, residual, weight)[0].sum().backward()
        assert weight.grad_added_to_main_grad
        assert weight.grad.shape == weight.shape and (not zero_out or not weight.grad.any())
        # In fp32: it has digits that fp16 does not.
        added = weight.main_grad - 2.0
        torch.testing.assert_close(added.half(), wanted, rtol=2e-3, atol=2e-3)
        assert not torch.equal(added, added.half().float())


def test_weight_gradient_goes_into_main_grad(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_main_grad)


def run_frozen() -> None:
    """A frozen weight has no partial sums; without gradients nothing is kept at all."""
    from sft_fast.kernels import rms_norm_triton as kernels

    x, weight = make_inputs("rms_norm", (9, 40), torch.float32)
    step = step_of("triton", "rms_norm")
    with mock.patch.object(kernels, "add_column_sums", side_effect=AssertionError):
        output = step(x.requires_grad_(), weight)
        output.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    with torch.no_grad():
        assert step(x, weight).grad_fn is None


def test_frozen_weight_costs_nothing(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_frozen)


def run_hostile() -> None:
    """NaN stays in its row; rows of zeros, no rows, strides, an expanded upstream gradient."""
    x, weight = make_inputs("rms_norm", (6, 50), torch.float32)
    x[2], x[4] = torch.nan, 0.0
    step = step_of("triton", "rms_norm")
    leaf = x.clone().requires_grad_()
    output = step(leaf, weight)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones(1, 1).expand(6, 50))
    for tensor in (output, gradient):
        assert tensor.isnan().all(1).tolist() == [row == 2 for row in range(6)]
        assert tensor.isnan().any(1).tolist() == [row == 2 for row in range(6)]
    strided = torch.randn(50, 6, generator=seeded(1)).t()
    assert torch.equal(step(strided, weight), step(strided.contiguous(), weight))
    empty = x[:0].clone().requires_grad_()
    weight.requires_grad_()
    gradients = torch.autograd.grad(step(empty, weight).sum(), (empty, weight))
    assert gradients[0].shape == (0, 50) and not gradients[1].any()


def test_hostile_inputs(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_hostile)


def run_writing() -> None:
    """The same bits again, in the memory that is given."""
    for backend in ("torch", "triton"):
        kernels = load(backend)
        for is_zero_centered in (False, True):
            x, _, weight = make_inputs("add_rms_norm", (3, 50), torch.float16)
            how = weight, EPS, is_zero_centered
            out = torch.empty(3, 50, dtype=torch.float16)
            kernels.write_rms_norm(out, x, *how)
            assert out.equal(kernels.rms_norm(x, *how))
            normed, total = kernels.add_rms_norm(x, None, *how)
            assert out.equal(normed) and total.equal(x)


def test_written_again_it_is_the_same(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_writing)


def run_opcheck() -> None:
    """Shapes and strides of the fake results, and what the operations say that they change."""
    from sft_fast.kernels import rms_norm_triton as kernels

    x, residual, weight = make_inputs("add_rms_norm", (4, 30), torch.float32)
    rstd = torch.rand(4)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (kernels.rms_norm_forward, (x, weight, EPS, False)),
        (kernels.write_rms_norm, (torch.empty(4, 30), x, weight, EPS, False)),
        (kernels.add_rms_norm_forward, (x, residual, weight, EPS, True)),
        (kernels.rms_norm_add_forward, (x, residual, weight, EPS, False)),
        (kernels.rms_norm_backward, (x, residual, x, rstd, weight, False, torch.zeros(30))),
        (kernels.rms_norm_backward, (x, None, x, rstd, weight, False, None)),
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
    x = torch.ones(1 << 18, 8200, device="cuda", dtype=torch.bfloat16)
    x[-1].uniform_(-3, 3)
    weight = torch.rand(8200, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    normed, total = load("triton").add_rms_norm(x, x, weight, EPS)
    last = step_of("torch", "add_rms_norm")(x[-1:], x[-1:], weight)
    torch.testing.assert_close((normed[-1:], total[-1:]), last)
    assert normed.isfinite().all()
