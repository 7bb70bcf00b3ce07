"""Whether a token store still is what was written, found out once a node and remembered."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from sft_fast.data.store import STORE_VERSION, TokenStore, open_store, read_meta
from sft_fast.errors import DamageError
from sft_fast.files import read_json, write_json
from sft_fast.runtime.manifest import hash_file

Say = Callable[[str], None]


def store_path(cache_dir: str | Path, fingerprint: str) -> Path:
    """Where a store is in a directory of stores; those of other versions are beside it."""
    return Path(cache_dir) / f"{fingerprint}-{STORE_VERSION}"


def open_whole(path: Path, say: Say | None = None) -> TokenStore | None:
    """Opens a store whose arrays are what was written.

    Args:
        path: from `store_path`.
        say: told of damage.

    Returns: None where there is no store. A damaged one is set aside, so that a run which reads it
        goes on, and deleted.

    Raises:
        OSError: the disk does not answer; the store may be whole, and stays.
    """
    if not path.exists():
        return None
    try:
        store = open_store(path)
        check_hashes(path)
    except ValueError as error:
        if say is not None:
            say(f"warning: {error}; it is built anew")
        remove(path)
        return None
    return store


def check_hashes(path: Path) -> None:
    """Compares the arrays of a store with their hashes, unless that was done on this node.

    Raises:
        DamageError: one is not what was written; names the file.
    """
    meta = read_meta(path)
    record = memory_of(path)
    seen = {"checksum": meta["xxh3_128"], "files": signature(path, meta)}
    if record is not None and read_json(record) == seen:
        return
    for name, expected in meta["xxh3_128"].items():
        file = path / f"{name}.bin"
        found = hash_file(file, file.name).xxh3_128
        if found != expected:
            raise DamageError(f"{file} is damaged: expected xxh3_128 {expected}, found {found}")
    # What was read may have been written meanwhile.
    if record is not None and seen["files"] == signature(path, meta):
        try:
            write_json(record, seen)
        except OSError:
            return  # the next start hashes again


def signature(path: Path, meta: dict[str, Any]) -> list[list[int]]:
    """Of each array: device, inode, size and times of the last change, in nanoseconds."""
    stats = [(path / f"{name}.bin").stat() for name in meta["bytes"]]
    return [[s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]


def memory_of(path: Path) -> Path | None:
    """Where this user remembers on this node that a store was whole; None = nowhere."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "sft_fast" / f"verified-{os.getuid()}-{socket.gethostname()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # RuntimeError: a user without a home, as containers have them.
    except (OSError, RuntimeError):
        return None
    key = xxhash.xxh3_128_hexdigest(os.fsencode(path.resolve()))
    return folder / f"{key}.json"


def remove(path: Path) -> None:
    """Deletes a store; of several processes that try, one succeeds."""
    aside = path.with_name(f".damaged-{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
