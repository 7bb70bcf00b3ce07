"""What a run starts from: tokenizer, token stores, architecture and weights."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from sft_fast.config.layout import check_layout
from sft_fast.config.schema import Config
from sft_fast.config.sections import DataConfig, LoraConfig, ModelConfig
from sft_fast.data.build import BuildOptions, Progress
from sft_fast.data.export_metadata import ExportMetadata, export_metadata
from sft_fast.data.from_config import (
    build_options,
    find_sources,
    open_data_store,
    open_stream,
    stage_options,
)
from sft_fast.data.known_ids import check_store
from sft_fast.data.mixture import check_eval_is_not_train
from sft_fast.data.near_duplicates import with_choice
from sft_fast.data.source import Source
from sft_fast.data.store import REJECTED_FILE, TokenStore, open_store
from sft_fast.data.stream import SampleStream, TrainingData
from sft_fast.data.tokenizer import load_tokenizer, new_token_ids
from sft_fast.megatron.hf import (
    GrownSource,
    HeadSource,
    RandomSource,
    SafetensorsSource,
    WeightSource,
)
from sft_fast.megatron.join import agree
from sft_fast.megatron.parallel import once_per_node
from sft_fast.models.architecture import Architecture, architecture_to_hf, read_hf_config
from sft_fast.models.hub import local_folder
from sft_fast.models.locate import (
    model_folder,
    new_rows,
    read_architecture,
    tokenizer_source,
    with_tokens,
)
from sft_fast.models.router import check_router
from sft_fast.models.weights import check_weights
from sft_fast.stages import stage_of

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
    num_known: int
    """Tokens, from 0, whose embeddings come from there."""


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
    store: TrainingData
    eval_store: TokenStore | None
    eval_sources: list[Source] | None
    model: Model

    @property
    def origin(self) -> ExportSource:
        """What an export takes from the model that the run began with."""
        return ExportSource(self.tokenizer, self.model, export_metadata(self.store, self.tokenizer))

    def mapped_files(self) -> list[Path]:
        """What is read from mapped memory: the arrays of stores, and the weights of a model."""
        stores = [store for store in (self.store, self.eval_store) if isinstance(store, TokenStore)]
        files = [file for store in stores for file in store.array_files()]
        return files + sorted(self.model.folder.glob("*.safetensors") if self.model.folder else ())


def read_inputs(config: Config, log: Progress = logger.info) -> Inputs:
    """Reads what `config` names; token stores are built first where they are missing.

    Args:
        config: the configuration.
        log: told about once a second how far this rank is with a store.

    Raises:
        ValueError: a file, a record, the tokenizer or the model is not what it should be.
    """
    tokenizer, model = read_start(config)
    options = build_options(
        config.model, config.data, config.packing, model.architecture, stage_options(config)
    )
    sources, eval_sources = find_run_sources(config.data)
    store: TokenStore | None = None
    eval_store: TokenStore | None = None
    if not config.data.streaming:
        store = read_store(
            "data.train", sources, config.data, config.output_dir, tokenizer, options, log
        )
    if eval_sources is not None:
        eval_store = read_store(
            "data.eval",
            eval_sources,
            config.data,
            config.output_dir,
            tokenizer,
            options,
            log,
            apart_from=store,
        )
    vocab_size = model.architecture.vocab_size
    has_unknown = new_token_ids(tokenizer).stop > vocab_size
    for own in (store, eval_store):
        if own is not None and has_unknown:
            check_store(own, vocab_size)
    data = store or read_stream(
        sources,
        config.data,
        config.output_dir,
        config.seed,
        tokenizer,
        options,
        eval_store,
        vocab_size if has_unknown else None,
    )
    return Inputs(tokenizer, data, eval_store, eval_sources, model)


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

    Raises:
        ValueError: the tokenizer or the model is not what it should be, or does not fit.
    """
    model = config.model
    if model.path is not None and not needs_weights:
        model = model.model_copy(update={"random_init": True})
    folder = model_folder(model, fetch, with_weights=not model.random_init)
    source = tokenizer_source(config.tokenizer, folder, fetch)
    tokenizer = load_tokenizer(
        source, config.tokenizer.chat_template, add_tokens=config.tokenizer.add_tokens
    )
    read = read_model(model, config.lora, config.seed, folder, new_token_ids(tokenizer))
    check_layout(read.architecture, model, config.packing, config.parallel, config.lora)
    check_router(read.architecture, config.router, config.lora)
    num_outputs = stage_of(config).num_outputs
    if num_outputs is not None:
        read = with_head(read, num_outputs, config.seed)
    return tokenizer, read


