"""Cross-entropy of logits, forward and backward, against the bytes it has to move.

    pytest benchmarks/bench_masked_cross_entropy.py

Ours is what the LM head's loss does with its own logits of the active rows: the gradient takes
their place, so a logit of 16 bits is read twice and written once, 6 bytes. `fraction_of_limit` is
the time of those bytes at the speed of a large copy on the same machine, over the measured time.
On a GPU a graph is replayed; `launched_ms` is the time with the host launching each kernel, which
it can only hide where there is other work. Peers are launched too, and get the logits of all rows,
as their trainers would.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from megatron_loss import fused_loss, unfused_loss
from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.backends import load_backend
from sft_fast.kernels.loss_options import LossOptions
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from timing import DEVICE, ON_GPU, copy_bytes_per_s, graph_median_s, median_s, peak_bytes_beyond

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SIZES = [
    (num_rows, vocab_size)
    for num_rows in ((4096, 16384, 32768) if ON_GPU else (256,))
    for vocab_size in ((32000, 128256, 262144) if ON_GPU else (32000,))
]
ACTIVE_RATIOS = [1.0, 0.5, 0.35, 0.1]
BACKENDS = ["triton", "native"] if ON_GPU else ["torch"]


def make_inputs(num_rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N]."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(num_rows, vocab_size, dtype=DTYPE, device=DEVICE)
    for rows in logits.split(1024):
        rows.copy_(3 * torch.randn(rows.shape, generator=generator, device=DEVICE))
    labels = torch.randint(vocab_size, (num_rows,), generator=generator, device=DEVICE)
    return logits, labels


@functools.cache
def copy_ceiling() -> float:
    return copy_bytes_per_s()


OPTIONS = LossOptions()


def two_passes(backend: Any, logits: Tensor, labels: Tensor, grads: Tensor) -> Tensor:
    """Loss [N] of logits [N, V], which become their gradient."""
    columns = VocabColumns(0, logits.shape[1], logits.shape[1])
    statistics = backend.shard_statistics(logits, labels, columns, OPTIONS, False)
    (loss,) = backend.token_losses(statistics, labels, columns.vocab_size, OPTIONS, False)
    backend.write_gradient(logits, logits, labels, statistics, grads, columns, OPTIONS)
    return loss


def check(backend: ModuleType, logits: Tensor, labels: Tensor) -> None:
    """Some rows against plain operations in fp64."""
    rows, labels = logits[-16:].clone(), labels[-16:]
    exact = rows.double().requires_grad_()
    truth = F.cross_entropy(exact, labels, reduction="none")
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    grads = torch.stack([torch.ones(16), torch.zeros(16)]).to(DEVICE)
    loss = two_passes(backend, rows, labels, grads)
    tolerance = 1e-2 if DTYPE.itemsize == 2 else 1e-5
    assert (loss - truth).norm() <= 1e-5 * truth.norm()
    assert (rows - true_grad).norm() <= tolerance * true_grad.norm()


@pytest.mark.parametrize("active_ratio", ACTIVE_RATIOS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", BACKENDS)
def test_two_passes(
    benchmark: BenchmarkFixture, name: str, size: tuple[int, int], active_ratio: float
) -> None:
    backend = load_backend("masked_cross_entropy", name, DEVICE.type)
    num_active = round(size[0] * active_ratio)
    logits, labels = make_inputs(num_active, size[1])
    check(backend, logits, labels)
    grads = torch.stack([torch.ones(num_active), torch.zeros(num_active)]).to(DEVICE)
    launched_s = median_s(lambda: two_passes(backend, logits, labels, grads))
    duration = launched_s
    if ON_GPU:
        duration = graph_median_s(lambda: two_passes(backend, logits, labels, grads))
    num_bytes = 3 * logits.numel() * DTYPE.itemsize
    benchmark.pedantic(two_passes, args=(backend, logits, labels, grads), rounds=1)
    benchmark.extra_info.update(
        rows=size[0],
        vocab_size=size[1],
        active_ratio=active_ratio,
        ms=1e3 * duration,
        launched_ms=1e3 * launched_s,
        limit_ms=1e3 * num_bytes / copy_ceiling(),
        bytes_per_s=num_bytes / duration,
        fraction_of_limit=num_bytes / copy_ceiling() / duration,
    )


@pytest.mark.skipif(not ON_GPU, reason="the native kernels need a GPU")
@pytest.mark.parametrize("size", [(4096, 32000), (16384, 128256)])
def test_one_pass(benchmark: BenchmarkFixture, size: tuple[int, int]) -> None:
    backend: Any = load_backend("masked_cross_entropy", "native", DEVICE.type)
    logits, labels = make_inputs(*size)
    weights = torch.ones(size[0], device=DEVICE)
    arguments = logits, labels, weights, VocabColumns(0, size[1], size[1]), OPTIONS
    duration = median_s(lambda: backend.loss_and_gradient(*arguments))
    num_bytes = 2 * logits.numel() * DTYPE.itemsize
    benchmark.pedantic(backend.loss_and_gradient, args=arguments, rounds=1)
    benchmark.extra_info.update(
        ms=1e3 * duration,
        limit_ms=1e3 * num_bytes / copy_ceiling(),
        fraction_of_limit=num_bytes / copy_ceiling() / duration,
    )


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


@functools.cache
def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(eager)


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Its gradient takes the logits' place as ours does; a view keeps autograd from objecting.
    return liger_cross_entropy(
        logits.view_as(logits), labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    losses = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    # Multiplied, because it does not take the expanded gradient that a sum alone sends back.
    return (losses * torch.ones_like(losses)).sum()


PEERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "torch.compile": lambda logits, labels: compiled()(logits, labels),
    "Megatron unfused": unfused_loss,
    "Megatron fused": fused_loss,
    "Liger": liger,
    "quack": quack,
}


@pytest.mark.parametrize("active_ratio", [1.0, 0.35])
@pytest.mark.parametrize("peer", PEERS)
def test_peer(benchmark: BenchmarkFixture, peer: str, active_ratio: float) -> None:
    if peer in ("Liger", "quack") and not ON_GPU:
        pytest.skip("needs a GPU")
    num_rows, vocab_size = (16384, 128256) if ON_GPU else SIZES[0]
    logits, labels = make_inputs(num_rows, vocab_size)
    num_active = round(num_rows * active_ratio)
    active_logits, active_labels = logits[:num_active].clone(), labels[:num_active].clone()
    labels[num_active:] = IGNORE_INDEX
    logits.requires_grad_()

    def step() -> None:
        loss = PEERS[peer](logits, labels)
        torch.autograd.grad(loss, logits)

    try:
        theirs = median_s(step, rounds=5)
        memory = peak_bytes_beyond(step) if ON_GPU else None
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        pytest.skip(f"{peer}: {type(error).__name__}: {error}")
    backend = load_backend("masked_cross_entropy", BACKENDS[0], DEVICE.type)
    grads = torch.stack([torch.ones(num_active), torch.zeros(num_active)]).to(DEVICE)
    ours = median_s(lambda: two_passes(backend, active_logits, active_labels, grads), rounds=5)
    benchmark.pedantic(step, rounds=1)
    benchmark.extra_info.update(
        peer=peer,
        active_ratio=active_ratio,
        ms=1e3 * theirs,
        ours_ms=1e3 * ours,
        ours_times_faster=theirs / ours,
        peak_bytes_beyond_logits=memory,
    )
