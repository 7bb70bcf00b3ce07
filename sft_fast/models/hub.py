"""Finds a model or tokenizer: a local directory as it is, a hub id through huggingface_hub."""

import re
from pathlib import Path

from sft_fast.errors import first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# No pickled weights and no Python: only what we read.
SMALL_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
PATTERNS = [*SMALL_PATTERNS, "*.safetensors"]
# Mistral's own form of the same weights, beside transformers'.
IGNORED_PATTERNS = ["consolidated*.safetensors"]


def local_folder(path: str, revision: str | None, key: str, with_weights: bool = True) -> Path:
    """Returns a directory with the files of `path`, downloading them when it is a hub id.

    Args:
        path: a directory, or a hub id such as `org/name`.
        revision: branch, tag or commit of a hub id.
        key: the config key that holds `path`, for the message.
        with_weights: False = download configuration and tokenizer only.

    Raises:
        ValueError: neither a directory nor a repository that the hub gives us.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        raise ValueError(
            f"{key}: {path} is not a directory; expected one, or a hub id like org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = PATTERNS if with_weights else SMALL_PATTERNS
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=IGNORED_PATTERNS,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{key}: {path} is neither a local directory nor available from the hub: {reason}"
        ) from None
