"""What a layer does between its products, forward and backward, against the bytes it has to move.

    pytest benchmarks/bench_block_kernels.py

`fraction_of_limit` is the time of the bytes of kernels/README.md at the speed of a large copy on
the same machine, over the measured time. On a GPU a graph is replayed, so that no launch is timed;
peers too. Weights have a `main_grad`, as in training. Each contender's results are held against the
oracle before it is timed. Peers: PyTorch as it is, torch.compile of it, megatron's fused SwiGLU,
Liger.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from block_cases import Step, outputs_and_gradients
from sft_fast.kernels import block_torch
from sft_fast.reference import block as reference
from timing import DEVICE, ON_GPU, copy_bytes_per_s, graph_median_s, median_s

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS = 16384 if ON_GPU else 64
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """An operation on given sizes.

    Attributes:
        step: of a module with the layer's kernels.
        shapes: of its arguments; vectors are weights.
        forward_numbers, backward_numbers: of 16 bits, per token, read and written.
    """

    step: Callable[[Any], Step]
    oracle: Step
    shapes: tuple[tuple[int, ...], ...]
    forward_numbers: int
    backward_numbers: int
    peers: dict[str, Step]
    num_tokens: int = TOKENS


def norm_case(hidden_size: int) -> Case:
    def oracle(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return reference.rms_norm(total, weight, EPS), total

    def liger(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        # It normalises in place of the upstream gradient, which the timing loop uses again.
        results: tuple[Tensor, Tensor] = LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, EPS, 0.0, "llama", False
        )
        return results

    shapes = (TOKENS, hidden_size), (TOKENS, hidden_size), (hidden_size,)
    return Case(
        lambda kernels: lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
        oracle,
        shapes,
        4 * hidden_size,
        4 * hidden_size,
        {"Liger": liger},
    )


def rotary_case(num_groups: int, queries: int, head_dim: int, has_norm: bool) -> Case:
    num_queries = num_groups * queries
    generator = torch.Generator(DEVICE).manual_seed(1)
    angles = torch.rand(TOKENS, head_dim // 2, device=DEVICE, generator=generator)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)

    def step(kernels: Any) -> Step:
        def rotate(qkv: Tensor, *weights: Tensor) -> Any:
            how = *(weights or (None, None)), EPS
            rows = table[: len(qkv)]
            return kernels.rotate_qkv(qkv, rows, num_groups, head_dim, *how)

        return rotate

    def oracle(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = reference.split_qkv(qkv, num_groups, head_dim)
        if weights:
            query = reference.rms_norm(query, weights[0], EPS)
            key = reference.rms_norm(key, weights[1], EPS)
        turns = torch.complex(*table[: len(qkv)].double().chunk(2, dim=1))
        return reference.rotate(query, turns), reference.rotate(key, turns), value

    def liger(qkv: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.transformers.functional import liger_rope

        grouped = qkv.unflatten(-1, (num_groups, -1, head_dim))
        query = grouped[:, :, :-2].flatten(1, 2).transpose(0, 1)[None]
        key, value = grouped[:, :, -2].transpose(0, 1)[None], grouped[:, :, -1]
        cos, sin = (part.repeat(1, 2)[None] for part in table[: len(qkv)].chunk(2, dim=1))
        query, key = liger_rope(query, key, cos, sin)
        return query[0].transpose(0, 1), key[0].transpose(0, 1), value.contiguous()

    size = (num_queries + 2 * num_groups) * head_dim
    without_values = size - num_groups * head_dim
    return Case(
        step,
        oracle,
        ((TOKENS, size), *[(head_dim,)] * (2 * has_norm)),
        2 * (without_values if has_norm else size) + 2 * head_dim,
        2 * size + has_norm * without_values + 2 * head_dim,
        {} if has_norm else {"Liger": liger},
    )


def gate_case(kind: str, ffn_size: int, has_scale: bool = False) -> Case:
    num_tokens = 4 * TOKENS if has_scale else TOKENS

    def oracle(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        output = reference.gated_activation(gate_up, kind)
        return output if scale is None else output * scale[:, None]

    def megatron(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        from megatron.core.fusions import fused_bias_swiglu as fused

        if scale is None:
            output: Tensor = fused.bias_swiglu_impl(gate_up, None)
            return output
        output = fused.weighted_bias_swiglu_impl(gate_up, None, scale[:, None])
        return output

    def liger(gate_up: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

        # Two tensors, as its layers have them.
        gate, up = (part.contiguous() for part in gate_up.chunk(2, dim=-1))
        output: Tensor = (liger_swiglu if kind == "silu" else liger_geglu)(gate, up)
        return output

    peers: dict[str, Step] = {} if has_scale else {"Liger": liger}
    if kind == "silu":
        peers["Megatron fused"] = megatron
    return Case(
        lambda kernels: lambda gate_up, *scale: kernels.gated_activation(gate_up, kind, *scale),
        oracle,
        ((num_tokens, 2 * ffn_size), *[(num_tokens,)] * has_scale),
        3 * ffn_size,
        5 * ffn_size,
        peers,
        num_tokens,
    )


CASES: dict[str, Callable[[], Case]] = {
    "norm 2048": lambda: norm_case(2048),
    "norm 4096": lambda: norm_case(4096),
    "norm 5376": lambda: norm_case(5376),
    "norm 8192": lambda: norm_case(8192),
    "rotary 32/8x128": lambda: rotary_case(8, 4, 128, False),
    "rotary 32/8x64": lambda: rotary_case(8, 4, 64, False),
    "rotary 4/1x128": lambda: rotary_case(1, 4, 128, False),
    "QK norm 32/8x128": lambda: rotary_case(8, 4, 128, True),
    "QK norm 32/16x128": lambda: rotary_case(16, 2, 128, True),
    "SwiGLU 8192": lambda: gate_case("silu", 8192),
    "SwiGLU 14336": lambda: gate_case("silu", 14336),
    "GeGLU 21504": lambda: gate_case("gelu_tanh", 21504),
    "experts' SwiGLU 768": lambda: gate_case("silu", 768, has_scale=True),
}
OURS = "Triton" if ON_GPU else "torch"
PEERS = ["eager", "torch.compile", "Megatron fused", "Liger"]


def load_ours() -> Any:
    if not ON_GPU:
        return block_torch
    from sft_fast.kernels import block_triton

    return block_triton


@functools.cache
def copy_ceiling() -> float:
    return copy_bytes_per_s()


def contender(name: str, case: Case) -> Step:
    plain = case.step(block_torch)
    if name == OURS:
        return case.step(load_ours())
    if name in case.peers:
        return case.peers[name]
    if name == "eager":
        return plain
    if name == "torch.compile":
        return torch.compile(plain)  # type: ignore[no-any-return]
    pytest.skip(f"{name} has no such operation")


def make_inputs(case: Case, num_tokens: int) -> list[Tensor]:
    """Arguments with a gradient; weights with a main_grad."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = []
    for number, shape in enumerate(case.shapes):
        if shape[0] == case.num_tokens:
            shape = (num_tokens, *shape[1:])
        tensor: Any = torch.randn(shape, generator=generator, device=DEVICE)
        # An expert's weight is in fp32.
        is_scale = number > 0 and shape == (num_tokens,)
        tensor = torch.nn.Parameter(tensor if is_scale else tensor.to(DTYPE))
        if shape[0] != num_tokens:
            tensor.main_grad = torch.zeros_like(tensor, dtype=torch.float32)
            tensor.grad_added_to_main_grad = False
        inputs.append(tensor)
    return inputs


