"""The native kernels: one pass over whole rows, what the wrapper refuses, and both compilers.

tests/kernels/test_masked_cross_entropy.py compares their two-pass results with the oracle.
"""

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import emulated_gpu
from closeness import assert_bit_zero, assert_no_worse
from kernel_pool import ON_GPU, missing_native, seeded
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from sft_fast.loss import HeadSettings, LossOptions, masked_linear_cross_entropy
from sft_fast.reference import cross_entropy as reference

NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
CLANG = shutil.which("clang++-19")
SOURCE = emulated_gpu.SOURCES / "masked_ce/masked_ce.cu"

NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def pool(kernel_rank: RankPool) -> RankPool:
    """Ranks that have the native kernels."""
    if missing_native() is not None:
        pytest.skip(f"native kernels need {missing_native()}")
    return kernel_rank


def run_one_pass(width: int, dtype: torch.dtype, options: LossOptions) -> None:
    """Loss and gradient in place; masked rows are not read, padding columns get 0."""
    from sft_fast.kernels import masked_cross_entropy_native as native

    vocab_size = width - 5
    generator = seeded(width)
    logits = (3 * torch.randn(4, width, generator=generator)).to(dtype)
    labels = torch.tensor([vocab_size - 1, IGNORE_INDEX, 0, 17])
    weights = torch.tensor([0.5, 1.0, -2.0, 1.5])
    logits[1], logits[:, vocab_size:] = torch.nan, torch.inf
    rates = options.model_dump()
    results = []
    for computed_in in (torch.float32, torch.float64):
        inputs = logits.to(computed_in).requires_grad_()
        loss = reference.penalised_cross_entropy(inputs, labels, vocab_size, **rates)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs, weights.to(computed_in))))
    (eager, eager_grad), (truth, true_grad) = results
    assert native.fits_one_pass(logits, labels)
    columns = VocabColumns(0, vocab_size, vocab_size)
    loss = native.loss_and_gradient(logits, labels, weights, columns, options)
    assert_no_worse(loss, eager, truth)
    assert_no_worse(logits, eager_grad.to(dtype), true_grad)
    assert loss[1] == 0
    assert_bit_zero(logits[1])
    assert_bit_zero(logits[:, vocab_size:])


# Emulated, 1024 threads x 4 packs of 16 bytes lie in registers, and what is beyond in shared
# memory: 32768 logits of 16 bits, 16384 of 32 bits. Hopper holds 40960 and 20480 in registers.
@pytest.mark.parametrize(
    ("width", "dtype", "options"),
    [
        (64, torch.float16, LossOptions()),
        (8200, torch.bfloat16, LossOptions(label_smoothing=0.1, z_loss=1e-3)),
        (16384, torch.float32, LossOptions(logit_softcap=5.0)),
        (18000, torch.float32, LossOptions(z_loss=1e-2)),
        (40000, torch.bfloat16, LossOptions()),
        pytest.param(128256, torch.bfloat16, LossOptions(), marks=NEEDS_GPU),
        pytest.param(64000, torch.float32, LossOptions(label_smoothing=0.2), marks=NEEDS_GPU),
    ],
    ids=lambda value: str(value) if isinstance(value, int | torch.dtype) else "",
)
def test_one_pass_no_worse_than_eager(
    pool: RankPool, width: int, dtype: torch.dtype, options: LossOptions
) -> None:
    pool.run(1, run_one_pass, width, dtype, options)


def run_one_pass_infinities() -> None:
    from sft_fast.kernels import masked_cross_entropy_native as native

    logits = torch.zeros(6, 64)
    logits[0, :60] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 4] = torch.nan
    logits[4] += 1e4
    labels = torch.tensor([62, 3, 7, 7, 7, 64])
    columns = VocabColumns(0, 64, 64)
    loss = native.loss_and_gradient(logits, labels, torch.ones(6), columns, LossOptions())
    assert loss.isnan().tolist() == [False, True, True, True, False, True]
    torch.testing.assert_close(loss[[0, 4]], torch.tensor([4.0, 64.0]).log())
    assert logits[[0, 4]].isfinite().all() and not logits[0, :60].any()


def test_one_pass_infinities_and_unknown_labels(pool: RankPool) -> None:
    pool.run(1, run_one_pass_infinities)


def run_policy() -> None:
    """gradient_in_forward takes the one-pass kernel where it can, and the result is the same."""
    from sft_fast.kernels import masked_cross_entropy_native as native

    generator = seeded(1)
    hidden = torch.randn(30, 1, 8, generator=generator, requires_grad=True)
    labels = torch.randint(48, (1, 30), generator=generator)
    labels[0, ::3] = IGNORE_INDEX
    # 50 columns are 200 bytes, not a multiple of 16: rows are not aligned.
    for vocab_size, expected_calls in ((48, 1), (50, 0)):
        weight = torch.randn(vocab_size, 8, generator=generator, requires_grad=True)
        results: list[tuple[Tensor, ...]] = []
        for policy in ("stored", "gradient_in_forward"):
            with mock.patch.object(
                native, "loss_and_gradient", wraps=native.loss_and_gradient
            ) as one_pass:
                loss = masked_linear_cross_entropy(
                    hidden,
                    weight,
                    labels,
                    HeadSettings(backend="native", summed=True, policy=policy),
                )
            results.append((loss, *torch.autograd.grad(0.7 * loss.sum(), (hidden, weight))))
        assert one_pass.call_count == expected_calls
        for stored, early in zip(*results, strict=True):
            torch.testing.assert_close(early, stored, rtol=1e-5, atol=1e-6)


