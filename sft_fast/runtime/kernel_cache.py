"""The cache of compiled kernels, private to the user. Nothing here imports torch or triton.

Whoever can write to it can run code as the user who reads it.
"""

import os
import socket
import stat
import sys
import tempfile
from pathlib import Path

VARIABLES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def use_private_cache() -> None:
    """Sets the cache of Triton and Inductor to a directory of this user and machine, unless set.

    Raises:
        ValueError: a cache belongs to another user, or others may write to it.
    """
    for variable, name in VARIABLES.items():
        if not os.environ.get(variable):
            os.environ[variable] = str(default_folder(name))
        check_private(Path(os.environ[variable]), variable)


def default_folder(name: str) -> Path:
    """A directory in the user's cache.

    Where that cannot be written, one in the directory for temporary files, with a warning.
    """
    leaf = f"{name}-{os.getuid()}-{socket.gethostname()}"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "sft_fast" / leaf
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    # RuntimeError: a user without a home, as containers have them.
    except (OSError, RuntimeError) as error:
        # Right in a directory where only the owner of an entry may rename it.
        other = Path(tempfile.gettempdir()) / f"sft_fast-{leaf}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: compiled kernels go to {other}: {error}", file=sys.stderr)
        return other


def check_private(folder: Path, variable: str) -> None:
    """Makes `folder` with mode 700; raises ValueError where another user can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{variable}: {folder} cannot be made: {error.strerror}; set {variable} to a directory "
            "of your own"
        ) from None
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ValueError(
            f"{variable}: {folder} belongs to user {status.st_uid} with mode "
            f"{stat.S_IMODE(status.st_mode):o}; kernels in it run as you, so it must be yours and "
            "not writable by others: chmod go-w, or another directory"
        )
