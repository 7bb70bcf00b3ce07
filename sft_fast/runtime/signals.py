"""Signals of this process as bytes that a thread waits for. Nothing here imports torch.

Python runs signal handlers in the main thread only, which may be stuck in a collective; the wake-up
pipe reaches any thread.
"""

import os
import select
import signal
import threading
from typing import Any

from sft_fast.runtime.processes import die_with_parent

# What schedulers send before they take a machine away, Ctrl-C, and a terminal that is closed.
SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)


def wanted_signals() -> tuple[signal.Signals, ...]:
    """SIGNALS, without the one that `nohup` has told this process to ignore."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(one for one in SIGNALS if one is not signal.SIGHUP or not is_ignored)


class SignalPipe:
    """Takes the process's SIGNALS from construction to `close`."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.is_open = True
        self.old_handlers: dict[int, Any] = {}
        self.old_wakeup_fd: int | None = None
        if threading.current_thread() is threading.main_thread():
            self.old_handlers = {one: signal.signal(one, ignore) for one in wanted_signals()}
            self.old_wakeup_fd = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
            # A rank that was forked has them blocked until somebody listens.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.register_at_fork(after_in_child=self.reset_in_child)

    def wait(self, timeout_s: float) -> bytes:
        """The numbers of the signals that came, one byte each; b"" after `timeout_s`."""
        ready, _, _ = select.select([self.read_end], [], [], timeout_s)
        return os.read(self.read_end, 64) if ready else b""

    def close(self) -> None:
        """Gives the signals back to who had them before."""
        self.is_open = False
        if self.old_wakeup_fd is not None:
            signal.set_wakeup_fd(self.old_wakeup_fd)
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        os.close(self.read_end)
        os.close(self.write_end)

    def reset_in_child(self) -> None:
        """A forked child is no rank: it must die of SIGTERM, and with its parent."""
        if self.is_open:
            signal.set_wakeup_fd(-1)
            for number in self.old_handlers:
                signal.signal(number, signal.SIG_DFL)
            die_with_parent()


def ignore(number: int, frame: object) -> None:
    """A handler that only keeps the default action away: the pipe tells of the signal."""
