"""Files through which the ranks of a launch, and the user, see each other. No import of torch.

<output_dir>/.launch/<id>/  of one start of all ranks: what each does, which failed first
<output_dir>/status.json    where the run stands, renewed by rank 0
<output_dir>/error.json     the first failure: rank, phase, cause
<output_dir>/stacks/        stacks of every rank that saw a hang
"""

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from sft_fast.files import read_json, write_first, write_json
from sft_fast.runtime.mapped_files import list_mapped
from sft_fast.runtime.processes import (
    age_of,
    is_alive,
    launcher_pid,
    process_space,
    start_of,
)
from sft_fast.runtime.run_lock import file_system_time

PUBLISH_S = 2.0
RANKS_THAT_WRITE_PER_S = 50
OLD_LAUNCH_S = 60.0
HALF_WRITTEN = (".status.json.*", ".error.json.*", ".config.yaml.*", ".lock-*")
ANNOUNCEMENTS = ("failed", "left")


class LaunchFiles:
    """One rank's view of the files of its launch.

    Attributes:
        phase: what this process does; named in every report.
        progress: figures for every report.
    """

    def __init__(self, output: Path):
        self.output = output
        env = os.environ
        self.rank, self.world_size = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
        first = self.rank - number_of("LOCAL_RANK", 0)
        local = range(first, first + number_of("LOCAL_WORLD_SIZE", 1))
        self.unmet = {rank for rank in local if rank != self.rank}
        """Ranks of this machine that have not shown themselves yet."""
        self.met: dict[int, dict[str, Any]] = {}
        self.publish_every_s = max(PUBLISH_S, self.world_size / RANKS_THAT_WRITE_PER_S)
        self.launch, self.job = launch_name()
        self.folder = output / ".launch" / self.launch
        self.launcher = launcher_pid()
        self.started = time.time()
        is_launched = "TORCHELASTIC_RUN_ID" in env
        self.launched_ago_s = age_of(self.launcher) if is_launched else 0.0
        self.publish_lock = threading.Lock()
        self.phase = "start"
        self.progress: dict[str, Any] = {}
        self.stale: dict[str, dict[str, Any]] = {}
        """Announcements of an earlier launch that had the same name."""

    @property
    def num_elsewhere(self) -> int:
        """Ranks on other machines."""
        return self.world_size - len(self.met) - len(self.unmet) - 1

    def open(self) -> None:
        """Makes the launch's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # By the clock of the file system: those of the machines may differ.
        launched = file_system_time(self.folder) - self.launched_ago_s
        for name in ANNOUNCEMENTS:
            record = read_json(self.folder / name)
            if record is not None and written_at(self.folder / name) < launched:
                self.stale[name] = record

    def tidy(self) -> None:
        """Removes what earlier launches left; this launch's other ranks may be here already."""
        old = [path for path in self.folder.parent.glob("*") if path != self.folder]
        # What a kill left between writing a file and giving it its name.
        for pattern in HALF_WRITTEN:
            old += self.output.glob(pattern)
        now = file_system_time(self.output)
        for path in old:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= now - OLD_LAUNCH_S:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        (self.output / "error.json").unlink(missing_ok=True)
        shutil.rmtree(self.output / "stacks", ignore_errors=True)

    # --- this rank

    def record(self) -> dict[str, Any]:
        """This rank's state, for files and reports."""
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "space": process_space(),
            "launcher": self.launcher,
            "phase": self.phase,
            "time": time.time(),
            "launch": self.launch,
            **self.progress,
        }

    def publish(self, state: str) -> None:
        """Writes `record` for the other ranks."""
        # Two threads publish: what is newer must not be replaced by what is older.
        with self.publish_lock, contextlib.suppress(OSError):
            write_json(self.path_of(self.rank), self.record() | {"state": state})

    def write_status(self, state: str, **more: Any) -> None:
        """Writes status.json; its `heartbeat` is renewed every two seconds while the run lives."""
        done = {"job": self.job, "started": self.started, "heartbeat": time.time()}
        with contextlib.suppress(OSError):
            write_json(
                self.output / "status.json", {"state": state, **self.record(), **done, **more}
            )

    def announce(self, name: str, record: dict[str, Any]) -> bool:
        """Makes the file `name`; False where another rank was first."""
        path = self.folder / name
        try:
            if self.stale.get(name) is not None and read_json(path) == self.stale[name]:
                path.unlink(missing_ok=True)
            return write_first(path, json.dumps(record, indent=2))
        except OSError:
            return True  # a full disk must not hide the failure

    def list_mapped(self, files: Iterable[Path]) -> None:
        """Writes down what this rank maps, for who finds it ended by SIGBUS."""
        list_mapped(self.folder, self.rank, files)

    # --- the others

    def path_of(self, rank: int) -> Path:
        """The file of a rank's `record`."""
        return self.folder / f"rank_{rank:05d}.json"

    def announced(self, name: str) -> dict[str, Any] | None:
        """The announcement of another rank of this launch; None = there is none."""
        record = read_json(self.folder / name)
        if record is None or record == self.stale.get(name):
            return None
        # Not by process id: ranks in containers have the same ones.
        return record if record.get("reported_by", record["rank"]) != self.rank else None

    def peers(self) -> list[tuple[int, dict[str, Any]]]:
        """The newest records of all other ranks."""
        paths = sorted(self.folder.glob("rank_*.json"))
        records = [(int(path.stem.removeprefix("rank_")), read_json(path)) for path in paths]
        return [(rank, peer) for rank, peer in records if peer is not None and rank != self.rank]

    def silent_peers(self, limit_s: float) -> list[int]:
        """The ranks whose records are older than this rank's by `limit_s` or more."""
        now = written_at(self.path_of(self.rank))
        ages = {rank: now - written_at(self.path_of(rank)) for rank, _ in self.peers()}
        return [rank for rank, age in ages.items() if age > limit_s]

    def lost_peers(self, limit_s: float) -> dict[int, dict[str, Any]]:
        """The last records of silent ranks that have not said they were done."""
        silent = self.silent_peers(limit_s)
        found = {rank: peer for rank, peer in self.peers() if rank in silent}
        return {rank: peer for rank, peer in found.items() if peer.get("state") != "done"}

    def meet(self) -> None:
        """Remembers the ranks on this machine that one process started."""
        for rank in sorted(self.unmet):
            peer = read_json(self.path_of(rank))
            # A file of an earlier start has another one.
            if peer is not None and peer.get("launcher") == self.launcher:
                self.met[rank] = peer
                self.unmet.remove(rank)

    def dead_peers(self) -> list[tuple[int, dict[str, Any]]]:
        """The ranks on this machine that ended without a record of it."""
        dead = []
        for rank, peer in self.met.items():
            if not is_alive(peer["pid"]):
                last = read_json(self.path_of(rank)) or peer
                if last["pid"] == peer["pid"] and last["state"] != "done":
                    dead.append((rank, last))
        return dead


def number_of(variable: str, default: int) -> int:
    """A number that torchrun gives its ranks; ValueError where it is none."""
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment has {variable}={text}, expected a whole number; unset it, or start "
            "with `sft_fast train`, which sets it"
        ) from None


def launch_name() -> tuple[str, str]:
    """(name of this start of all ranks, name of the job that its restarts share).

    All ranks give the same first name. The second is rank 0's alone; torchrun calls a job "none"
    unless it is told a name, so there it is the launcher that makes the job.
    """
    env = os.environ
    is_launched = "TORCHELASTIC_RUN_ID" in env
    pid = launcher_pid() if is_launched else os.getpid()
    process = f"{xxhash.xxh3_64_hexdigest(process_space().encode())}-{pid}-{start_of(pid):.0f}"
    if not is_launched:
        return f"process-{process}", f"process-{process}"
    run = env["TORCHELASTIC_RUN_ID"]
    name = f"{run}-{env.get('MASTER_ADDR', '')}-{env.get('MASTER_PORT', '')}"
    name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    launch = f"{name}-attempt{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return launch, name if run != "none" else f"{name}-{process}"


def written_at(path: Path) -> float:
    """When a file was written, by the clock of its file system; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
