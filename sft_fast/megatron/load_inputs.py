"""What a run starts from: tokenizer, token stores, architecture and weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_fast.config.layout import check_layout
from sft_fast.config.schema import Config
from sft_fast.config.sections import DataConfig, LoraConfig, ModelConfig, TokenizerConfig
from sft_fast.data.build import Progress
from sft_fast.data.export_metadata import ExportMetadata, export_metadata
from sft_fast.data.from_config import find_sources, open_configured_store
from sft_fast.data.mixture import check_eval_is_not_train
from sft_fast.data.source import Source
from sft_fast.data.store import TokenStore, open_store
from sft_fast.data.tokenizer import load_tokenizer
from sft_fast.megatron.hf import GrownSource, RandomSource, SafetensorsSource, WeightSource
from sft_fast.megatron.parallel import check_equal_on_all_ranks, once_per_node
from sft_fast.models.architecture import (
    Architecture,
    architecture_from_hf,
    architecture_from_shape,
    architecture_to_hf,
    read_hf_config,
)
from sft_fast.models.hub import local_folder
from sft_fast.models.weights import check_weights

logger = logging.getLogger(__name__)


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
class ExportSource:
    """What an exported model comes from, its weights aside."""

    tokenizer: Any
    model: Model
    data: ExportMetadata


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads."""

    tokenizer: Any
    store: TokenStore
    eval_store: TokenStore | None
    eval_rows: list[Source] | None
    model: Model

    @property
    def origin(self) -> ExportSource:
        """What an export takes from the model that the run began with."""
        return ExportSource(self.tokenizer, self.model, export_metadata(self.store, self.tokenizer))


def read_inputs(config: Config, log: Progress = logger.info) -> Inputs:
    """Reads what `config` names; token stores are built first where they are missing.

    Args:
        config: the configuration.
        log: told about once a second how far this rank is with a store.

    Raises:
        ValueError: a file, a row, the tokenizer or the model is not what it should be.
    """
    tokenizer, model = read_start(config)
    rows, eval_rows = find_rows(config.data)
    store = read_store("data.train", rows, config, tokenizer, model.architecture, log)
    eval_store = None
    if eval_rows is not None:
        eval_store = read_store(
            "data.eval", eval_rows, config, tokenizer, model.architecture, log, apart_from=store
        )
    return Inputs(tokenizer, store, eval_store, eval_rows, model)


def read_export_source(
    config: Config, metadata: dict[str, Any], log: Progress = logger.info
) -> ExportSource:
    """Reads what an export needs beside the weights of a checkpoint.

    Args:
        config: of the export.
        metadata: of the data, as the checkpoint has it; {} in one that does not, and the data is
            read.
        log: as for `read_inputs`.

    Raises:
        ValueError: as `read_inputs`.
    """
    if not metadata:
        return read_inputs(config, log).origin
    # LoRA's are merged into the model's own weights; all others are in the checkpoint.
    tokenizer, model = read_start(config, needs_weights=config.lora.rank > 0)
    return ExportSource(tokenizer, model, ExportMetadata(**metadata))


def read_start(config: Config, needs_weights: bool = True) -> tuple[Any, Model]:
    """The tokenizer and the model before training.

    Args:
        config: the configuration.
        needs_weights: False = random ones will do.
    """
    folder = None
    if config.model.path is not None:
        path, revision = config.model.path, config.model.revision
        folder = fetch(path, revision, "model.path", needs_weights)
    tokenizer = read_tokenizer(config.tokenizer, folder)
    if folder is not None and not needs_weights:
        random = config.model.model_copy(update={"random_init": True})
        config = config.model_copy(update={"model": random})
    return tokenizer, read_model(config, folder, len(tokenizer))


def fetch(path: str, revision: str | None, key: str, with_weights: bool = True) -> Path:
    """Finds a directory or hub id; one rank per node downloads."""
    return once_per_node(key, lambda _: local_folder(path, revision, key, with_weights))


