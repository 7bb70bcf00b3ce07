"""Directories that appear whole or not at all, with a manifest of their files' hashes.

A directory is written under a temporary name: every file is hashed and synced, manifest.json lists
them, and the last act is a rename. So a directory of the final name was complete once, and
`find_damage` tells whether it still is. Nothing here imports torch.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import xxhash

from sft_fast.files import sync_folder
from sft_fast.runtime.run_files import MANIFEST_FILE

TEMPORARY_PREFIX = ".incomplete_"
REPLACED_PREFIX = ".replaced_"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
SHARD_SUFFIX = ".safetensors"
CHUNK_BYTES = 16 << 20
# Fits into a core's cache, so that the file system copies what the hash has just read.
WRITE_BYTES = 1 << 20
PLAIN_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)

Value = TypeVar("Value")


class Exchange(Protocol):
    """How the ranks that write one directory tell each other how it went."""

    rank: int

    def all_gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's `value` (JSON), by rank; raises TimeoutError naming a rank that is late."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    name: str
    """Relative to its directory, with slashes."""
    num_bytes: int
    xxh3_128: str


class LaterVersionError(ValueError):
    """A manifest is of a later version than this code knows; what it lists may be whole."""


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest says."""

    file: Path
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


class HashedFile:
    """A new file that is hashed while it is written, and synced when it is closed."""

    def __init__(self, path: Path, name: str):
        self.path, self.name, self.num_bytes = path, name, 0
        self.hasher = xxhash.xxh3_128()
        self.num_started = 0
        """Bytes that the disk was told to write."""
        self.file: BinaryIO = path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes and hashes them."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            chunk = view[start : start + WRITE_BYTES]
            self.hasher.update(chunk)
            self.num_bytes += len(chunk)
            while chunk:
                chunk = chunk[self.file.write(chunk) :]
            if self.num_bytes - self.num_started >= CHUNK_BYTES:
                self.start_writing()

    def start_writing(self) -> None:
        """Has the disk begin: by itself it would wait until memory is full of what to write."""
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write what it is to forget, and keeps it until it is written.
            begin, count = self.num_started, self.num_bytes - self.num_started
            os.posix_fadvise(self.file.fileno(), begin, count, os.POSIX_FADV_DONTNEED)
        self.num_started = self.num_bytes

    def close(self) -> FileRecord:
        """Syncs the file; returns its size and hash."""
        os.fsync(self.file.fileno())
        self.file.close()
        return FileRecord(self.name, self.num_bytes, self.hasher.hexdigest())


