"""Which kernels compute a transformer layer besides its products and its attention.

At start the first of the chain is chosen that computes what plain PyTorch computes, forward and
backward, at the sizes of the run's own layers; why others are not is told.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from sft_fast.errors import first_line
from sft_fast.kernels import block_torch
from sft_fast.kernels.backends import OPERATIONS

BACKENDS = OPERATIONS["block"].modules
NUM_TEST_TOKENS = 37


class BlockKernels(Protocol):
    """A module of kernels/; block_torch.py says what the functions do."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool, /) -> Tensor:
        """The norm of x, [..., h]."""

    def write_rms_norm(
        self, out: Tensor, x: Tensor, weight: Tensor, eps: float, is_zero_centered: bool, /
    ) -> None:
        """Writes the norm of x into out, [..., h]; no gradient."""

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        is_zero_centered: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), each [..., h]; None is a residual of zeros."""

    def rms_norm_add(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, is_zero_centered: bool, /
    ) -> Tensor:
        """residual + norm of x, [..., h]."""

    def rotate_qkv(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        num_groups: int,
        head_dim: int,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        is_zero_centered: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [..., heads, head_dim], normed and rotated."""

    def gated_activation(
        self, gate_up: Tensor, kind: str, scale: Tensor | None, may_overwrite: bool, /
    ) -> Tensor:
        """The activation [..., f] of gate and partner [..., 2 f]."""

    def write_gated_activation(
        self, out: Tensor, gate_up: Tensor, kind: str, scale: Tensor | None, /
    ) -> None:
        """Writes the activation of gate and partner [..., 2 f] into out [..., f]; no gradient."""


@dataclass(frozen=True)
class BlockSizes:
    """What a rank's kernels work on."""

    hidden_size: int
    num_groups: int
    """of queries that share a key and a value"""
    queries_per_group: int
    head_dim: int
    rotated_channels: int
    has_qk_norm: bool
    ffn_size: int
    """columns of the gate"""
    activation: str
    has_scale: bool
    """rows of the gate have a factor each, as experts' rows do"""
    is_zero_centered: bool
    eps: float


@dataclass(frozen=True)
class BlockChoice:
    """The kernels of a run, and why the ones before them are not."""

    name: str
    kernels: BlockKernels
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(self.passed_over)
        return f"{self.name} ({reasons})" if reasons else self.name


def choose_block_kernels(
    name: str, device: torch.device, dtype: torch.dtype, sizes: BlockSizes
) -> BlockChoice:
    """Returns the backend `name`, or with `auto` the first that passes the self-test.

    Raises:
        ValueError: the named backend is missing, cannot do it or computes something else.
    """
    if name not in ("auto", *BACKENDS):
        expected = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"model.kernels: got {name!r}, expected one of {expected}")
    candidates = [name]
    if name == "auto":
        candidates = ["torch"] if device.type == "cpu" else list(BACKENDS)
    passed_over: list[str] = []
    for candidate in candidates:
        kernels, problem = load_and_check(candidate, device, dtype, sizes)
        if kernels is not None:
            return BlockChoice(candidate, kernels, tuple(passed_over))
        passed_over.append(f"not {candidate}: {problem}")
    raise ValueError(f"model.kernels: {'; '.join(passed_over)}; choose 'torch' or 'auto'")


def load_and_check(
    name: str, device: torch.device, dtype: torch.dtype, sizes: BlockSizes
) -> tuple[BlockKernels | None, str]:
    """The kernels, or the first line of what speaks against them."""
    try:
        module: Any = importlib.import_module(BACKENDS[name])
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return None, first_line(error)
    kernels = cast(BlockKernels, module)
    if name == "torch":
        return kernels, ""
    try:
        check_block_kernels(kernels, device, dtype, sizes)
    except (RuntimeError, ValueError, TypeError, AssertionError, *module.ERRORS) as error:
        return None, first_line(error)
    return kernels, ""


class SelfTest(NamedTuple):
    """A step that is compared with PyTorch's before it is used."""

    what: str
    step: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: list[tuple[int, ...]]
    """of the arguments, all of which have a gradient"""


def self_tests(kernels: BlockKernels, sizes: BlockSizes, table: Tensor | None) -> list[SelfTest]:
    """What a layer does; table: [NUM_TEST_TOKENS, rotated channels]."""
    norm_options = sizes.eps, sizes.is_zero_centered
    dims = sizes.num_groups, sizes.head_dim

    def rotate(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q_weight, k_weight = weights or (None, None)
        return kernels.rotate_qkv(qkv, table, *dims, q_weight, k_weight, *norm_options)

    def activate(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        return kernels.gated_activation(gate_up, sizes.activation, scale, False)

    rows, weight = (NUM_TEST_TOKENS, sizes.hidden_size), (sizes.hidden_size,)
    qkv_size = sizes.num_groups * (sizes.queries_per_group + 2) * sizes.head_dim
    qkv = [(NUM_TEST_TOKENS, qkv_size), *[(sizes.head_dim,)] * (2 * sizes.has_qk_norm)]
    gates = [(NUM_TEST_TOKENS, 2 * sizes.ffn_size), *[(NUM_TEST_TOKENS,)] * sizes.has_scale]
    added = [rows, rows, weight]
    return [
        SelfTest("norm", lambda x, w: kernels.rms_norm(x, w, *norm_options), [rows, weight]),
        SelfTest(
            "sum and norm", lambda x, r, w: kernels.add_rms_norm(x, r, w, *norm_options), added
        ),
        SelfTest(
            "norm beside x", lambda x, w: kernels.add_rms_norm(x, None, w, *norm_options), added[1:]
        ),
        SelfTest(
            "norm and sum", lambda x, r, w: kernels.rms_norm_add(x, r, w, *norm_options), added
        ),
        SelfTest("rotation", rotate, qkv),
        SelfTest("gated activation", activate, gates),
    ]


def check_block_kernels(
    kernels: BlockKernels, device: torch.device, dtype: torch.dtype, sizes: BlockSizes
) -> None:
    """Compares results and gradients with plain PyTorch.

    The error against fp32 may be twice that of plain PyTorch in the same dtype.

    Raises:
        ValueError: the error is larger.
    """
    plain = cast(BlockKernels, block_torch)
    # On the CPU, whatever the default device: the same numbers everywhere.
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    channels = sizes.rotated_channels
    table = random(NUM_TEST_TOKENS, channels) if channels else None
    tests = (self_tests(each, sizes, table) for each in (kernels, plain))
    for test, plain_test in zip(*tests, strict=True):
        inputs = [random(*shape).to(dtype) for shape in test.shapes]
        found = results_and_gradients(test, inputs, dtype)
        same_dtype = results_and_gradients(plain_test, inputs, dtype)
        truth = results_and_gradients(plain_test, [each.float() for each in inputs], dtype)
        for got, rounded, expected in zip(found, same_dtype, truth, strict=True):
            scale = float(expected.abs().max())
            limit = 2 * float((rounded.float() - expected).abs().max()) + 1e-5 * scale
            error = float((got.float() - expected).abs().max())
            if not error <= limit:  # also true for NaN
                raise ValueError(f"its {test.what} is off by {error:.2g}, more than {limit:.2g}")


def results_and_gradients(test: SelfTest, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The results of a step and the gradients of its inputs, any shapes."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    results = test.step(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    generator = torch.Generator("cpu").manual_seed(1)
    upstream = [
        torch.randn(result.shape, generator=generator, device="cpu").to(dtype).to(result)
        for result in results
    ]
    gradients = torch.autograd.grad(results, leaves, upstream)
    return [*(result.detach() for result in results), *gradients]
