"""The lock of a run directory: one job at a time. Nothing here imports torch.

The lock is a file whose modification time is a heartbeat: that works on network file systems, where
flock often does not. No clock of a machine is trusted: heartbeats are compared with the time of the
file system that holds them, and processes are told apart by the kernel and the namespace that they
belong to and by their start since boot, not by names of hosts.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from sft_fast.files import write_atomically, write_first
from sft_fast.runtime.processes import is_gone, process_space, start_of

LOCK_FILE = ".lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0
LOOK_AGAIN_S = 1.0


class RunLock:
    """Held by rank 0 of a job; `renew` keeps it."""

    def __init__(self, folder: Path, job: str, patience_s: float = 0.0):
        """
        Args:
            folder: the directory that is locked.
            job: names the job; its restarted ranks take the lock over at once.
            patience_s: how long another job may still hold it; its heartbeats stop when it ended.

        Raises:
            ValueError: another job uses `folder`.
        """
        self.path = folder / LOCK_FILE
        self.text = json.dumps(
            {
                "host": socket.gethostname(),
                "space": process_space(),
                "pid": os.getpid(),
                "process_started": start_of(os.getpid()),
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                "job": job,
                "token": uuid.uuid4().hex,
            }
        )
        deadline = time.monotonic() + patience_s
        while not write_first(self.path, self.text):
            holder = self.holder()
            if holder is None:
                continue
            if is_abandoned(self.path, holder, job):
                self.remove_abandoned(holder)
            elif time.monotonic() < deadline:
                time.sleep(LOOK_AGAIN_S)
            else:
                raise ValueError(
                    f"output_dir: {folder} is in use by process {holder.get('pid')} on "
                    f"{holder.get('host')} since {holder.get('started')}; wait for it, or choose "
                    "another output_dir"
                )

    def holder(self) -> dict[str, Any] | None:
        """The content of the lock; None when it has just been released."""
        try:
            return parsed(self.path.read_bytes())
        except FileNotFoundError:
            return None

    def remove_abandoned(self, holder: dict[str, Any]) -> None:
        """Removes an abandoned lock; of several jobs that try, one succeeds."""
        grave = self.path.with_name(f".lock-{os.getpid()}-{time.monotonic_ns()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, grave)
            moved = grave.read_bytes()
            if moved and parsed(moved) != holder:
                # Another job was faster: this is its new lock.
                write_first(self.path, moved.decode(errors="replace"))
            grave.unlink()

    def renew(self) -> bool:
        """Renews the heartbeat; False when the lock is no longer this job's.

        What happens to the file alone, deleted by hand or spoiled by a disk, ends no run: it is
        written again.
        """
        try:
            found = self.path.read_bytes()
            if differing_bytes(found, self.text.encode()) == 0:
                os.utime(self.path)
            elif differing_bytes(found, self.text.encode()) == 1 or not parsed(found):
                with write_atomically(self.path) as file:
                    file.write(self.text)
            else:
                return False
        except FileNotFoundError:
            return self.write_again()
        except OSError:
            # A network file system that is away for a moment; the next beat will tell.
            return True
        return True

    def write_again(self) -> bool:
        """Makes a lock that was deleted; False when another job was faster."""
        try:
            return write_first(self.path, self.text)
        except OSError:
            return True

    def release(self) -> None:
        """Removes the lock if it is still this job's."""
        with contextlib.suppress(OSError):
            if self.path.read_bytes() == self.text.encode():
                self.path.unlink()


def parsed(content: bytes) -> dict[str, Any]:
    """What a lock says; nothing where it is damaged, or not whole yet."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def differing_bytes(first: bytes, second: bytes) -> int:
    """How many bytes differ; those of another length differ in all of them."""
    if len(first) != len(second):
        return max(len(first), len(second))
    return sum(a != b for a, b in zip(first, second, strict=True))


def is_abandoned(path: Path, holder: dict[str, Any], job: str) -> bool:
    """Whether the holder is dead, has renewed no heartbeat for STALE_S, or belongs to this job."""
    if holder.get("job") == job:
        return True
    pid, started = holder.get("pid"), holder.get("process_started")
    if holder.get("space") == process_space() and isinstance(pid, int):
        return is_gone(pid, started if isinstance(started, float) else -1.0, process_space())
    try:
        return file_system_time(path.parent) - path.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return True


def file_system_time(folder: Path) -> float:
    """The clock of the file system of `folder`, which may be another machine's; seconds."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
