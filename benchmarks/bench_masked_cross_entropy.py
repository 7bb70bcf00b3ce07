"""LM head and loss, forward and backward: active rows only against every row.

    pytest benchmarks/bench_masked_cross_entropy.py

The peer is what a plain trainer does: all logits, then F.cross_entropy with ignore_index. Sizes
are those of a 135M model on a CPU and of an 8B model on a GPU. Run as a script, the file prints
the peak memory in bytes of one method: `bench_masked_cross_entropy.py masked 0.35`.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.loss import masked_linear_cross_entropy
from sft_fast.reference.cross_entropy import linear_cross_entropy

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_ROWS, HIDDEN, VOCAB = (16384, 4096, 128256) if ON_GPU else (1024, 576, 49152)
ACTIVE_RATIOS = [1.0, 0.5, 0.35, 0.1]


class Inputs(NamedTuple):
    hidden: Tensor
    """[s, 1, h]"""
    weight: Tensor
    """[V, h]"""
    labels: Tensor
    """[1, s]"""
    active_rows: Tensor
    """[A] on the CPU, where the data loader leaves it"""


def with_active_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Inputs:
    active_rows = (labels[0] != IGNORE_INDEX).nonzero().squeeze(1).cpu()
    return Inputs(hidden, weight, labels, active_rows)


def make_inputs(active_ratio: float) -> Inputs:
    """A sequence whose last part trains: the prompt comes first."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, 1, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5
    labels = torch.randint(VOCAB, (1, NUM_ROWS), generator=generator)
    labels[:, : NUM_ROWS - round(active_ratio * NUM_ROWS)] = IGNORE_INDEX
    hidden, weight = hidden.to(DEVICE, DTYPE), weight.to(DEVICE, DTYPE)
    return with_active_rows(hidden.requires_grad_(), weight.requires_grad_(), labels.to(DEVICE))


def masked(inputs: Inputs) -> Tensor:
    hidden, weight, labels, active_rows = inputs
    return masked_linear_cross_entropy(hidden, weight, labels, active_rows=active_rows).sum()


def full(inputs: Inputs) -> Tensor:
    logits = F.linear(inputs.hidden.flatten(0, 1), inputs.weight).float()
    labels = inputs.labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


METHODS: dict[str, Callable[[Inputs], Tensor]] = {"masked": masked, "full": full}


def step(method: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Returns the summed loss and both gradients."""
    loss = METHODS[method](inputs)
    grads = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    if ON_GPU:
        torch.cuda.synchronize()
    return loss, *grads


def check(inputs: Inputs) -> None:
    """Compares with the oracle in fp64, on every 16th row to bound its cost."""
    hidden, weight, labels, _ = inputs
    hidden, labels = hidden.detach()[15::16].clone().requires_grad_(), labels[:, 15::16]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = linear_cross_entropy(exact[0], exact[1], labels).sum()
    tolerance = 2e-2 if torch.bfloat16 == DTYPE else 1e-5
    results = step("masked", with_active_rows(hidden, weight, labels))
    truths = truth, *torch.autograd.grad(truth, exact)
    for result, exact_result in zip(results, truths, strict=True):
        assert (result - exact_result).norm() <= tolerance * exact_result.norm()


def peak_bytes(method: str, active_ratio: float) -> int:
    """Memory of one step beyond its inputs, gradients included, measured in a fresh process."""
    command = [sys.executable, __file__, method, str(active_ratio)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_bytes(method: str, active_ratio: float) -> None:
    inputs = make_inputs(active_ratio)
    if ON_GPU:
        before = torch.cuda.memory_allocated()
        step(method, inputs)
        print(torch.cuda.max_memory_allocated() - before)
        return
    # A small step first: code and thread pools loaded on first use are not the method's memory.
    hidden, weight, labels, _ = inputs
    step(method, with_active_rows(hidden[-8:], weight[:64], labels[:, -8:] % 64))
    before = psutil.Process().memory_info().rss
    step(method, inputs)
    print(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Linux's own record; getrusage would give the parent's, which exec does not reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("active_ratio", ACTIVE_RATIOS)
def test_masked_linear_cross_entropy(benchmark: BenchmarkFixture, active_ratio: float) -> None:
    inputs = make_inputs(active_ratio)
    check(inputs)
    full_durations = []

    def run_full() -> None:
        start = time.perf_counter()
        step("full", inputs)
        full_durations.append(time.perf_counter() - start)

    # The peer runs before each round, so that both see the same state of the machine.
    benchmark.pedantic(step, args=("masked", inputs), setup=run_full, rounds=5, warmup_rounds=1)
    assert benchmark.stats is not None
    masked_s, full_s = benchmark.stats.stats.median, statistics.median(full_durations[1:])
    num_active = round(active_ratio * NUM_ROWS)
    flops = 6 * num_active * HIDDEN * VOCAB
    masked_bytes, full_bytes = (peak_bytes(method, active_ratio) for method in ("masked", "full"))
    benchmark.extra_info.update(
        num_rows=NUM_ROWS,
        num_active=num_active,
        flops=flops,
        tflops_per_s=flops / masked_s / 1e12,
        # Each logit: written by the head, read, read and written, read by two products.
        logit_bytes=6 * DTYPE.itemsize * num_active * VOCAB,
        full_s=full_s,
        times_faster_than_full=full_s / masked_s,
        peak_bytes=masked_bytes,
        full_peak_bytes=full_bytes,
        times_less_memory_than_full=full_bytes / masked_bytes,
    )


if __name__ == "__main__":
    print_peak_bytes(sys.argv[1], float(sys.argv[2]))
