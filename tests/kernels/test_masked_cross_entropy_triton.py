"""The Triton kernels: splits and launches, and what compilers make of them for absent GPUs.

tests/kernels/test_masked_cross_entropy.py compares their results with the oracle.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from closeness import assert_bit_zero, assert_no_worse
from kernel_pool import seeded
from offline_compiler import (
    TARGETS,
    compile_for,
    loads_16_bytes,
    stores_16_bytes,
    usage_without_spills,
)
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from sft_fast.loss import (
    HeadSettings,
    LossOptions,
    masked_cross_entropy,
    masked_linear_cross_entropy,
)
from sft_fast.reference import cross_entropy as reference

triton = pytest.importorskip("triton")


def run_every_split() -> None:
    """The same row cut into 1, 2 and 3 splits gives one loss and one gradient."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    generator = seeded(2)
    logits, upstream = torch.randn(2, 20000, generator=generator), torch.tensor([0.3, -2.0])
    labels = torch.tensor([15000, 19999])
    config = kernels.LaunchConfig.for_shape(2, 20000, 32)
    assert config.num_splits == 3
    results = []
    for num_splits in (1, 2, 3):
        split = kernels.LaunchConfig(config.block_columns, num_splits, config.num_warps)
        with mock.patch.object(kernels, "launch_config", return_value=split):
            inputs = logits.clone().requires_grad_()
            loss = masked_cross_entropy(inputs, labels, backend="triton")
            results.append((loss, *torch.autograd.grad(loss, inputs, upstream)))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-6, atol=1e-9)


def test_splits_do_not_change_the_result(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_every_split)


