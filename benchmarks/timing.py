"""Times of code that may run on a GPU, and the limits that they are held against."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def median_s(function: Callable[[], object], rounds: int = 10) -> float:
    """Median seconds of one call after two calls that do not count.

    On a GPU the calls are queued without waiting and timed by events, as in a training step, where
    the host is ahead of the device.
    """
    if not ON_GPU:
        times = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])
    for _ in range(2):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return statistics.median(first.elapsed_time(second) for first, second in pairs) / 1e3


def graph_median_s(function: Callable[[], object], rounds: int = 10) -> float:
    """As median_s on a GPU, without the time the host takes to launch: replays of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_s(graph.replay, rounds)


def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written per second by a large copy: the ceiling of a GPU's memory."""
    source = torch.randint(256, (4 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source))


def matmul_flops_per_s() -> float:
    """FLOP/s of a large bfloat16 product of random numbers: the ceiling of the matrix units."""
    size = 8192
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * size**3 / median_s(lambda: left @ right)


def peak_bytes_beyond(function: Callable[[], object]) -> int:
    """GPU memory that one call allocates at most, beyond what is allocated already."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