def check(step: Step, case: Case) -> None:
    """Results and gradients of a few tokens against the oracle in fp64."""
    inputs = make_inputs(case, 48)
    found = outputs_and_gradients(step, inputs, DTYPE)
    truth = outputs_and_gradients(case.oracle, [each.double() for each in inputs], DTYPE)
    tolerance = 1e-2 if DTYPE.itemsize == 2 else 1e-5
    for result, expected in zip(found, truth, strict=True):
        assert (result - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", [OURS, *(PEERS if ON_GPU else [])])
@pytest.mark.parametrize("case_name", CASES)
def test_block_kernel(benchmark: BenchmarkFixture, case_name: str, name: str) -> None:
    with torch.device(DEVICE):
        case = CASES[case_name]()
        step = contender(name, case)
        timed = graph_median_s if ON_GPU else median_s
        try:
            check(step, case)
            inputs = make_inputs(case, case.num_tokens)
            # An autograd graph that lives on would tie its leaves to this stream.
            with torch.no_grad():
                outputs = step(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            upstream = [torch.randn_like(output) for output in outputs]

            def both() -> None:
                torch.autograd.grad(step(*inputs), inputs, upstream, allow_unused=True)

            with torch.no_grad():
                forward_s = timed(lambda: step(*inputs))
            both_s, launched_s = timed(both), median_s(both)
        except (ImportError, AttributeError, RuntimeError, TypeError) as error:
            if name == OURS:
                raise
            pytest.skip(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    benchmark.pedantic(both, rounds=1)
    benchmark.extra_info.update(
        case=case_name,
        contender=name,
        tokens=case.num_tokens,
        forward_ms=1e3 * forward_s,
        backward_ms=1e3 * (both_s - forward_s),
        launched_ms=1e3 * launched_s,
    )
    if ON_GPU:
        element_s = case.num_tokens * DTYPE.itemsize / copy_ceiling()
        forward_limit, backward_limit = (
            element_s * numbers for numbers in (case.forward_numbers, case.backward_numbers)
        )
        benchmark.extra_info.update(
            limit_ms=1e3 * (forward_limit + backward_limit),
            forward_fraction_of_limit=forward_limit / forward_s,
            backward_fraction_of_limit=backward_limit / (both_s - forward_s),
            fraction_of_limit=(forward_limit + backward_limit) / both_s,
        )