def test_gradient_in_forward_reads_once(pool: RankPool) -> None:
    pool.run(1, run_policy)


def run_refusals() -> None:
    from sft_fast import _gpu
    from sft_fast.kernels import masked_cross_entropy_native as native

    device = torch.get_default_device().type
    logits, labels = torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64)
    columns, options = VocabColumns(0, 64, 64), LossOptions()
    rest = (columns, options, False)
    empty = torch.empty(1, 3, 4)
    for bad, message in (
        ((logits.double(), labels), "logits are torch.float64, expected bfloat16"),
        ((logits.t(), labels.new_zeros(64)), r"logits .* strides \(1, 64\).*last stride 1"),
        ((logits, labels.int()), "labels is torch.int32"),
        ((logits, labels[:3]), r"labels is torch.int64 \[3\]"),
        ((logits.to("meta"), labels.to("meta")), f"on meta, but the module was built for {device}"),
    ):
        with pytest.raises(ValueError, match=message):
            native.launch_statistics(empty, *bad, *rest)
    statistics = native.shard_statistics(logits, labels, *rest)
    grads = torch.zeros(2, 4)
    rest = statistics, grads, columns, options
    with pytest.raises(ValueError, match="gradient is torch.bfloat16"):
        native.write_gradient(logits.bfloat16(), logits, labels, *rest)
    rest = statistics, grads[0], columns, options
    with pytest.raises(ValueError, match=r"grads is torch.float32 \[4\]"):
        native.write_gradient(logits, logits.clone(), labels, *rest)
    with pytest.raises(ValueError, match="2 options of the loss; expected label_smoothing z_loss"):
        _gpu.statistics(
            native.describe(logits, labels, columns),
            [0.0, 0.0],
            out=empty.data_ptr(),
            with_outputs=False,
            stream=0,
        )
    arguments = {"data": 0, "num_tokens": 1, "width": 8, "row_stride": 8, "labels": 0}
    arguments |= {"vocab_start_index": 0, "vocab_size": 8, "ignore_index": -100}
    with pytest.raises(ValueError, match="dtype is 7; expected 0, 1 or 2"):
        _gpu.Logits(dtype=7, num_columns=8, **arguments)
    with pytest.raises(ValueError, match="1 x 8 with 9 columns"):
        _gpu.Logits(dtype=0, num_columns=9, **arguments)
    long = torch.zeros(1, 1 << 20)
    assert not native.fits_one_pass(long, labels[:1])
    with pytest.raises(ValueError, match="1048576 logits does not fit on chip"):
        columns = VocabColumns(0, 1 << 20, 1 << 20)
        native.loss_and_gradient(long, labels[:1], torch.ones(1), columns, options)


def run_stale_module() -> None:
    from sft_fast import _gpu
    from sft_fast.kernels import masked_cross_entropy_native as native

    stale = mock.patch.object(_gpu, "LOSS_OPTIONS", ("label_smoothing",))
    with (
        stale,
        pytest.raises(ImportError, match=r"\(label_smoothing\), expected .* build it again"),
    ):
        importlib.reload(native)


def test_module_of_other_options_is_not_used(pool: RankPool) -> None:
    pool.run(1, run_stale_module)


def test_wrapper_refuses_what_the_kernels_cannot_take(pool: RankPool) -> None:
    pool.run(1, run_refusals)


@pytest.mark.skipif(CLANG is None, reason="needs clang++-19")
@pytest.mark.parametrize("arch", ["gfx942", pytest.param("gfx90a", marks=pytest.mark.slow)])
def test_compiles_for_cdna(arch: str, tmp_path: Path) -> None:
    assembly_file = tmp_path / "masked_ce.s"
    command = [CLANG, "-x", "hip", f"--offload-arch={arch}", "--cuda-device-only", "-nogpuinc"]
    command += ["-nogpulib", "-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", "-S", SOURCE]
    command += [f"-I{emulated_gpu.SOURCES}", "-DSFT_FAST_NO_HIP_HEADERS", "-o", assembly_file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.split(r"(?=\n  - \.agpr_count)", assembly_file.read_text())[1:]
    assert len(kernels) == 25
    for kernel in kernels:
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", kernel)}
        name = re.search(r"\.name:\s+(\S+)", kernel).group(1)  # type: ignore[union-attr]
        print(f"{arch} {numbers['vgpr_count']:4} VGPRs {numbers['sgpr_count']:4} SGPRs {name}")
        assert numbers["vgpr_spill_count"] == numbers["sgpr_spill_count"] == 0, name
        assert numbers["private_segment_fixed_size"] == 0, name
        # A workgroup of 1024 threads is 4 waves on each SIMD, of 512 registers in all.
        assert numbers["vgpr_count"] <= 128 and numbers["group_segment_fixed_size"] <= 1024, name
    code = assembly_file.read_text()
    assert re.search(r"(global|flat)_load_dwordx4", code)
    assert re.search(r"(global|flat)_store_dwordx4", code)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_compiles_and_links_for_hopper(tmp_path: Path) -> None:
    library = tmp_path / "libmasked_ce.so"
    command = [NVCC, "-x", "cu", "-std=c++20", "-O3", "-arch=sm_90", "-Xptxas", "-v", SOURCE]
    command += [f"-I{emulated_gpu.SOURCES}", "-Xcompiler", "-fPIC", "-shared", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stderr
    print(re.sub(r"ptxas info    : ", "", report))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 25 and set(spills) == {("0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= 64
    assert library.stat().st_size > 0
