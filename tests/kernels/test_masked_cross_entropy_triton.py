"""The Triton kernels: run by Triton's interpreter on a CPU, and compiled for GPUs that are absent.

The interpreter must be on before triton is imported, hence ranks of our own.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from closeness import assert_bit_zero, assert_no_worse
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.loss import masked_cross_entropy, masked_linear_cross_entropy
from sft_fast.reference import cross_entropy as reference

triton = pytest.importorskip("triton")


class InterpreterPool(RankPool):
    """Ranks in which Triton interprets, and in which torch.empty returns NaN."""

    def run(self, world_size: int, function: Callable[..., None], *args: Any) -> list[None]:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            return super().run(world_size, run_poisoned, function, args)


def run_poisoned(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Shows what a kernel forgets to write."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    function(*args)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[RankPool]:
    pool = InterpreterPool()
    yield pool
    pool.close()


def gradient(loss: Tensor, upstream: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, upstream.to(loss.dtype))


def make_logits(
    num_rows: int, width: int, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with NaN in the masked rows and Inf in the padding, labels, an upstream gradient."""
    generator = torch.Generator().manual_seed(num_rows + width)
    logits = (3 * torch.randn(num_rows, width, generator=generator)).to(dtype)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[-1] = vocab_size - 1
    labels[1::3] = IGNORE_INDEX
    logits[:, vocab_size:] = torch.inf
    logits[1::3] = torch.nan
    return logits, labels, torch.randn(num_rows, generator=generator)


def eager_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    active = (labels != IGNORE_INDEX).unsqueeze(1)
    logits = torch.where(active, logits, 0)[:, :vocab_size].float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)


def round_as_interpreter(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Triton's interpreter cuts bfloat16 off where GPUs round to nearest."""
    if dtype == torch.bfloat16:
        gradient = (gradient.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return gradient.to(dtype)


def run_logits(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits, labels, upstream = make_logits(num_rows, width, vocab_size, dtype)
    before = logits.clone()
    results = []
    for function, computed_in in (
        (functools.partial(masked_cross_entropy, backend="triton"), dtype),
        (eager_cross_entropy, torch.float32),
        (reference.cross_entropy, torch.float64),
    ):
        inputs = logits.to(computed_in).requires_grad_()
        loss = function(inputs, labels, vocab_size=vocab_size)
        results.append((loss.detach(), gradient(loss, upstream, inputs)[0]))
    (loss, grad), (eager, eager_grad), (truth, true_grad) = results
    assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8)), "logits were written to"
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_no_worse(loss, eager, truth)
    assert_no_worse(grad, round_as_interpreter(eager_grad, dtype), true_grad)
    assert_bit_zero(loss[1::3])
    assert_bit_zero(grad[1::3])
    assert not grad[:, vocab_size:].any()


SHAPES = [
    # rows, width, vocab_size, dtype; 20000 columns are 3 blocks, which few rows split
    (4, 1, 1, torch.float32),
    (7, 13, 13, torch.bfloat16),
    (7, 128, 100, torch.float32),
    (3, 8192, 8192, torch.bfloat16),
    (3, 8200, 8193, torch.float16),
    (5, 20000, 19999, torch.float32),
    (5, 20000, 9000, torch.bfloat16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-W{s[1]}-V{s[2]}-{s[3]}")
def test_logits_no_worse_than_eager(interpreter: RankPool, shape: tuple[Any, ...]) -> None:
    interpreter.run(1, run_logits, *shape)


def run_every_split() -> None:
    """The same row cut into 1, 2 and 3 splits gives one loss and one gradient."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    logits, labels, upstream = make_logits(2, 20000, 20000, torch.float32)
    labels[0] = 15000
    config = kernels.LaunchConfig.for_shape(2, 20000, 32)
    assert config.num_splits == 3
    results = []
    for num_splits in (1, 2, 3):
        split = kernels.LaunchConfig(config.block_columns, num_splits, config.num_warps)
        with mock.patch.object(kernels, "launch_config", return_value=split):
            inputs = logits.clone().requires_grad_()
            loss = masked_cross_entropy(inputs, labels, backend="triton")
            results.append((loss, gradient(loss, upstream, inputs)[0]))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-6, atol=1e-9)


def test_splits_do_not_change_the_result(interpreter: RankPool) -> None:
    interpreter.run(1, run_every_split)


def run_masked_rows() -> None:
    """The statistics of a masked row stay as torch.empty left them."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    labels = torch.tensor([3, IGNORE_INDEX, 0])
    statistics = kernels.shard_statistics(torch.zeros(3, 50), labels, 0, 50, 0.0, False, False)
    assert statistics.isnan().all(1)[0].tolist() == [False, True, False]
    torch.testing.assert_close(statistics[0, :, 0], torch.tensor([0.0, 50.0, 0.0]))


def test_masked_rows_are_skipped(interpreter: RankPool) -> None:
    interpreter.run(1, run_masked_rows)


def run_infinities() -> None:
    """-inf lanes, shards and rows, +inf, NaN, and offsets that overflow exp."""
    logits = torch.randn(8, 300)
    logits[0, :290] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 4] = torch.nan
    logits[4] += 1e4
    logits[5] -= 1e4
    logits[6, 5:] = -torch.inf
    labels = torch.tensor([295, 3, 7, 7, 7, 7, 299, 300])
    inputs = logits.requires_grad_()
    ours = masked_cross_entropy(inputs, labels, backend="triton")
    theirs = masked_cross_entropy(inputs, labels, backend="torch")
    assert ours.isnan().tolist() == [False, True, True, True, False, False, False, True]
    assert ours[6] == torch.inf
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    upstream = torch.rand(8)
    torch.testing.assert_close(
        gradient(ours, upstream, inputs),
        gradient(theirs, upstream, inputs),
        rtol=1e-5,
        atol=1e-7,
        equal_nan=True,
    )


def test_infinities_and_nan_as_in_torch(interpreter: RankPool) -> None:
    interpreter.run(1, run_infinities)


def run_confident_token() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    logits[0, 7] = 14.0
    true_grad = torch.softmax(logits[0].double(), 0)[7] - 1
    inputs = logits.requires_grad_()
    loss = masked_cross_entropy(inputs, torch.tensor([7]), backend="triton")
    error = gradient(loss, torch.ones(1), inputs)[0][0, 7] / true_grad - 1
    assert abs(error) < torch.finfo(torch.bfloat16).eps


def test_confident_token_keeps_its_gradient(interpreter: RankPool) -> None:
    interpreter.run(1, run_confident_token)


def run_strides() -> None:
    """Padded rows, transposed logits and labels, an expanded upstream gradient, no rows at all."""
    plain, labels, _ = make_logits(6, 40, 40, torch.float32)
    plain[1::3] = 0
    transposed = plain.t().contiguous().t()
    padded = torch.full((6, 64), torch.nan)[:, :40].copy_(plain)
    strided_labels = labels.repeat_interleave(2)[::2]
    results = []
    for logits in (plain, transposed, padded):
        inputs = logits.detach().requires_grad_()
        loss = masked_cross_entropy(inputs, strided_labels, backend="triton")
        results.append((loss, *torch.autograd.grad(loss, inputs, torch.tensor(0.5).expand(6))))
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))
    empty = torch.zeros(0, 40, requires_grad=True)
    loss = masked_cross_entropy(empty, labels[:0], backend="triton")
    assert gradient(loss, torch.zeros(0), empty)[0].shape == (0, 40)


