"""Temporary directories that are renamed when they are complete, and what kills leave of them."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil
import xxhash

from sft_fast.runtime.processes import process_space
from sft_fast.runtime.run_lock import file_system_time

OLD_S = 24 * 3600
"""Age at which what another machine, or another container, has left is removed; seconds."""


def make_workplace(folder: Path, kind: str) -> Path:
    """Makes a directory in `folder`, which is made too, and removes those whose process is gone.

    Args:
        folder: where it will be renamed.
        kind: begins its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead(folder, kind)
    path = Path(tempfile.mkdtemp(prefix=f".{kind}-{own_space()}-{os.getpid()}-", dir=folder))
    # tempfile keeps others out, who may share what becomes of it.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o777 & ~mask)
    return path


def remove_dead(folder: Path, kind: str) -> None:
    """Removes the directories of this kind that nobody works in any more."""
    for path in folder.glob(f".{kind}-*"):
        match = re.fullmatch(rf"\.{kind}-(.*)-(\d+)-[^-]*", path.name)
        if match and match[1] == own_space():
            is_dead = not psutil.pid_exists(int(match[2]))
        else:
            try:
                # Whoever works in it writes to its files.
                written = max(part.stat().st_mtime for part in (path, *path.iterdir()))
                is_dead = file_system_time(folder) - written > OLD_S
            except FileNotFoundError:
                # Its own process was faster.
                continue
        if is_dead:
            shutil.rmtree(path, ignore_errors=True)


def own_space() -> str:
    """A short name of the processes that this one can see by their ids."""
    return xxhash.xxh3_64_hexdigest(process_space().encode())
