"""Whether a token store still is what was written, found out once a node and remembered."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from sft_fast.data.store import STORE_VERSION, TokenStore, open_store, read_meta
from sft_fast.errors import DamageError
from sft_fast.runtime.manifest import hash_file
from sft_fast.runtime.remembered import recall, remember, signature

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
    hashes: dict[str, str] = read_meta(path)["xxh3_128"]
    files = signature(path / f"{name}.bin" for name in hashes)
    digest = xxhash.xxh3_128_hexdigest("".join(hashes.values()).encode())
    if recall(path, files) == digest:
        return
    for name, expected in hashes.items():
        file = path / f"{name}.bin"
        found = hash_file(file, file.name).xxh3_128
        if found != expected:
            raise DamageError(f"{file} is damaged: expected xxh3_128 {expected}, found {found}")
    remember(path, files, digest)


def remove(path: Path) -> None:
    """Deletes a store; of several processes that try, one succeeds."""
    aside = path.with_name(f".damaged-{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
