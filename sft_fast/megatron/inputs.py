"""What a run starts from: tokenizer, token stores, architecture and weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_fast.architecture import (
    Architecture,
    architecture_from_hf,
    architecture_from_shape,
    architecture_to_hf,
    read_hf_config,
)
from sft_fast.config import Config
from sft_fast.data.build import BuildOptions, prepare_store
from sft_fast.data.source import Rows, load_rows
from sft_fast.data.store import TokenStore
from sft_fast.data.tokenizer import load_tokenizer
from sft_fast.hub import local_folder
from sft_fast.megatron.hf import RandomSource, SafetensorsSource, WeightSource
from sft_fast.megatron.parallel import once_per_node


@dataclass(frozen=True)
class Model:
    """The model before training."""

    architecture: Architecture
    weights: WeightSource
    folder: Path | None
    """Its Hugging Face directory; None for a model that begins with this run."""
    hf_config: dict[str, Any]
    """The config.json of its export."""


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads."""

    tokenizer: Any
    store: TokenStore
    eval_store: TokenStore | None
    eval_rows: Rows | None
    model: Model


def read_inputs(config: Config) -> Inputs:
    """Reads what `config` names; token stores are built first where they are missing.

    Raises:
        ValueError: a file, a row, the tokenizer or the model is not what it should be.
    """
    model_folder = None
    if config.model.path is not None:
        model_folder = fetch(config.model.path, config.model.revision, "model.path")
    tokenizer = read_tokenizer(config, model_folder)
    model = read_model(config, model_folder, len(tokenizer))
    data = config.data
    rows = find_rows("data.train", data.train, data.train_split, evaluation=False)
    store = read_store("data.train", rows, config, tokenizer)
    eval_rows, eval_store = None, None
    if data.eval is not None:
        eval_rows = find_rows("data.eval", data.eval, data.eval_split, evaluation=True)
        eval_store = read_store("data.eval", eval_rows, config, tokenizer)
    return Inputs(tokenizer, store, eval_store, eval_rows, model)


def fetch(path: str, revision: str | None, key: str) -> Path:
    """Finds a directory or hub id; one rank per node downloads."""
    once_per_node(key, lambda: local_folder(path, revision, key))
    return local_folder(path, revision, key)


def read_tokenizer(config: Config, model_folder: Path | None) -> Any:
    path, template = config.tokenizer.path, config.tokenizer.chat_template
    if path == "demo":
        return load_tokenizer("demo", template)
    if path is None:
        assert model_folder is not None, "the config demands a tokenizer for a model without path"
        return load_tokenizer(str(model_folder), template)
    return load_tokenizer(str(fetch(path, None, "tokenizer.path")), template)


def read_model(config: Config, folder: Path | None, num_tokens: int) -> Model:
    """Reads architecture and weights.

    Raises:
        ValueError: the model is not supported, or the tokenizer has ids the model does not know.
    """
    if folder is None:
        assert config.model.shape is not None, "the config demands model.path or model.shape"
        architecture = architecture_from_shape(config.model.shape, num_tokens)
        weights = RandomSource(architecture, config.seed)
        return Model(architecture, weights, None, architecture_to_hf(architecture))
    hf_config = read_hf_config(folder)
    architecture = architecture_from_hf(hf_config)
    if num_tokens > architecture.vocab_size:
        raise ValueError(
            f"tokenizer.path: the tokenizer has {num_tokens} tokens, but vocab_size of "
            f"{folder / 'config.json'} is {architecture.vocab_size}; use the model's own tokenizer"
        )
    if config.packing.capacity > architecture.max_position_embeddings:
        raise ValueError(
            f"packing.capacity is {config.packing.capacity}, but max_position_embeddings of "
            f"{folder / 'config.json'} is {architecture.max_position_embeddings}; lower it"
        )
    window = architecture.sliding_window
    if window is not None and config.packing.capacity > window:
        raise ValueError(
            f"packing.capacity is {config.packing.capacity}, but {folder / 'config.json'} has a "
            f"sliding_window of {window} tokens, which only matters to longer rows and is not "
            "supported there; lower it"
        )
    if config.model.random_init:
        return Model(architecture, RandomSource(architecture, config.seed), folder, hf_config)
    return Model(architecture, SafetensorsSource(folder, architecture), folder, hf_config)


def find_rows(key: str, source: str, split: str | None, evaluation: bool) -> Rows:
    try:
        return load_rows(source, split, evaluation=evaluation)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def read_store(key: str, rows: Rows, config: Config, tokenizer: Any) -> TokenStore:
    """Opens the token store of `rows`; one rank per node builds it where it is missing."""
    options = BuildOptions(
        capacity=config.packing.capacity,
        over_length=config.data.over_length,
        on_bad_row=config.data.on_bad_row,
        fields=config.data.fields,
    )
    cache = config.data.cache_dir or os.path.join(config.output_dir, "data")
    arguments = (rows, config.data.format, tokenizer, options, cache)

    def prepare() -> None:
        prepare_store(*arguments)

    once_per_node(key, prepare)
    return prepare_store(*arguments)