def run_masked_rows() -> None:
    """The statistics of a masked row stay as torch.empty left them."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    labels = torch.tensor([3, IGNORE_INDEX, 0])
    columns = VocabColumns(0, 50, 50)
    statistics = kernels.shard_statistics(torch.zeros(3, 50), labels, columns, LossOptions(), False)
    assert statistics.isnan().all(1)[0].tolist() == [False, True, False]
    torch.testing.assert_close(statistics[0, :, 0], torch.tensor([0.0, 50.0, 0.0]))


def test_masked_rows_are_skipped(kernel_rank: RankPool) -> None:
    kernel_rank.run(1, run_masked_rows)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("width", [1, 100, 4008, 16032, 128256, 262144])
@pytest.mark.parametrize("num_tokens", [0, 1, 100, 5734, 1 << 20])
def test_launch_fits_every_gpu(num_tokens: int, width: int, warp_size: int) -> None:
    from sft_fast.kernels.masked_cross_entropy_triton import LaunchConfig

    config = LaunchConfig.for_shape(num_tokens, width, warp_size)
    assert 1 <= config.num_warps * warp_size <= 1024
    assert config.block_columns <= 8192 and 1 <= config.num_splits <= 16
    assert (config.num_splits - 1) * config.block_columns < width, "a split has no column"
    assert config == LaunchConfig(
        **{**LaunchConfig.for_shape(num_tokens, width, 32).__dict__, "num_warps": config.num_warps}
    ), "ranks with other GPUs would exchange statistics of another shape"


BUDGETS = {"vgprs": 128, "registers": 64, "lds_bytes": 1024}
"""What a kernel may use: 128 VGPRs let 4 waves share a SIMD, 64 registers let a Hopper SM hold 1024
threads; shared memory is for reductions only."""

SHAPES = {"long": 128256, "shard": 16032, "short": 1000}
VARIANTS = {
    "plain": {"HAS_SOFTCAP": False, "WITH_LOGIT_SUM": False, "WITH_OUTPUTS": False},
    "full": {"HAS_SOFTCAP": True, "WITH_LOGIT_SUM": True, "WITH_OUTPUTS": True},
}
SHIPPED = [
    pytest.param(
        *(name, dtype, shape, variant),
        marks=() if shape == "shard" and (variant, dtype) != ("full", "fp16") else pytest.mark.slow,
        id=f"{name}-{dtype}-{shape}-{variant}",
    )
    for name in ("fwd", "bwd")
    for dtype in ("bf16", "fp16", "fp32")
    for shape in SHAPES
    for variant in VARIANTS
    if dtype != "fp16" or variant == "plain"
]


def compile_kernel(
    name: str, target: tuple[str, str | int, int], dtype: str, shape: str, variant: str
) -> Any:
    """Compiles as a launch on 16-byte aligned logits would."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    config = kernels.LaunchConfig.for_shape(5734, SHAPES[shape], target[2])
    kernel = getattr(kernels, f"masked_cross_entropy_{name}_kernel")
    num_statistics = 6 if variant == "full" else 3
    constants = {"BLOCK_COLUMNS": config.block_columns, "BLOCK_PARTS": 8, **VARIANTS[variant]}
    constants["NUM_STATISTICS"] = num_statistics
    constants["GROUP_COLUMNS"] = 4 if dtype == "fp32" else 8
    types = {"labels_ptr": "*i64", "logits_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}"}
    types |= {"statistics_ptr": "*fp32", "grads_ptr": "*fp32"}
    types |= dict.fromkeys(("smoothing", "uniform", "z_loss", "softcap"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    divisible = ("_ptr", "_stride", "width") if SHAPES[shape] % 16 == 0 else ("_ptr", "_stride")
    return compile_for(kernel, target, types, constants, divisible, config.num_warps)


@pytest.mark.parametrize(("name", "dtype", "shape", "variant"), SHIPPED)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.usefixtures("compiler")
def test_compiles_for_cdna(
    arch: str, name: str, dtype: str, shape: str, variant: str, tmp_path: Path
) -> None:
    compiled = compile_kernel(name, TARGETS[arch], dtype, shape, variant)
    registers, shared_bytes, residence = usage_without_spills(compiled, tmp_path)
    assert shared_bytes <= BUDGETS["lds_bytes"] and registers <= BUDGETS["vgprs"]
    print_row(arch, name, dtype, shape, variant, registers, shared_bytes, residence)
    if SHAPES[shape] % 16 == 0:
        assert loads_16_bytes(compiled) and (name == "fwd" or stores_16_bytes(compiled))


@pytest.mark.parametrize(("name", "dtype", "shape", "variant"), SHIPPED)
@pytest.mark.usefixtures("compiler")
def test_compiles_for_hopper(
    name: str, dtype: str, shape: str, variant: str, tmp_path: Path
) -> None:
    compiled = compile_kernel(name, TARGETS["sm_90"], dtype, shape, variant)
    assembly = compiled.asm["ptx"]
    assert (name, dtype) != ("bwd", "bf16") or "cvt.rn.bf16" in assembly, "not rounded"
    if SHAPES[shape] % 16 == 0:
        assert loads_16_bytes(compiled) and (name == "fwd" or stores_16_bytes(compiled))
    registers, shared_bytes, residence = usage_without_spills(compiled, tmp_path)
    threads = 32 * compiled.metadata.num_warps
    assert shared_bytes <= BUDGETS["lds_bytes"]
    # Short rows have few threads, which may have more registers each.
    assert registers * threads <= 65536 and (threads < 512 or registers <= 2 * BUDGETS["registers"])
    print_row("sm_90", name, dtype, shape, variant, registers, shared_bytes, residence)


JOINS = [
    pytest.param(num_parts, variant, marks=() if num_parts == 8 else pytest.mark.slow)
    for num_parts in (1, 8, 128)
    for variant in VARIANTS
]


def compile_join(target: tuple[str, str | int, int], num_parts: int, variant: str) -> Any:
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    flags = {name: VARIANTS[variant][name] for name in ("WITH_LOGIT_SUM", "WITH_OUTPUTS")}
    block_tokens = kernels.tokens_per_join(num_parts)
    constants = {**flags, "BLOCK_PARTS": num_parts, "BLOCK_TOKENS": block_tokens}
    types = {"statistics_ptr": "*fp32", "labels_ptr": "*i64", "outputs_ptr": "*fp32"}
    types |= {"smoothing": "fp32", "z_loss": "fp32"} | dict.fromkeys(constants, "constexpr")
    kernel = kernels.masked_cross_entropy_loss_kernel
    return compile_for(kernel, target, types, constants, ("_ptr",), kernels.JOIN_WARPS)


@pytest.mark.parametrize(("num_parts", "variant"), JOINS)
@pytest.mark.usefixtures("compiler")
def test_join_compiles(num_parts: int, variant: str, tmp_path: Path) -> None:
    """The kernel that turns statistics into losses: no spills on any target."""
    for arch, target in TARGETS.items():
        compiled = compile_join(target, num_parts, variant)
        registers, *_ = usage_without_spills(compiled, tmp_path)
        assert registers <= 2 * BUDGETS["registers"]
        print_row(arch, "join", "fp32", num_parts, variant, registers, "", "")


@pytest.mark.parametrize("name", ["fwd", "bwd", "loss"])
@pytest.mark.usefixtures("compiler")
def test_compiles_where_every_number_is_one(name: str) -> None:
    """Triton makes an integer argument of 1 a Python number: one row, one part, one column."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    kernel = getattr(kernels, f"masked_cross_entropy_{name}_kernel")
    types = {"labels_ptr": "*i64"} | dict.fromkeys(("smoothing", "z_loss"), "fp32")
    types |= dict.fromkeys(("logits_ptr", "gradient_ptr"), "*bf16")
    types |= dict.fromkeys(("statistics_ptr", "grads_ptr", "outputs_ptr"), "*fp32")
    types |= dict.fromkeys(("uniform", "softcap"), "fp32")
    constants: dict[str, Any] = {"BLOCK_COLUMNS": 256, "GROUP_COLUMNS": 8, "NUM_STATISTICS": 6}
    constants |= {"BLOCK_PARTS": 1, "BLOCK_TOKENS": 128, **VARIANTS["full"]}
    numbers = [a for a in kernel.arg_names if not a.endswith("_ptr") and a not in types]
    constants |= {argument: 1 for argument in numbers if argument not in constants}
    types |= dict.fromkeys(constants, "constexpr")
    compile_for(kernel, TARGETS["sm_90"], types, constants, (), 1)


def print_row(*cells: object) -> None:
    """One line of the occupancy table; pytest -rP or -s shows it."""
    widths = (7, 4, 5, 6, 6, 5, 6, 12)
    print(" ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)))


@pytest.mark.usefixtures("compiler")
def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="on the CPU; choose 'torch' or 'auto'"):
        masked_cross_entropy(torch.zeros(1, 4), torch.tensor([1]), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_is_no_worse_than_eager_and_never_waits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(512, 1, 256, generator=generator).to("cuda", dtype).requires_grad_()
    weight = torch.randn(32003, 256, generator=generator).to("cuda", dtype).requires_grad_()
    labels = torch.randint(32000, (1, 512), generator=generator)
    labels[:, :300] = IGNORE_INDEX
    active_tokens, labels = torch.arange(300, 512), labels.cuda()
    upstream = torch.rand(1, 512, generator=generator).cuda()
    weight.main_grad = torch.zeros(32003, 256, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = masked_linear_cross_entropy(
            hidden,
            weight,
            labels,
            HeadSettings(vocab_size=32000, backend="triton", accumulate_into_main_grad=True),
            active_tokens=active_tokens,
        )
        hidden.grad = None
        loss.backward(upstream)
        return loss.detach(), hidden.grad

    step()
    weight.main_grad.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, hidden_grad = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = reference.linear_cross_entropy(exact[0], exact[1], labels, 32000)
    eager_logits = (hidden.flatten(0, 1) @ weight.t())[:, :32000]
    eager = F.cross_entropy(
        eager_logits.float(), labels[0], reduction="none", ignore_index=IGNORE_INDEX
    ).view(1, 512)
    assert_no_worse(loss, eager, truth)
    true_grads = torch.autograd.grad(truth, exact, upstream.double())
    eager_grads = torch.autograd.grad(eager, (hidden, weight), upstream)
    for ours, plain, true_grad in zip(
        (hidden_grad, weight.main_grad), eager_grads, true_grads, strict=True
    ):
        assert_no_worse(ours, plain, true_grad)
    assert_bit_zero(hidden_grad[:300])
