"""Files that ranks read from mapped memory. Nothing here imports torch.

One that becomes shorter, or whose disk fails, ends the rank that touches it by SIGBUS, before it
can say anything. So each rank lists them for who finds it dead: another rank, or the launcher.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from sft_fast.files import read_json, write_json
from sft_fast.runtime.processes import process_space
from sft_fast.runtime.remembered import forget

LISTS = "mapped_*.json"
FIX = (
    "restore it (a token store is built anew when its directory is deleted), and rerun the same "
    "command to resume"
)


def list_mapped(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Writes down which files a rank maps, and their sizes.

    Args:
        folder: of the launch, see launch_files.py.
        rank: this one.
        files: what it maps.
    """
    sizes = {str(path.absolute()): path.stat().st_size for path in files}
    try:
        write_json(folder / f"mapped_{rank:05d}.json", {"space": process_space(), "bytes": sizes})
    except OSError:
        return  # a full disk; then nobody can name the file


def mapped_files(launches: Iterable[Path]) -> dict[Path, int]:
    """The files that ranks of this machine map, with the sizes that they had.

    Args:
        launches: folders of launches; what a later one says of a file counts.
    """
    found: dict[Path, int] = {}
    for folder in launches:
        for path in sorted(folder.glob(LISTS)):
            record = read_json(path)
            if record is not None and record.get("space") == process_space():
                found |= {Path(name): size for name, size in record["bytes"].items()}
    return found


def shortened(launches: Iterable[Path]) -> str:
    """Which mapped files are shorter than they were, in words; "" = none is."""
    texts = []
    for path, expected in mapped_files(launches).items():
        try:
            found = path.stat().st_size
        except OSError:
            continue  # who maps a deleted file still has it
        if found < expected:
            texts.append(f"{path} has {found:,} bytes, expected {expected:,}")
    return f"{'; '.join(texts)}: it was cut off while the run read it; {FIX}" if texts else ""


def after_bus_error(launches: Iterable[Path]) -> str:
    """What a rank of this machine that SIGBUS has ended may have touched, in words.

    What was found out about these files no longer counts: the next start hashes them.
    """
    launches = list(launches)
    files = mapped_files(launches)
    for folder in {path.parent for path in files}:
        forget(folder)
    if text := shortened(launches):
        return text
    for path in files:
        if (reason := unreadable(path)) is not None:
            return f"{path} cannot be read: {reason}; {FIX}"
    names = ", ".join(sorted({str(path.parent) for path in files})) or "data.cache_dir, model.path"
    return f"the disk did not answer for a file that it reads from memory, in {names}; {FIX}"


def unreadable(path: Path, step: int = 64 << 20) -> str | None:
    """Why a file's disk does not give some of its bytes; looks at its ends, and every `step`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            for place in (*range(0, size, step), max(size - 1, 0)):
                os.pread(descriptor, 1, place)
        finally:
            os.close(descriptor)
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    return None
