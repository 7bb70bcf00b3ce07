"""Where the device time of a step goes, by kind of kernel, and how it compares to the wall's."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# The first kind of which a kernel's name holds a word.
KINDS = {
    "attention": ("flash", "fmha", "varlen"),
    "products": ("nvjet", "gemm", "cutlass", "xmma", "grouped_mm", "grouped_matmul", "cijk"),
    "collectives": ("nccl", "rccl"),
    "optimizer": ("adam", "multi_tensor"),
}
REST = "rest"
NUM_SLOWEST = 12


def kind_of(kernel: str) -> str:
    """The kind that a kernel's name tells."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), REST)


def profile_step(step: Callable[[], object]) -> dict[str, object]:
    """Runs a step twice, once timed by the wall and once under the profiler.

    Returns:
        milliseconds of all kernels, of each kind and of the slowest ones that are of no kind; the
        share of the latter; and the wall's time over the kernels'.
    """
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - begin)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = {e.key: e.self_device_time_total / 1e3 for e in profiler.key_averages()}
    by_kind: dict[str, float] = defaultdict(float)
    for name, ms in kernels.items():
        by_kind[kind_of(name)] += ms
    total = sum(kernels.values())
    rest = sorted((ms, name) for name, ms in kernels.items() if kind_of(name) == REST)
    return {
        "kernel_ms": total,
        "kernel_ms_by_kind": dict(by_kind),
        "share_of_rest": by_kind[REST] / total,
        "wall_over_kernels": wall_ms / total,
        "slowest_of_rest_ms": {name[:60]: ms for ms, name in rest[: -NUM_SLOWEST - 1 : -1]},
    }
