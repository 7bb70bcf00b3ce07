"""Files that are read and written whole: JSON objects, and files that appear in one step."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""How file systems say that they have no hard links."""

NO_FOLDER_SYNC = (*NO_LINKS, errno.EBADF, errno.EISDIR, errno.EACCES)
"""How file systems say that a directory cannot be synced."""


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or no whole object in it.

    Some file systems show a file that is being replaced as half-written for a moment.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any], mode: int = 0o666) -> None:
    """Writes a JSON object in one step; text stays readable in any language."""
    with write_atomically(path, mode) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


@contextlib.contextmanager
def write_atomically(path: Path, mode: int = 0o666) -> Iterator[TextIO]:
    """Opens a UTF-8 text file that gets its name when the block ends without an error.

    A reader sees the old file or the new one, never half of one; an error leaves nothing behind.
    Two threads or processes may write the same path: the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        # A file name that is no UTF-8 has lone surrogates: they are escapes of JSON and YAML too.
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_first(path: Path, text: str) -> bool:
    """Writes a UTF-8 text file that does not exist yet; False where it does.

    Of several processes one succeeds. Where the file system has links nobody sees a part of it.
    """
    temporary = path.with_name(f"{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _write_first_in_place(path, text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_first_in_place(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def sync_folder(path: Path) -> None:
    """Writes a directory's entries through to the disk, where its file system can (fsync)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