def fetch(path: str, revision: str | None, key: str, with_weights: bool) -> Path:
    """Finds a directory or hub id; one rank per node downloads."""
    return once_per_node(key, lambda _: local_folder(path, revision, key, with_weights))


def read_model(
    model: ModelConfig, lora: LoraConfig, seed: int, folder: Path | None, new: range
) -> Model:
    """Reads architecture and weights.

    Args:
        model: section of the configuration.
        lora: section of the configuration.
        seed: of random weights.
        folder: the model's directory; None for `model.shape`.
        new: from `new_token_ids`.

    Raises:
        ValueError: the model is not supported, or gets tokens that it does not know.
    """
    known = read_architecture(model, folder, new.stop)
    architecture = with_tokens(known, new, model, lora)
    random = RandomSource(architecture, seed)
    if folder is None:
        hf_config = architecture_to_hf(architecture)
        return Model(architecture, random, None, hf_config, architecture.vocab_size)
    hf_config = read_hf_config(folder) | {"vocab_size": architecture.vocab_size}
    if model.random_init:
        return Model(architecture, random, folder, hf_config, architecture.vocab_size)
    check_weights(folder, hf_config, known)
    weights: WeightSource = SafetensorsSource(folder, known)
    fresh = new_rows(known.vocab_size, new, model)
    if fresh:
        weights = GrownSource(weights, known.vocab_size, fresh)
    num_known = fresh.start if fresh else known.vocab_size
    return Model(architecture, weights, folder, hf_config, num_known)


def with_head(model: Model, num_outputs: int, seed: int) -> Model:
    """The model with a random linear head in place of its LM head.

    Raises:
        ValueError: transformers has no class for what is exported.
    """
    kind = model.hf_config["model_type"]
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"model.path: the stage exports a sequence classifier, which transformers does not "
            f"have for {kind!r}; choose a model of another family"
        )
    hf_config = {
        **model.hf_config,
        "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[kind]],
        "id2label": {str(number): f"LABEL_{number}" for number in range(num_outputs)},
        "label2id": {f"LABEL_{number}": number for number in range(num_outputs)},
    }
    architecture = replace(model.architecture, num_outputs=num_outputs, tie_word_embeddings=False)
    weights = HeadSource(model.weights, architecture, seed)
    return replace(model, architecture=architecture, weights=weights, hf_config=hf_config)


def find_run_sources(data: DataConfig) -> tuple[list[Source], list[Source] | None]:
    """The sources of the training and of the evaluation data."""
    sources = find_sources(data, "train")
    assert sources is not None, "data.train is required"
    return sources, find_sources(data, "eval")


def read_stream(
    sources: Sequence[Source],
    data: DataConfig,
    output_dir: str,
    seed: int,
    tokenizer: Any,
    options: BuildOptions,
    eval_store: TokenStore | None,
    num_known: int | None = None,
) -> SampleStream:
    """Opens the stream of `sources`, every rank its own; no sample of `eval_store` is in it.

    Raises:
        ValueError: the sources cannot be streamed, or differ between ranks.
    """
    held_out = eval_store if data.eval_overlap == "error" else None
    rejected = Path(output_dir) / REJECTED_FILE if dist.get_rank() == 0 else None
    stream = open_stream(sources, tokenizer, options, data, seed, held_out, rejected, num_known)
    agree("data", {"fingerprint of data.train": stream.fingerprint}, math.inf)
    return stream


def read_store(
    key: str,
    sources: Sequence[Source],
    data: DataConfig,
    output_dir: str,
    tokenizer: Any,
    options: BuildOptions,
    log: Progress = logger.info,
    apart_from: TokenStore | None = None,
) -> TokenStore:
    """Opens the token store of `sources`; one rank per node builds it where it is missing.

    Args:
        key: the key of the configuration that names them.
        sources: what is read.
        data: section of the configuration.
        output_dir: of the run.
        tokenizer: of the run.
        options: what decides the content of the store.
        log: told how far this rank is; the node's other ranks log it.
        apart_from: a store that may not have a sample of this one.

    Raises:
        ValueError: the records cannot be used, or are in the other store as well, or are others
            than those of another machine.
    """

    def prepare(progress: Progress) -> Path:
        store = open_data_store(sources, tokenizer, options, data, output_dir, progress)
        choice, size = data.near_duplicates, options.group_size
        store = with_choice(store, choice, apart_from, size)
        if apart_from is not None and data.eval_overlap == "error":
            check_eval_is_not_train(apart_from, store)
        return store.path

    store = open_store(once_per_node(key, prepare, log))
    # Another machine may still be preparing its data, however long that takes.
    agree("data", {f"fingerprint of {key}": store.fingerprint}, math.inf)
    return store
