"""Other processes: when they started, whether they live, how they end. Nothing imports torch."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from functools import cache
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LAUNCHER_VARIABLE = "SFT_FAST_LAUNCHER_PID"


def start_of(pid: int) -> float:
    """When a process started.

    On Linux in clock ticks since boot: setting the clock changes psutil's create_time, not these.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    try:
        # The name of the program, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return float(fields[19])


@cache
def process_space() -> str:
    """Names the processes that this one can see by their ids: a kernel since its boot, and in it a
    namespace. Containers and virtual machines may have one host name, but not this."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename}/{psutil.boot_time():.0f}"


def is_gone(pid: int, started: float, space: str) -> bool:
    """Whether a process is known to have ended; one of another `process_space` is not."""
    if space != process_space():
        return False
    try:
        return not is_alive(pid) or start_of(pid) != started
    except psutil.NoSuchProcess:
        return True


def age_of(pid: int) -> float:
    """Seconds since a process started, whatever happened to the clock; suspension counts.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    if sys.platform != "linux":
        return time.time() - psutil.Process(pid).create_time()
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_of(pid) / ticks_per_s


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def launcher_pid() -> int:
    """The process that started this rank: its parent, or the one above its keeper."""
    return int(os.environ.get(LAUNCHER_VARIABLE, os.getppid()))


def is_stopped(pid: int) -> bool:
    """Whether a signal stopped the process, as Ctrl-Z does."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Makes Linux send this process a signal when its parent ends; elsewhere does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def adopt_orphans() -> None:
    """Makes Linux give this process the children of its children that end; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def raise_file_limit() -> None:
    """Lets this process open as many files as it may: a model can have hundreds."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def end_children() -> None:
    """Kills the children of this process, and theirs."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
