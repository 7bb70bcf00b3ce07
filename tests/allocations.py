"""What a call allocates, on the CPU."""

import warnings
from collections.abc import Callable

from torch.profiler import profile


def most_bytes_held(function: Callable[[], object]) -> int:
    """Bytes of tensors that a call holds at most, beyond those that were there before."""
    with warnings.catch_warnings(), profile(profile_memory=True) as profiler:
        function()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