def test_any_stride(interpreter: RankPool) -> None:
    interpreter.run(1, run_strides)


def run_far_rows() -> None:
    """Row 3 begins 3 * 2**30 elements after row 0; the file between them is a hole."""
    stride, width = 1 << 30, 40
    size = 3 * stride + width
    with tempfile.NamedTemporaryFile() as sparse:
        storage = torch.from_file(sparse.name, shared=True, size=size, dtype=torch.bfloat16)
    logits = storage.as_strided((4, width), (stride, 1))
    near = torch.randn(4, width).to(torch.bfloat16)
    logits.copy_(near)
    labels = torch.tensor([0, 39, IGNORE_INDEX, 7])
    results = []
    for inputs in (logits.detach().requires_grad_(), near.requires_grad_()):
        loss = masked_cross_entropy(inputs, labels, backend="triton")
        results.append((loss, *gradient(loss, torch.full((4,), 0.7), inputs)))
    assert all(torch.equal(far, close) for far, close in zip(*results, strict=True))


def test_row_offsets_beyond_32_bits(interpreter: RankPool) -> None:
    interpreter.run(1, run_far_rows)


def run_operators() -> None:
    """torch.compile's view of the operators: what they change, and the shapes they promise."""
    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    logits, labels, upstream = make_logits(3, 20000, 20000, torch.float32)
    logits = logits.nan_to_num(0.0)
    labels = labels.clamp(min=0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.shard_statistics, (logits, labels, 0, 20000, 0.0, True, True), test_utils=checks)
    statistics = kernels.shard_statistics(logits, labels, 0, 20000, 0.0, True, True)
    grads = torch.stack([upstream, upstream])
    arguments = (torch.zeros_like(logits), logits, labels, statistics, grads, 0, 20000)
    arguments += (20000, 0.1, 0.1, 5.0)
    torch.library.opcheck(kernels.write_gradient, arguments, test_utils=checks)


def test_operators_are_registered_truthfully(interpreter: RankPool) -> None:
    interpreter.run(1, run_operators)


