"""Loads a tokenizer with the chat template that the run will use, and fingerprints it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sft_fast.data.templates import chat_template as find_template
from sft_fast.data.templates import check_control_tokens, fitted_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = frozenset(("tokenizer.json", "tokenizer.model"))
logger = logging.getLogger(__name__)


def load_tokenizer(
    path: str,
    chat_template: str | None = None,
    revision: str | None = None,
    add_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer whose `chat_template` is the one to train with, and to export.

    Args:
        path: directory, hub name, or "demo".
        chat_template: path of a Jinja file, or name of one of our templates, that replaces the
            tokenizer's.
        revision: hub revision.
        add_tokens: special tokens to add, where the tokenizer does not have them.

    Raises:
        ValueError: it cannot be loaded, or it is not a fast tokenizer (character offsets are
            needed), or its tokens have other ids than its file says, or the template file is
            missing or has special tokens it does not know.
    """
    tokenizer = _load(path, revision)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer.path: {path} gives a slow tokenizer ({type(tokenizer).__name__}); "
            "expected one with a tokenizer.json"
        )
    _check_ids(Path(path) / "tokenizer.json", tokenizer)
    # add_tokens counts those that are in the vocabulary already, too.
    known = tokenizer.get_vocab()
    tokenizer.num_new_tokens = len({token for token in add_tokens if token not in known})
    tokenizer.add_tokens(list(add_tokens), special_tokens=True)
    if chat_template is not None:
        tokenizer.chat_template = find_template(chat_template, tokenizer)
        check_control_tokens(chat_template, tokenizer)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = fitted_template("chatml", tokenizer)
        logger.warning("the tokenizer %s has no chat template: using the embedded ChatML", path)
    return tokenizer


def _check_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where added tokens have other ids than in their file.

    `tokenizers` closes a gap between them without a word, and the rows of the embedding stay.
    """
    if not path.is_file():
        return
    for token in json.loads(path.read_text(encoding="utf-8")).get("added_tokens", []):
        found = tokenizer.convert_tokens_to_ids(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"tokenizer.path: {path} gives {token['content']!r} the id {token['id']}, but it "
                f"is loaded as {found}; put back the added tokens that are missing before it"
            )


def new_token_ids(tokenizer: Any) -> range:
    """The ids of those of `add_tokens` that the tokenizer did not have: its last ones.

    They end at the number of ids, of which there may be more than tokens.
    """
    num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    return range(num_ids - tokenizer.num_new_tokens, num_ids)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3_128 of what decides the token ids; the path and the chat template do not count."""
    state = tokenizer.backend_tokenizer.to_str()
    # In front stand truncation and padding, that the last call has left behind.
    start = state.find('"added_tokens":[')
    assert start > 0, "the tokenizer's JSON has its keys in another order"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps(special, sort_keys=True) + state[start:]
    return xxhash.xxh3_128_hexdigest(text.encode())


def _load(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    if path == "demo":
        from sft_fast.data.demo import demo_tokenizer

        return demo_tokenizer()
    from transformers import AutoTokenizer

    held = {file.name for file in Path(path).iterdir()} if os.path.isdir(path) else set()
    if "tekken.json" in held and not held & _TOKENIZER_FILES:
        raise ValueError(
            f"tokenizer.path: {path} holds tekken.json alone, which has no BOS, EOS and chat "
            "template that are known here; put the tokenizer.json and tokenizer_config.json of the "
            "model's repository for transformers beside it"
        )
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer.path: cannot load a tokenizer from {path!r}: {error}"
        ) from error
