"""The lock of a run directory: one job at a time. Nothing here imports torch.

The lock is a file whose modification time is a heartbeat: that works on network file systems, where
flock often does not. No clock of a machine is trusted: heartbeats are compared with the time of the
file system that holds them, and processes are told apart by their start since boot.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from sft_fast.runtime.processes import start_of

LOCK_FILE = ".lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0


class RunLock:
    """Held by rank 0 of a job; `renew` keeps it."""

    def __init__(self, folder: Path, job: str):
        """
        Args:
            folder: the directory that is locked.
            job: names the job; its restarted ranks take the lock over at once.

        Raises:
            ValueError: another job uses `folder`.
        """
        self.path = folder / LOCK_FILE
        self.text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_started": start_of(os.getpid()),
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                "job": job,
            }
        )
        while not self.create():
            holder = self.holder()
            if holder is not None and not is_abandoned(self.path, holder, job):
                raise ValueError(
                    f"output_dir: {folder} is in use by process {holder.get('pid')} on "
                    f"{holder.get('host')} since {holder.get('started')}; wait for it, or choose "
                    "another output_dir"
                )
            if holder is not None:
                self.remove_abandoned(holder)

    def create(self) -> bool:
        """Writes the lock; False where there is one."""
        # Linked, not opened for writing: nobody sees a lock that does not name its holder yet.
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=".lock-") as file:
            file.write(self.text)
            file.flush()
            try:
                os.link(file.name, self.path)
            except FileExistsError:
                return False
        return True

    def holder(self) -> dict[str, Any] | None:
        """The content of the lock; None when it has just been released."""
        try:
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def remove_abandoned(self, holder: dict[str, Any]) -> None:
        """Removes an abandoned lock; of several jobs that try, one succeeds."""
        grave = self.path.with_name(f".lock-{os.getpid()}-{time.monotonic_ns()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, grave)
            moved = grave.read_text()
            if moved and json.loads(moved) != holder:
                # Another job was faster: this is its new lock.
                with contextlib.suppress(FileExistsError):
                    os.link(grave, self.path)
            grave.unlink()

    def renew(self) -> bool:
        """Renews the heartbeat; False when the lock is no longer this job's."""
        try:
            if self.path.read_text() != self.text:
                return False
            os.utime(self.path)
        except FileNotFoundError:
            return False
        except OSError:
            # A network file system that is away for a moment; the next beat will tell.
            return True
        return True

    def release(self) -> None:
        """Removes the lock if it is still this job's."""
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.text:
                self.path.unlink()


def is_abandoned(path: Path, holder: dict[str, Any], job: str) -> bool:
    """Whether the holder is dead, has renewed no heartbeat for STALE_S, or belongs to this job."""
    if holder.get("job") == job:
        return True
    if holder.get("host") == socket.gethostname():
        try:
            return start_of(holder["pid"]) != holder.get("process_started")
        except psutil.NoSuchProcess:
            return True
    try:
        return file_system_time(path.parent) - path.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return True


def file_system_time(folder: Path) -> float:
    """The clock of the file system of `folder`, which may be another machine's; seconds."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
