"""LM head and loss, forward and backward: active rows only against every row.

    pytest benchmarks/bench_masked_linear_cross_entropy.py

The first peer is what a plain trainer does: all logits, then F.cross_entropy with ignore_index. The
others are libraries that are installed here. Sizes are those of a 135M model on a CPU and of 1B,
8B and 70B models on a GPU. `fraction_of_limit` is the time of the three products over the active
rows, at the speed of a large product on the same machine, over the measured time. Run as a script,
the file prints the peak memory in bytes of one method on a CPU:
`bench_masked_linear_cross_entropy.py masked 0.35`.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from megatron_loss import fused_loss, unfused_loss
from sft_fast.constants import IGNORE_INDEX
from sft_fast.loss import HeadSettings, masked_linear_cross_entropy
from sft_fast.reference.cross_entropy import linear_cross_entropy
from timing import DEVICE, ON_GPU, matmul_flops_per_s, median_s, peak_bytes_beyond

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_ROWS, HIDDEN, VOCAB = (16384, 4096, 128256) if ON_GPU else (1024, 576, 49152)
HIDDEN_SIZES = (2048, 4096, 8192) if ON_GPU else (HIDDEN,)
ACTIVE_RATIOS = [1.0, 0.5, 0.35, 0.1]


class Inputs(NamedTuple):
    hidden: Tensor
    """[s, 1, h]"""
    weight: Tensor
    """[V, h]"""
    labels: Tensor
    """[1, s]"""
    active_tokens: Tensor
    """[A] on the CPU, where the data loader leaves it"""


def with_active_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Inputs:
    active_tokens = (labels[0] != IGNORE_INDEX).nonzero().squeeze(1).cpu()
    return Inputs(hidden, weight, labels, active_tokens)


def make_inputs(active_ratio: float, hidden_size: int = HIDDEN) -> Inputs:
    """A sequence whose last part trains: the prompt comes first."""
    how: Any = {"device": DEVICE, "generator": torch.Generator(DEVICE).manual_seed(0)}
    hidden = torch.randn(NUM_ROWS, 1, hidden_size, **how).to(DTYPE)
    weight = (torch.randn(VOCAB, hidden_size, **how) / hidden_size**0.5).to(DTYPE)
    labels = torch.randint(VOCAB, (1, NUM_ROWS), **how)
    labels[:, : NUM_ROWS - round(active_ratio * NUM_ROWS)] = IGNORE_INDEX
    return with_active_tokens(hidden.requires_grad_(), weight.requires_grad_(), labels)


@functools.cache
def product_ceiling() -> float:
    return matmul_flops_per_s()


def masked(inputs: Inputs) -> Tensor:
    hidden, weight, labels, active_tokens = inputs
    losses = masked_linear_cross_entropy(
        hidden, weight, labels, HeadSettings(summed=True), active_tokens=active_tokens
    )
    return losses.sum()


def full(inputs: Inputs) -> Tensor:
    logits = F.linear(inputs.hidden.flatten(0, 1), inputs.weight).float()
    labels = inputs.labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def compiled(inputs: Inputs) -> Tensor:
    return compiled_full(inputs.hidden, inputs.weight, inputs.labels)


@functools.cache
def compile_full() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(lambda *tensors: full(Inputs(*tensors, torch.empty(0))))


def compiled_full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return compile_full()(hidden, weight, labels)


def torch_linear(inputs: Inputs) -> Tensor:
    hidden, labels = inputs.hidden.flatten(0, 1), inputs.labels.flatten()
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined]
    return function(hidden, inputs.weight, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    logits = F.linear(inputs.hidden.flatten(0, 1), inputs.weight)
    loss = LigerCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
    return loss(logits, inputs.labels.flatten())


def liger_linear(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
    return loss(inputs.weight, inputs.hidden.flatten(0, 1), inputs.labels.flatten())


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    arguments = inputs.hidden.flatten(0, 1), inputs.weight, inputs.labels.flatten()
    # Without the filter that leaves out small gradients.
    return cut(*arguments, ignore_index=IGNORE_INDEX, reduction="sum", filter_eps=None)


def quack(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    arguments = inputs.hidden.flatten(0, 1), inputs.weight, inputs.labels.flatten()
    # Its default of 4096 rows is an error where the hidden size is 4096 too.
    return chunked_linear_cross_entropy(
        *arguments, chunk_size=8192, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def transformer_engine(inputs: Inputs) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    logits = F.linear(inputs.hidden, inputs.weight).transpose(0, 1)
    loss = parallel_cross_entropy(logits, inputs.labels, 0.0, False, None, IGNORE_INDEX)
    return loss.sum()


def megatron(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return loss(F.linear(inputs.hidden.flatten(0, 1), inputs.weight), inputs.labels.flatten())


METHODS: dict[str, Callable[[Inputs], Tensor]] = {"masked": masked, "full": full}
# Peers on a GPU; those that need no GPU are measured on a CPU too.
CPU_PEERS = {
    "torch.compile": compiled,
    "torch linear_cross_entropy": torch_linear,
    "Megatron unfused": functools.partial(megatron, loss=unfused_loss),
    "Megatron fused": functools.partial(megatron, loss=fused_loss),
}
GPU_PEERS = {
    "Liger": liger,
    "Liger fused linear": liger_linear,
    "CCE unfiltered": cut_cross_entropy,
    "quack chunked": quack,
    "Transformer Engine": transformer_engine,
}
PEERS = CPU_PEERS | GPU_PEERS
METHODS |= PEERS


def step(method: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Returns the summed loss and both gradients."""
    loss = METHODS[method](inputs)
    grads = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return loss.detach(), *grads


