"""The choice of a layer's kernels, and its self-test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernel_pool import ON_GPU
from rank_pool import RankPool
from sft_fast.kernels import block_backends as backends
from sft_fast.kernels import block_torch

SIZES = backends.BlockSizes(
    hidden_size=48,
    num_groups=2,
    queries_per_group=3,
    head_dim=16,
    rotated_channels=8,
    has_qk_norm=True,
    ffn_size=40,
    activation="gelu_tanh",
    has_scale=True,
    is_zero_centered=True,
    eps=1e-6,
)
CPU = torch.device("cpu")


def test_cpu_takes_torch() -> None:
    choice = backends.choose_block_kernels("auto", CPU, torch.float32, SIZES)
    assert str(choice) == "torch" and choice.kernels is block_torch


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'cuda', expected one of auto, triton, torch"):
        backends.choose_block_kernels("cuda", CPU, torch.float32, SIZES)


@pytest.mark.skipif(ON_GPU, reason="there is a compiler for the device")
def test_named_backend_that_cannot_run() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="on the CPU; choose 'torch' or 'auto'"):
        backends.choose_block_kernels("triton", CPU, torch.float32, SIZES)


def run_choice() -> None:
    device = torch.get_default_device()
    plain = replace(SIZES, rotated_channels=0, has_qk_norm=False, has_scale=False)
    with mock.patch.object(backends, "NUM_TEST_TOKENS", 37 if ON_GPU else 3):
        for sizes, dtype in ((SIZES, torch.float32), (plain, torch.float16)):
            choice = backends.choose_block_kernels("triton", device, dtype, sizes)
            assert str(choice) == "triton"


def test_triton_passes_the_self_test(kernel_rank: RankPool) -> None:
    pytest.importorskip("triton")
    kernel_rank.run(1, run_choice)


def worse(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a gradient of its first result that is wrong by a tenth."""

    def wrong(*args: Any) -> Any:
        results = function(*args)
        first = results if isinstance(results, Tensor) else results[0]
        first = first + 0.1 * (first - first.detach())
        return first if isinstance(results, Tensor) else (first, *results[1:])

    return wrong


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("rms_norm", "norm"),
        ("add_rms_norm", "sum and norm"),
        ("rms_norm_add", "norm and sum"),
        ("rotate_qkv", "rotation"),
        ("gated_activation", "gated activation"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_gradient_is_found(name: str, what: str, dtype: torch.dtype) -> None:
    right = getattr(block_torch, name)
    broken = mock.Mock(wraps=block_torch, **{name: worse(right)})
    with pytest.raises(ValueError, match=f"its {what} is off by"):
        backends.check_block_kernels(broken, CPU, dtype, SIZES)


def test_auto_tells_why_it_falls_back() -> None:
    arguments = "auto", torch.device("meta"), torch.bfloat16, SIZES
    with mock.patch.dict(backends.BACKENDS, triton="sft_fast.kernels.block_absent"):
        choice = backends.choose_block_kernels(*arguments)
    assert str(choice) == "torch (not triton: No module named 'sft_fast.kernels.block_absent')"
    pytest.importorskip("triton")
    with mock.patch.object(backends, "check_block_kernels", side_effect=ValueError("its norm")):
        choice = backends.choose_block_kernels(*arguments)
    assert str(choice) == "torch (not triton: its norm)"
