"""Limits on what a chat template may use. jinja's sandbox keeps it from the machine, not from the
machine's time and memory."""

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS = 2.0
MEMORY_BYTES = 256 << 20
LONGEST_FACTOR = 10
LONGEST_BASE = 100_000
"""Characters that a template may add by itself: instructions, lists of tools."""


@contextlib.contextmanager
def template_limits() -> Iterator[None]:
    """Ends the body when it takes too long (in the main thread) or too much memory (on Linux).

    Raises:
        ValueError: it did.
    """
    with _time_limit(), _memory_limit():
        try:
            yield
        except MemoryError:
            raise ValueError(
                f"the chat template takes more than {MEMORY_BYTES >> 20} MiB for one conversation"
            ) from None


def check_length(text: str, num_input: int) -> None:
    """Raises ValueError when a rendered text is far longer than its conversation's characters."""
    most = LONGEST_FACTOR * num_input + LONGEST_BASE
    if len(text) > most:
        raise ValueError(
            f"the chat template makes {len(text)} characters of {num_input}; expected {most} at "
            "most"
        )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _stop(number: int, frame: object) -> None:
    raise ValueError(f"the chat template takes more than {SECONDS:g} s for one conversation")


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
