"""Where the tokenizer and the architecture of a configuration are; needs no torch.

`check` looks at what is on this machine, every other command and the trainer download the rest: one
rule says what is meant by a path, which files it must have, and which vocabulary the model gets.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sft_fast.config.sections import LoraConfig, ModelConfig, TokenizerConfig
from sft_fast.errors import ConfigError, Problem
from sft_fast.files import read_json
from sft_fast.models.architecture import (
    Architecture,
    architecture_from_hf,
    architecture_from_shape,
    read_hf_config,
)
from sft_fast.models.hub import known_folder, local_folder

Fetch = Callable[[str, str | None, str, bool], Path]
"""As `hub.local_folder`: path, revision, key and whether weights are wanted to a directory."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them is in every directory of a tokenizer."""


def model_folder(
    model: ModelConfig, fetch: Fetch | None = None, with_weights: bool = False
) -> Path | None:
    """The Hugging Face directory of the model; None for `model.shape`.

    Args:
        model: section of the configuration.
        fetch: finds directories; None = `local_folder`.
        with_weights: False = config.json and tokenizer will do.

    Raises:
        ConfigError: there is none.
    """
    if model.path is None:
        return None
    return (fetch or local_folder)(model.path, model.revision, "model.path", with_weights)


def tokenizer_source(
    tokenizer: TokenizerConfig, folder: Path | None, fetch: Fetch | None = None
) -> str:
    """The directory of the tokenizer, or "demo", as `load_tokenizer` takes it.

    Args:
        tokenizer: section of the configuration.
        folder: from `model_folder`, whose tokenizer is the default.
        fetch: finds directories; None = `local_folder`.

    Raises:
        ConfigError: there is none, or it has no tokenizer.
    """
    key, path = "tokenizer.path", tokenizer.path
    if path == "demo":
        return path
    if path is None:
        assert folder is not None, "the configuration demands a tokenizer for model.shape"
        key = "model.path"
    else:
        folder = (fetch or local_folder)(path, None, key, False)
    check_tokenizer_files(folder, key)
    return str(folder)


def check_tokenizer_files(folder: Path, key: str) -> None:
    """Raises ConfigError where a directory, which `key` names, has no tokenizer."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    raise ConfigError(
        [
            Problem(
                (key,),
                f"{folder} has no tokenizer.json",
                "a fast tokenizer",
                "tokenizer.path=<directory or hub id of one>",
            )
        ]
    )


def file_token_ids(folder: Path) -> dict[str, int] | None:
    """Token -> id, as tokenizer.json says; None where there is none or it is of another form."""
    state = read_json(folder / "tokenizer.json")
    model = (state or {}).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        return None
    vocab = model["vocab"]
    if isinstance(vocab, list):  # of pieces and their scores
        vocab = {piece[0]: number for number, piece in enumerate(vocab)}
    assert state is not None
    return vocab | {entry["content"]: entry["id"] for entry in state.get("added_tokens") or ()}


def read_architecture(model: ModelConfig, folder: Path | None, num_tokens: int) -> Architecture:
    """The architecture that config.json or `model.shape` describes.

    Args:
        model: section of the configuration.
        folder: from `model_folder`.
        num_tokens: of the tokenizer, whose vocabulary a model of `model.shape` has.

    Raises:
        ConfigError: the model is not supported.
    """
    if folder is None:
        assert model.shape is not None, "the configuration demands one of the two"
        return architecture_from_shape(model.shape, num_tokens)
    try:
        return architecture_from_hf(read_hf_config(folder))
    except ValueError as error:
        found = str(error).removeprefix("model.path: ")
        raise ConfigError([Problem(("model.path",), found, "a supported model")]) from None


def with_tokens(
    known: Architecture, new: range, model: ModelConfig, lora: LoraConfig
) -> Architecture:
    """An architecture with a vocabulary that has room for the tokens of the tokenizer.

    Tokens beyond the vocabulary that the tokenizer had before are no problem until one occurs;
    those that the configuration adds are there to occur.

    Args:
        known: what config.json or `model.shape` says.
        new: ids that `tokenizer.add_tokens` made, which end at the number of ids.
        model: section of the configuration.
        lora: section of the configuration.

    Raises:
        ConfigError: tokens are new to the model, and the configuration does not say so.
    """
    fresh = new_rows(known.vocab_size, new, model)
    if not fresh:
        return known
    if model.new_embeddings == "error":
        raise ConfigError(
            [
                Problem(
                    ("tokenizer.add_tokens", "model.new_embeddings"),
                    f"{len(fresh)} tokens that the model has no trained embeddings of, of "
                    f"{new.stop}; its vocab_size is {known.vocab_size}",
                    "the model's own tokens",
                    f"if it is to learn {len(fresh)} more tokens: model.new_embeddings=mean",
                )
            ]
        )
    if lora.rank > 0:
        raise ConfigError(
            [
                Problem(
                    ("lora.rank", "model.new_embeddings"),
                    f"{lora.rank}: the embeddings of {len(fresh)} new tokens would never be "
                    "trained",
                    "all weights trained, or the model's own tokens",
                    "lora.rank=0",
                )
            ]
        )
    return replace(known, vocab_size=max(known.vocab_size, fresh.stop))


def new_rows(vocab_size: int, new: range, model: ModelConfig) -> range:
    """Rows of the embedding that were never trained, and are to be.

    Args:
        vocab_size: of the model.
        new: as for `with_tokens`.
        model: section of the configuration.
    """
    if model.path is None:
        return range(0)  # the vocabulary is the tokenizer's
    if model.new_embeddings == "mean":
        return range(min(new.start, vocab_size), new.stop) if new else range(vocab_size, new.stop)
    if model.random_init and new.stop <= vocab_size:
        return range(0)
    return new


def known_architecture(model: ModelConfig) -> Architecture | None:
    """The architecture that can be told without the network, with a vocabulary of at least 1.

    None: it would have to be downloaded, or cannot be trained; whoever loads it says why.
    """
    try:
        folder = None
        if model.path is not None:
            folder = known_folder(model.path, model.revision, "model.path")
            if folder is None:
                return None
        return read_architecture(model, folder, num_tokens=1)
    except ConfigError:
        return None
