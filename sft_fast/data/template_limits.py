"""Limits on what a chat template may use. jinja's sandbox keeps it from the machine, not from the
machine's time and memory."""

import os
import resource
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SECONDS = 2.0
MEMORY_BYTES = 256 << 20
LONGEST_FACTOR = 10
LONGEST_BASE = 100_000
"""Characters that a template may add by itself: instructions, lists of tools."""
MEMORY_IS_KNOWN_S = 0.05
"""Age up to which what this process occupies is not asked for again: that takes as long as to
render a conversation."""
MOST_BITS = 1 << 16
"""Of a number that a template computes; a single operation on longer ones outlasts any signal."""
_occupied = (-1.0, 0)
"""When it was asked for, and bytes."""


class TemplateLimits:
    """Ends the body when it takes too long (in the main thread) or too much memory (on Linux).

    Raises:
        ValueError: it did.
    """

    def __enter__(self) -> None:
        bound_operators()
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._handler = signal.signal(signal.SIGALRM, _stop)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        if sys.platform == "linux":
            self._limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = _bytes_occupied() + MEMORY_BYTES
            if soft != resource.RLIM_INFINITY:
                most = min(most, soft)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, self._limits)
        if self._is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler)
        if isinstance(error, MemoryError):
            raise ValueError(
                f"the chat template takes more than {MEMORY_BYTES >> 20} MiB for one conversation"
            ) from None


@cache
def bound_operators() -> None:
    """Makes jinja's sandbox refuse to multiply its way to huge numbers.

    Before templates are compiled: they call what is set at that time.
    """
    from jinja2.sandbox import SandboxedEnvironment

    SandboxedEnvironment.intercepted_binops = frozenset({"*", "**"})
    SandboxedEnvironment.default_binop_table |= {"*": _multiply, "**": _power}


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        _check_bits(base.bit_length() * abs(exponent))
    return base**exponent


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise ValueError(f"the chat template computes a number of more than {MOST_BITS} bits")


def check_length(text: str, conversation: object) -> None:
    """Raises ValueError when a rendered text is far longer than its conversation."""
    if len(text) <= LONGEST_BASE:
        return
    num_input = len(str(conversation))
    most = LONGEST_FACTOR * num_input + LONGEST_BASE
    if len(text) > most:
        raise ValueError(
            f"the chat template makes {len(text)} characters of {num_input}; expected {most} at "
            "most"
        )


def _stop(number: int, frame: FrameType | None) -> None:
    raise ValueError(f"the chat template takes more than {SECONDS:g} s for one conversation")


def _bytes_occupied() -> int:
    """The address space of this process, as it was a moment ago."""
    global _occupied
    now = time.monotonic()
    if now - _occupied[0] > MEMORY_IS_KNOWN_S:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        _occupied = (now, pages * os.sysconf("SC_PAGE_SIZE"))
    return _occupied[1]