class FileReader:
    """A file that is read from front to end, the disk ahead of the reader, and hashed if wanted.

    To be used in a `with`.
    """

    def __init__(self, path: Path, name: str, is_hashed: bool = False):
        """
        Args:
            path: the file.
            name: of its record.
            is_hashed: hash what passes by; what is left out between two parts is read too.
        """
        self.path, self.name = path, name
        self.hasher = xxhash.xxh3_128() if is_hashed else None
        self.position = self.asked = 0
        """What is before has been hashed; and the disk has been asked for."""
        self.descriptor = os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self.descriptor).st_size

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def read(self, begin: int, target: memoryview) -> None:
        """Fills memory with the bytes from `begin` on; later ones each time.

        Raises:
            OSError: the disk does not answer, or the file has become shorter.
        """
        is_new = self.hasher is not None and begin >= self.position
        if is_new:
            self.skip(begin)
        for start in range(0, len(target), WRITE_BYTES):
            part = target[start : start + WRITE_BYTES]
            self.read_part(begin + start, part)
            if is_new and self.hasher is not None:
                self.hasher.update(part)
        if is_new:
            self.position = begin + len(target)

    def read_part(self, begin: int, target: memoryview) -> None:
        """Fills memory; the disk goes on while that is looked at."""
        if begin + CHUNK_BYTES > self.asked and hasattr(os, "posix_fadvise"):
            self.asked = begin + 2 * CHUNK_BYTES
            os.posix_fadvise(self.descriptor, begin, 2 * CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
        while target:
            count = os.preadv(self.descriptor, [target], begin)
            if count == 0:
                text = f"ends at byte {begin:,}, expected {self.num_bytes:,} bytes"
                raise OSError(errno.EIO, text, str(self.path))
            target, begin = target[count:], begin + count

    def skip(self, end: int, progress: Callable[[], None] = lambda: None) -> None:
        """Hashes what comes before `end`; tells `progress` of each part."""
        buffer = memoryview(bytearray(min(WRITE_BYTES, max(end - self.position, 0))))
        while self.position < end:
            self.read(self.position, buffer[: end - self.position])
            progress()

    def finish(self, progress: Callable[[], None] = lambda: None) -> FileRecord:
        """Hashes the rest, where the file is hashed; returns what it is."""
        assert self.hasher is not None, "nobody wanted a hash"
        self.skip(self.num_bytes, progress)
        return FileRecord(self.name, self.num_bytes, self.hasher.hexdigest())


def hash_file(path: Path, name: str) -> FileRecord:
    """The size and hash of a file, which is read once."""
    with FileReader(path, name, is_hashed=True) as file:
        return file.finish()


def sync(path: Path) -> None:
    """Writes a file's content, or a directory's entries, through to the disk (fsync)."""
    if path.is_dir():
        sync_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StagedDirectory:
    """A directory while it is written; its files are this rank's share."""

    def __init__(self, path: Path):
        self.path = path
        self.records: list[FileRecord] = []

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[HashedFile]:
        """A new file, hashed while it is written."""
        file = HashedFile(self.path / name, name)
        try:
            yield file
            self.records.append(file.close())
        except OSError as error:
            # A failed write does not say of which file.
            error.filename = error.filename or str(file.path)
            raise
        finally:
            file.file.close()

    def write_text(self, name: str, text: str) -> None:
        """Writes a whole file."""
        with self.create(name) as file:
            file.write(text.encode())


@contextlib.contextmanager
def staged_directory(
    final: Path,
    exchange: Exchange,
    needed_bytes: int = 0,
    check: Callable[[Path], None] | None = None,
) -> Iterator[StagedDirectory]:
    """Writes the directory `final`; all ranks of `exchange` enter and leave together.

    Files that the body makes without `StagedDirectory.create` are hashed when it ends. An existing
    `final` is replaced only after the new one is complete.

    Args:
        final: the directory, which must not exist half.
        exchange: the ranks that write it.
        needed_bytes: what this rank is going to write; 0 = unknown.
        check: raises an error when what was written is not fit to get the name.

    Raises:
        OSError: on every rank, when what comes before or behind the body failed on one of them. An
            error of the body is raised at once: it should be one that `agree` told of, or end the
            run. What was written is removed.
        TimeoutError: a rank did not get here in the exchange's time limit.
    """
    stage = StagedDirectory(final.with_name(TEMPORARY_PREFIX + final.name))
    needed = sum(exchange.all_gather("size", needed_bytes))
    agree(exchange, "begin", on_main(exchange, lambda: prepare(stage.path, needed)))
    try:
        yield stage
        own = [[record.name, record.num_bytes, record.xxh3_128] for record in stage.records]
        shares = exchange.all_gather("written", own)
        records = [FileRecord(*item) for share in shares for item in share]
        agree(
            exchange,
            "complete",
            on_main(exchange, lambda: complete(stage.path, final, records, check)),
        )
    finally:
        if exchange.rank == 0:
            shutil.rmtree(stage.path, ignore_errors=True)


def on_main(exchange: Exchange, work: Callable[[], None]) -> Callable[[], None]:
    """The work on rank 0, nothing on the others."""
    return work if exchange.rank == 0 else lambda: None


def agree(exchange: Exchange, name: str, work: Callable[[], Value]) -> list[Value]:
    """Every rank's result of `work`; an error of any kind on one rank is an OSError on all."""
    value, cause, problem, number = None, None, None, 0
    try:
        value = work()
    except BaseException as error:  # the other ranks must hear of it, or they wait for this one
        cause, problem = error, explain(error)
        number = getattr(error, "errno", None) or errno.EIO
    answers = exchange.all_gather(name, [value, problem, number])
    for rank, (_, problem, number) in enumerate(answers):
        if problem is not None:
            raise OSError(number, f"rank {rank}: {problem}") from cause
    return [value for value, _, _ in answers]


def explain(error: BaseException) -> str:
    """The error with the path, and the free space where that is the reason."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    text = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename:
        folder = Path(error.filename).absolute().parent
        if folder.is_dir():
            text += f" ({room_in(folder)})"
    return text


def room_in(folder: Path) -> str:
    """What is left on the file system of a directory, in words."""
    system = os.statvfs(folder)
    text = f"{system.f_bavail * system.f_frsize:,} bytes free"
    # Some file systems count no files.
    return text + (", but no more files" if system.f_files and not system.f_favail else "")


def prepare(temporary: Path, needed_bytes: int) -> None:
    """Makes the empty temporary directory when there is room for `needed_bytes`."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_whatever(temporary)
    free = shutil.disk_usage(temporary.parent).free
    if needed_bytes > free:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes needed", str(temporary))
    temporary.mkdir()


def complete(
    temporary: Path,
    final: Path,
    records: list[FileRecord],
    check: Callable[[Path], None] | None,
) -> None:
    """Lists all files, syncs, and gives the directory its name."""
    known = {record.name: record for record in records}
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_dir():
            sync(path)
        elif name not in known:
            sync(path)
            known[name] = hash_file(path, name)
    manifest = HashedFile(temporary / MANIFEST_FILE, MANIFEST_FILE)
    manifest.write(manifest_text(known).encode())
    manifest.close()
    sync(temporary)
    if check is not None:
        check(temporary)
    replaced = set_aside(final) if final.exists() else None
    os.rename(temporary, final)
    sync(final.parent)
    if replaced is not None:
        remove_whatever(replaced)


def set_aside(folder: Path) -> Path:
    """Renames a directory, so that what a deletion leaves of it does not look whole; returns it."""
    aside = folder.with_name(REPLACED_PREFIX + folder.name)
    remove_whatever(aside)
    os.rename(folder, aside)
    return aside


def remove_directory(folder: Path) -> None:
    """Deletes a directory; what an interruption leaves of it does not have its name."""
    remove_whatever(set_aside(folder))


def remove_whatever(path: Path) -> None:
    """Deletes a directory, or what lies in its place: a file, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def manifest_text(records: dict[str, FileRecord]) -> str:
    """The manifest as JSON, with a checksum of itself."""
    files = {name: [r.num_bytes, r.xxh3_128] for name, r in sorted(records.items())}
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return (
        json.dumps({"version": MANIFEST_VERSION, "files": files, "checksum": checksum}, indent=1)
        + "\n"
    )


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files that `folder` must hold.

    Raises:
        LaterVersionError: this code does not know its version.
        ValueError: the manifest is missing, damaged, or names files outside `folder`.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        version = document.get("version")
        if isinstance(version, int) and version > MANIFEST_VERSION:
            raise LaterVersionError(
                f"{path} has format version {version}, this sft_fast reads {MANIFEST_VERSION}; use "
                "the version that wrote it, or a later one"
            )
        files = document["files"]
        records = {name: FileRecord(name, *entry) for name, entry in files.items()}
        is_ours = manifest_text(records) == text
    except LaterVersionError:
        raise
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a manifest, found none") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a manifest, found {explain(error)}") from None
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: expected a manifest, found damage ({error!r})") from None
    if not is_ours:
        raise ValueError(f"{path}: expected a manifest, found damage (checksum)")
    for name in records:
        if not PLAIN_NAME.fullmatch(name) or ".." in name.split("/"):
            raise ValueError(f"{path}: {name!r} is not a plain name inside the directory")
    return records


def find_damage(
    folder: Path,
    part: int = 0,
    num_parts: int = 1,
    is_hashed: Callable[[str], bool] = lambda name: True,
) -> list[Damage]:
    """Compares a directory with its manifest.

    Args:
        folder: the directory.
        part: number of this share of the files.
        num_parts: how many shares there are, so that ranks can divide the work.
        is_hashed: of which files, by name, the content is compared; of the others the size.

    Raises:
        LaterVersionError: this code does not know the version of the manifest.
    """
    try:
        records = read_manifest(folder)
    except LaterVersionError:
        raise
    except ValueError as error:
        why = str(error).partition(", found ")[2] or str(error)
        return [Damage(folder / MANIFEST_FILE, "a whole manifest", why)]
    found = (
        damage_of_file(folder, records[name], is_hashed(name))
        for name in share_of(records, part, num_parts)
    )
    return [damage for damage in found if damage is not None]


def share_of(names: Collection[str], part: int, num_parts: int) -> list[str]:
    """The files of one share: what rank N wrote is in share N, the shares being as many as then."""
    return sorted(names, key=lambda name: (not name.endswith(SHARD_SUFFIX), name))[part::num_parts]


def damage_of_file(folder: Path, record: FileRecord, is_hashed: bool) -> Damage | None:
    """What is wrong with a file of `folder`, in its size or also in its content."""
    path = folder / record.name
    expected = f"{record.num_bytes} bytes, xxh3_128 {record.xxh3_128}"
    try:
        if path.is_symlink() or not path.is_file():
            return Damage(path, expected, "no regular file")
        present = replace(record, num_bytes=path.stat().st_size)
        if is_hashed:
            present = hash_file(path, record.name)
    except OSError as error:
        return Damage(path, expected, explain(error))
    return difference(folder, record, present, is_hashed)


def difference(
    folder: Path, record: FileRecord, present: FileRecord, is_hashed: bool = True
) -> Damage | None:
    """The damage of a file of `folder` that is not what its record says; None = it is."""
    if present == record:
        return None
    expected = f"{record.num_bytes} bytes, xxh3_128 {record.xxh3_128}"
    text = f"{present.num_bytes} bytes" + (f", xxh3_128 {present.xxh3_128}" if is_hashed else "")
    return Damage(folder / record.name, expected, text)