def run_linear(sequence_parallel: bool) -> None:
    """In place on its own logits, per rank; twice, because the first backward uses them up."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(12, 1, 8, generator=generator)
    weight = torch.randn(200, 8, generator=generator)
    labels = torch.tensor([[IGNORE_INDEX] * 7 + [0, 99, 100, 189, 5]])
    upstream = torch.rand(1, 12, generator=generator)
    parts = size if sequence_parallel else 1
    results = []
    for backend in ("triton", "torch"):
        own_hidden = hidden.chunk(parts)[rank % parts].clone()
        own_hidden[labels.t().chunk(parts)[rank % parts] == IGNORE_INDEX] = torch.nan
        tensors = own_hidden.requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
        loss = masked_linear_cross_entropy(
            *tensors,
            labels,
            vocab_size=190,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            backend=backend,
        )
        grads = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
        again = torch.autograd.grad(loss, tensors, upstream)
        assert all(torch.equal(ours, other) for ours, other in zip(grads, again, strict=True))
        results.append((loss, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_linear_equals_torch_backend(
    interpreter: RankPool, size: int, sequence_parallel: bool
) -> None:
    interpreter.run(size, run_linear, sequence_parallel)


def run_double() -> None:
    with pytest.raises(ValueError, match="float64, expected bfloat16, float16 or float32"):
        masked_cross_entropy(
            torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1]), backend="triton"
        )


def test_double_is_refused(interpreter: RankPool) -> None:
    interpreter.run(1, run_double)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("width", [1, 100, 4008, 16032, 128256, 262144])
@pytest.mark.parametrize("num_rows", [0, 1, 100, 5734, 1 << 20])
def test_launch_fits_every_gpu(num_rows: int, width: int, warp_size: int) -> None:
    from sft_fast.kernels.masked_cross_entropy_triton import LaunchConfig

    config = LaunchConfig.for_shape(num_rows, width, warp_size)
    assert 1 <= config.num_warps * warp_size <= 1024
    assert config.block_columns <= 8192 and 1 <= config.num_splits <= 16
    assert (config.num_splits - 1) * config.block_columns < width, "a split has no column"
    assert config == LaunchConfig(
        **{**LaunchConfig.for_shape(num_rows, width, 32).__dict__, "num_warps": config.num_warps}
    ), "ranks with other GPUs would exchange statistics of another shape"


def compile_kernel(name: str, backend: str, arch: str | int, warp_size: int, dtype: str) -> Any:
    """Compiles as a launch on 16-byte aligned logits would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sft_fast.kernels import masked_cross_entropy_triton as kernels

    config = kernels.LaunchConfig.for_shape(5734, 16032, warp_size)
    kernel = getattr(kernels, f"masked_cross_entropy_{name}_kernel")
    constants = {"BLOCK_COLUMNS": config.block_columns, "BLOCK_PARTS": 8, "NUM_STATISTICS": 3}
    constants |= {"HAS_SOFTCAP": False, "WITH_LOGIT_SUM": False, "WITH_OUTPUTS": False}
    types = {"labels_ptr": "*i64", "logits_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}"}
    types |= {"statistics_ptr": "*fp32", "grads_ptr": "*fp32"}
    types |= dict.fromkeys(("smoothing", "uniform", "z_loss", "softcap"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    aligned = [n for n in names if n.endswith(("_ptr", "_stride")) or n == "width"]
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "i32") for argument in names},
        {argument: value for argument, value in constants.items() if argument in names},
        {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget(backend, arch, warp_size),
        options={"num_warps": config.num_warps},
    )


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is no compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.usefixtures("compiler")
def test_compiles_for_cdna(arch: str, name: str, dtype: str) -> None:
    compiled = compile_kernel(name, "hip", arch, 64, dtype)
    assembly = compiled.asm["amdgcn"]
    for counter in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{counter}:\s*(\d+)", assembly) == ["0"]
    assert compiled.metadata.shared <= 65536
    assert re.search(r"(global|buffer)_load_dwordx4", assembly)
    assert name == "fwd" or re.search(r"(global|buffer)_store_dwordx4", assembly)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.usefixtures("compiler")
def test_compiles_for_hopper(name: str, dtype: str, tmp_path: Path) -> None:
    compiled = compile_kernel(name, "cuda", 90, 32, dtype)
    assembly = compiled.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", assembly)
    assert (name, dtype) != ("bwd", "bf16") or "cvt.rn.bf16" in assembly, "not rounded"
    assert name == "fwd" or re.search(r"st\.global\S*\.v4\.b32", assembly)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], "registers were spilled"


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
    active_rows, labels = torch.arange(300, 512), labels.cuda()
    upstream = torch.rand(1, 512, generator=generator).cuda()
    weight.main_grad = torch.zeros(32003, 256, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = masked_linear_cross_entropy(
            hidden,
            weight,
            labels,
            active_rows=active_rows,
            vocab_size=32000,
            backend="triton",
            accumulate_into_main_grad=True,
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
    eager = eager_cross_entropy(eager_logits, labels[0], 32000).view(1, 512)
    assert_no_worse(loss, eager, truth)
    true_grads = gradient(truth, upstream, *exact)
    eager_grads = gradient(eager, upstream, hidden, weight)
    for ours, plain, true_grad in zip(
        (hidden_grad, weight.main_grad), eager_grads, true_grads, strict=True
    ):
        assert_no_worse(ours, plain, true_grad)
    assert_bit_zero(hidden_grad[:300])
