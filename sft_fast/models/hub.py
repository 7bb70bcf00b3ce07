"""Directories of models and tokenizers: a local one as it is, a hub id through huggingface_hub."""

import re
from pathlib import Path

from sft_fast.errors import ConfigError, Problem, first_line, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# No pickled weights and no Python: only what we read.
SMALL_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
PATTERNS = [*SMALL_PATTERNS, "*.safetensors"]
# Mistral's own form of the same weights, beside transformers'.
IGNORED_PATTERNS = ["consolidated*.safetensors"]


def local_folder(path: str, revision: str | None, key: str, with_weights: bool = True) -> Path:
    """The directory with the files of `path`; those of a hub id are downloaded.

    Args:
        path: a directory, or a hub id such as `org/name`.
        revision: branch, tag or commit of a hub id.
        key: the config key that holds `path`, for the message.
        with_weights: False = download configuration and tokenizer only.

    Raises:
        ConfigError: neither a directory nor a repository that the hub gives us.
    """
    patterns = PATTERNS if with_weights else SMALL_PATTERNS
    return _own_folder(path, key) or _snapshot(path, revision, key, patterns, only_cached=False)


def known_folder(path: str, revision: str | None, key: str) -> Path | None:
    """As `local_folder`, without the network: None for a hub id that would have to be downloaded.

    What is cached of a hub id may lack files that a run would download; see `is_downloaded`.

    Raises:
        ConfigError: neither a directory nor a hub id, or not cached and the hub is turned off.
    """
    folder = _own_folder(path, key)
    if folder is not None:
        return folder
    try:
        return _snapshot(path, revision, key, [], only_cached=True)
    except ConfigError:
        if not is_downloaded(path):
            raise
        return None


def is_downloaded(path: str) -> bool:
    """Whether a run downloads what this machine lacks of `path`."""
    from huggingface_hub import constants

    return not Path(path).expanduser().is_dir() and not constants.HF_HUB_OFFLINE


def _own_folder(path: str, key: str) -> Path | None:
    """The directory that is meant; None = a hub id is."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    is_local = folder.exists() or path.startswith((".", "/", "~"))
    if not is_local and HUB_ID.fullmatch(path):
        return None
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = nearest(folder.name, names)
    fix = f"did you mean {parent / near}?" if near else f"the path is right up to {parent}"
    expected = "a directory, or a hub id such as org/name"
    raise ConfigError([Problem((key,), f"{path} is not a directory", expected, fix)])


def _snapshot(
    path: str, revision: str | None, key: str, patterns: list[str], *, only_cached: bool
) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=IGNORED_PATTERNS,
                local_files_only=only_cached,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        # The hub's advice is about its own arguments.
        reason = "it is not cached, and HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            reason = first_line(error)
        found = f"{path} is neither a local directory nor available from the hub: {reason}"
        problem = Problem((key,), found, "a directory, or a hub id such as org/name")
        raise ConfigError([problem]) from None