def read_tokenizer(tokenizer: TokenizerConfig, model_folder: Path | None) -> Any:
    """The tokenizer of the configuration, with its template and added tokens."""
    path, template = tokenizer.path, tokenizer.chat_template
    if path is None:
        assert model_folder is not None, "the config demands a tokenizer for a model without path"
        path = str(model_folder)
    elif path != "demo":
        path = str(fetch(path, None, "tokenizer.path"))
    return load_tokenizer(path, template, add_tokens=tokenizer.add_tokens)


def read_model(config: Config, folder: Path | None, num_tokens: int) -> Model:
    """Reads architecture and weights.

    Raises:
        ValueError: the model is not supported, or the tokenizer has ids the model does not know.
    """
    if folder is None:
        assert config.model.shape is not None, "the config demands model.path or model.shape"
        architecture = architecture_from_shape(config.model.shape, num_tokens)
        weights: WeightSource = RandomSource(architecture, config.seed)
        return Model(architecture, weights, None, architecture_to_hf(architecture))
    hf_config = read_hf_config(folder)
    architecture = architecture_from_hf(hf_config)
    num_known = architecture.vocab_size
    if num_tokens > num_known:
        check_growth(num_tokens, num_known, config.model, config.lora, folder)
        architecture = replace(architecture, vocab_size=num_tokens)
        hf_config["vocab_size"] = num_tokens
    check_layout(architecture, config.model, config.packing, config.parallel, config.lora)
    if config.model.random_init:
        return Model(architecture, RandomSource(architecture, config.seed), folder, hf_config)
    known = replace(architecture, vocab_size=num_known)
    check_weights(folder, hf_config, known)
    weights = SafetensorsSource(folder, known)
    if num_tokens > num_known:
        weights = GrownSource(weights, num_known, num_tokens)
    return Model(architecture, weights, folder, hf_config)


def check_growth(
    num_tokens: int, num_known: int, model: ModelConfig, lora: LoraConfig, folder: Path
) -> None:
    """Raises ValueError unless the config says that the model gets more tokens."""
    if model.new_embeddings == "error":
        raise ValueError(
            f"tokenizer.path: the tokenizer has {num_tokens} tokens, but vocab_size of "
            f"{folder / 'config.json'} is {num_known}; use the model's own tokenizer, or if it is "
            f"that with {num_tokens - num_known} more tokens, set model.new_embeddings=mean"
        )
    if lora.rank > 0:
        raise ValueError(
            f"lora.rank: the embeddings of {num_tokens - num_known} new tokens would never be "
            "trained; train all weights (lora.rank=0), or use the model's own tokens"
        )


def find_rows(data: DataConfig) -> tuple[list[Source], list[Source] | None]:
    """The sources of the training and of the evaluation data."""
    rows = find_sources(data, "train")
    assert rows is not None, "data.train is required"
    return rows, find_sources(data, "eval")


def read_store(
    key: str,
    rows: Sequence[Source],
    config: Config,
    tokenizer: Any,
    architecture: Architecture,
    log: Progress = logger.info,
    apart_from: TokenStore | None = None,
) -> TokenStore:
    """Opens the token store of `rows`; one rank per node builds it where it is missing.

    Args:
        key: the key of the configuration that names the rows.
        rows: the sources.
        config: the options.
        tokenizer: from `read_tokenizer`.
        architecture: of the model.
        log: told how far this rank is; the node's other ranks log it.
        apart_from: a store that may not have a sample of this one.

    Raises:
        ValueError: the rows cannot be used, or are in the other store as well.
    """

    def prepare(progress: Progress) -> Path:
        store = open_configured_store(config, rows, tokenizer, progress, architecture)
        if apart_from is not None and config.data.eval_overlap == "error":
            check_eval_is_not_train(apart_from, store)
        return store.path

    store = open_store(once_per_node(key, prepare, log))
    check_equal_on_all_ranks(f"fingerprint of {key}", store.fingerprint)
    return store
