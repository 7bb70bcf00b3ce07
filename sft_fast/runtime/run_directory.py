"""Which directory a run may write into: an empty one, or its own. Nothing here imports torch."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from sft_fast.runtime.launch_files import HALF_WRITTEN
from sft_fast.runtime.run_files import list_checkpoints
from sft_fast.runtime.run_lock import LOCK_FILE

RUN_MARKER = ".sft_fast"
SHOWN_NAMES = 3
# Behind them nobody keeps what a run would replace: what is printed often goes to such a file.
LOG_SUFFIXES = (".log", ".out", ".err")
# A token store, one that is being built, the records that were left out.
STORE_NAME = re.compile(r"[0-9a-f]{32}-\d+(\..*)?|\.(building|damaged)-.*")


def claim(folder: Path) -> None:
    """Makes a directory the run's own.

    Raises:
        ValueError: it cannot be written, or holds files of others.
    """
    check_output_dir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_MARKER).touch()


def check_output_dir(folder: Path) -> None:
    """Raises ValueError unless a run can write to `folder`, or make it, and harms nobody there."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"output_dir: {existing} is a file; expected a directory")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        free = shutil.disk_usage(existing).free
        raise ValueError(
            f"output_dir: nothing can be written to {existing}: {error.strerror} ({free:,} bytes "
            "free); choose another output_dir"
        ) from None
    if foreign := foreign_names(folder):
        shown = ", ".join(foreign[:SHOWN_NAMES]) + (", ..." if foreign[SHOWN_NAMES:] else "")
        raise ValueError(
            f"output_dir: {folder} holds files that no run made: {shown}; a run replaces what is "
            "in its directory. Choose a new directory, or if this was a run's, make it so: "
            f"touch {folder / RUN_MARKER}"
        )


def foreign_names(folder: Path) -> list[str]:
    """What is in a directory that is not a run's own."""
    if not folder.is_dir():
        return []
    foreign = sorted(path.name for path in folder.iterdir() if not is_harmless(path))
    # After the names were read: another rank may make the marker at any time.
    if (folder / RUN_MARKER).exists() or list_checkpoints(folder / "checkpoints"):
        return []
    return foreign


def is_harmless(path: Path) -> bool:
    """Whether a run may begin beside a path: ranks begin at the same time, and logs before it."""
    name = path.name
    if name in (LOCK_FILE, ".launch") or any(path.match(text) for text in HALF_WRITTEN):
        return True
    if name == "data" and path.is_dir():
        # `plan` and `data-report` prepare the data before the run.
        return all(STORE_NAME.fullmatch(entry.name) for entry in path.iterdir())
    return path.suffix in LOG_SUFFIXES and path.is_file()


def check_inputs(output: Path, inputs: dict[str, str | None]) -> None:
    """Refuses to read a model from where the run is going to write one.

    Args:
        output: the run's directory.
        inputs: key of the configuration -> path or hub id.

    Raises:
        ValueError: one of them is the run's own export.
    """
    made = [(output / name).resolve() for name in ("export", "adapter")]
    for key, path in inputs.items():
        if path is not None and any(Path(path).resolve().is_relative_to(one) for one in made):
            raise ValueError(
                f"{key}: {path} is in output_dir, and the run replaces it with its own export; "
                "choose another output_dir"
            )