def check(inputs: Inputs) -> None:
    """Compares with the oracle in fp64, on every 16th row to bound its cost."""
    hidden, weight, labels, _ = inputs
    hidden, labels = hidden.detach()[15::16].clone().requires_grad_(), labels[:, 15::16]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = linear_cross_entropy(exact[0], exact[1], labels).sum()
    tolerance = 2e-2 if torch.bfloat16 == DTYPE else 1e-5
    results = step("masked", with_active_tokens(hidden, weight, labels))
    truths = truth, *torch.autograd.grad(truth, exact)
    for result, exact_result in zip(results, truths, strict=True):
        assert (result - exact_result).norm() <= tolerance * exact_result.norm()


def peak_bytes(method: str, active_ratio: float) -> int:
    """Memory of one step beyond its inputs, gradients included; on a CPU in a fresh process."""
    if ON_GPU:
        inputs = make_inputs(active_ratio)
        return peak_bytes_beyond(lambda: step(method, inputs))
    command = [sys.executable, __file__, method, str(active_ratio)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_bytes(method: str, active_ratio: float) -> None:
    inputs = make_inputs(active_ratio)
    # A small step first: code and thread pools loaded on first use are not the method's memory.
    hidden, weight, labels, _ = inputs
    step(method, with_active_tokens(hidden[-8:], weight[:64], labels[:, -8:] % 64))
    before = psutil.Process().memory_info().rss
    step(method, inputs)
    print(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Linux's own record; getrusage would give the parent's, which exec does not reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("active_ratio", ACTIVE_RATIOS)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_masked_linear_cross_entropy(
    benchmark: BenchmarkFixture, hidden_size: int, active_ratio: float
) -> None:
    inputs = make_inputs(active_ratio, hidden_size)
    check(inputs)
    masked_s = median_s(lambda: step("masked", inputs))
    full_s = median_s(lambda: step("full", inputs), rounds=5)
    benchmark.pedantic(step, args=("masked", inputs), rounds=1)
    num_active = round(active_ratio * NUM_ROWS)
    flops = 6 * num_active * hidden_size * VOCAB
    benchmark.extra_info.update(
        num_rows=NUM_ROWS,
        num_active=num_active,
        hidden_size=hidden_size,
        ms=1e3 * masked_s,
        limit_ms=1e3 * flops / product_ceiling(),
        fraction_of_limit=flops / product_ceiling() / masked_s,
        flops_per_s=flops / masked_s,
        # Each logit: written by the head, read, read and written, read by two products.
        logit_bytes=6 * DTYPE.itemsize * num_active * VOCAB,
        full_ms=1e3 * full_s,
        times_faster_than_full=full_s / masked_s,
    )
    if hidden_size == HIDDEN:
        masked_bytes, full_bytes = (
            peak_bytes(method, active_ratio) for method in ("masked", "full")
        )
        benchmark.extra_info.update(
            peak_bytes=masked_bytes,
            full_peak_bytes=full_bytes,
            times_less_memory_than_full=full_bytes / masked_bytes,
        )


@pytest.mark.parametrize("active_ratio", [0.35, 1.0])
@pytest.mark.parametrize("peer", PEERS)
def test_peer(benchmark: BenchmarkFixture, peer: str, active_ratio: float) -> None:
    if peer in GPU_PEERS and not ON_GPU:
        pytest.skip("needs a GPU")
    inputs = make_inputs(active_ratio)
    ours = step("masked", inputs)
    try:
        theirs = step(peer, inputs)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"{peer}: {type(error).__name__}: {error}")
    # One after the other and back, so that both see the same state of the machine.
    masked_s = [median_s(lambda: step("masked", inputs), rounds=5)]
    peer_s = median_s(lambda: step(peer, inputs), rounds=5)
    masked_s.append(median_s(lambda: step("masked", inputs), rounds=5))
    benchmark.pedantic(step, args=(peer, inputs), rounds=1)
    benchmark.extra_info.update(
        peer=peer,
        active_ratio=active_ratio,
        ms=1e3 * peer_s,
        masked_ms=[1e3 * duration for duration in masked_s],
        masked_times_faster=2 * peer_s / sum(masked_s),
        # Not asserted: some peers are less exact than ours, which `check` holds to the oracle.
        relative_difference={
            name: float((their - our).norm() / our.norm())
            for name, our, their in zip(("loss", "hidden", "weight"), ours, theirs, strict=True)
        },
    )
    if ON_GPU:
        del ours, theirs
        memory = [
            peak_bytes_beyond(lambda name=name: step(name, inputs)) for name in ("masked", peer)
        ]
        benchmark.extra_info.update(masked_peak_bytes=memory[0], peak_bytes=memory[1])


if __name__ == "__main__":
    print_peak_bytes(sys.argv[1], float(sys.argv[2]))
