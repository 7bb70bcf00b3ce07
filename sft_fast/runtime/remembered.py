"""What was found out about files, remembered by this user on this node until the files change.

Files count as unchanged while device, inode, size and the times of their last change are the same.
"""

import os
import socket
from collections.abc import Iterable
from pathlib import Path

import xxhash

from sft_fast.files import read_json, write_json


def signature(files: Iterable[Path]) -> list[list[int]]:
    """Of each file: device, inode, size and times of the last change, in nanoseconds."""
    stats = [path.stat() for path in files]
    return [[s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]


def recall(subject: Path, files: list[list[int]]) -> str | None:
    """What `remember` was told of a path, if its files have not changed since."""
    record = record_of(subject)
    known = None if record is None else read_json(record)
    if known is None or known.get("files") != files or not isinstance(known.get("value"), str):
        return None
    value: str = known["value"]
    return value


def remember(subject: Path, files: list[list[int]], value: str) -> None:
    """Keeps a text about a path; where that is not possible it will be found out again.

    Args:
        subject: the path.
        files: their `signature` from before they were read.
        value: the text.
    """
    record = record_of(subject)
    if record is None:
        return
    try:
        write_json(record, {"path": str(subject), "files": files, "value": value})
    except OSError:
        return


def forget(subject: Path) -> None:
    """Drops what `remember` was told of a path."""
    record = record_of(subject)
    if record is not None:
        record.unlink(missing_ok=True)


def record_of(subject: Path) -> Path | None:
    """The file for a path; None = this user has no directory for it."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "sft_fast" / f"remembered-{os.getuid()}-{socket.gethostname()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # RuntimeError: a user without a home, as containers have them.
    except (OSError, RuntimeError):
        return None
    return folder / f"{xxhash.xxh3_128_hexdigest(os.fsencode(subject.resolve()))}.json"
