"""From the configuration's sections to sources, options and a token store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sft_fast.data.build import BuildOptions, Progress
from sft_fast.data.choices import Part
from sft_fast.data.mixture import prepare_mixture, sample_hashes
from sft_fast.data.render import MaskOptions
from sft_fast.data.sample_maker import SFT_OPTIONS, StageOptions
from sft_fast.data.source import Source, load_records
from sft_fast.data.store import RejectedList, TokenStore
from sft_fast.data.stream import SampleStream
from sft_fast.models.locate import known_architecture
from sft_fast.registry import SFT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_fast.config.schema import Config
    from sft_fast.config.sections import DataConfig, DataSource, ModelConfig, PackingConfig
    from sft_fast.models.architecture import Architecture


def find_sources(data: DataConfig, part: Part) -> list[Source] | None:
    """The sources of `data.train` or `data.eval`; None for an evaluation that is not configured.

    Raises:
        ValueError: a source or its split does not exist; the message starts with the key.
    """
    if part == "train":
        sources = _load(data, "train", "data.train")
        if data.eval_fraction is None:
            return sources
        return [_with_records(source, 0, data.eval_fraction) for source in sources]
    if data.eval is not None:
        return _load(data, "eval", "data.eval")
    if data.eval_fraction is not None:
        sources = _load(data, "train", "data.train")
        return [_with_records(source, 1, data.eval_fraction) for source in sources]
    return None


def build_options(
    model: ModelConfig,
    data: DataConfig,
    packing: PackingConfig,
    architecture: Architecture | None = None,
    stage: StageOptions = SFT_OPTIONS,
) -> BuildOptions:
    """What decides the content of the stores.

    Args:
        model: says whether it has experts, where `architecture` is not known.
        data: what is trained, and what becomes of records that cannot be used.
        packing: how long a sample may be.
        architecture: of the model; None: what `known_architecture` says, dense if it says nothing.
        stage: from `stage_options`.
    """
    trim_tail = data.trim_tail
    if trim_tail is None:
        architecture = architecture or known_architecture(model)
        is_dense = getattr(architecture, "num_experts", 0) == 0
        trim_tail = is_dense and stage.rules().trains_answers
    return BuildOptions(
        capacity=packing.capacity,
        over_length=data.over_length,
        on_bad_row=data.on_bad_row,
        max_rejected=data.max_rejected,
        mask=MaskOptions(
            train_on=data.train_on,
            train_tool_calls=data.train_tool_calls,
            train_reasoning=data.train_reasoning,
            trim_tail=trim_tail,
            changing_history=data.changing_history,
        ),
        row_functions=tuple(data.row_functions),
        stage=stage,
        alignment=packing.alignment,
    )


def stage_options(config: Config) -> StageOptions:
    """What the configuration's stage says of samples."""
    if config.stage == SFT:
        return SFT_OPTIONS
    section = getattr(config, config.stage, None)
    values = {} if section is None else section.model_dump()
    return StageOptions(config.stage, tuple(config.plugins), values)


def open_data_store(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    data: DataConfig,
    output_dir: str,
    progress: Progress | None = None,
) -> TokenStore:
    """Opens the store of these sources, and builds what is missing.

    Args:
        sources: as `find_sources` gives them.
        tokenizer: from `load_tokenizer`.
        options: from `build_options`.
        data: says where stores are kept, and how many processes build one.
        output_dir: of the run, where `data` names no other folder.
        progress: as for `prepare_mixture`.

    Raises:
        ValueError: as `prepare_mixture`.
    """
    return prepare_mixture(
        sources,
        tokenizer,
        options,
        data.cache_dir or os.path.join(output_dir, "data"),
        processes=data.num_processes,
        progress=progress,
    )


def open_stream(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    data: DataConfig,
    seed: int,
    held_out: TokenStore | None = None,
    rejected: Path | None = None,
    num_known: int | None = None,
) -> SampleStream:
    """The samples of these sources for `data.streaming`; nothing is read yet.

    Args:
        sources: of `data.train`.
        tokenizer: from `load_tokenizer`.
        options: from `build_options`.
        data: the size of the buffer, and how many processes tokenise.
        seed: of the run.
        held_out: samples that may not train.
        rejected: file for the records that are not used, or not whole; None: they are only counted.
        num_known: token ids that the model has; None: all.

    Raises:
        ValueError: several sources without weights, or a source with a `repeat`.
    """
    return SampleStream(
        sources,
        tokenizer,
        options,
        buffer_size=data.shuffle_buffer,
        seed=seed,
        processes=data.num_processes or 1,
        held_out=frozenset() if held_out is None else sample_hashes(held_out),
        reject=None if rejected is None else RejectedList(rejected).add,
        num_known=num_known,
    )


def _load(data: DataConfig, part: Part, key: str) -> list[Source]:
    chosen = data.train if part == "train" else data.eval
    split = data.train_split if part == "train" else data.eval_split
    assert chosen is not None, "the caller has looked"
    sources = []
    entries: Sequence[str | DataSource] = [chosen] if isinstance(chosen, str) else chosen
    for number, entry in enumerate(entries):
        own: DataSource | None = None if isinstance(entry, str) else entry
        name = entry if isinstance(entry, str) else entry.path
        try:
            records = load_records(
                name,
                (own and own.split) or split,
                evaluation=part == "eval",
                streaming=data.streaming,
            )
        except ValueError as error:
            raise ValueError(f"{key}{f'[{number}]' if own else ''}: {error}") from None
        format_name = (own and own.format) or data.format
        fields = data.fields if own is None or own.fields is None else own.fields
        weight, repeat = (own.weight, own.repeat) if own else (None, 1)
        # Held-out questions are never asked twice.
        repeat = repeat if part == "train" else 1
        sources.append(Source(records, format_name, fields, weight, repeat))
    return sources


def _with_records(source: Source, part: Literal[0, 1], fraction: float) -> Source:
    records = source.records.hold_out(fraction)[part]
    if part == 0:
        return Source(records, source.format_name, source.fields, source.weight, source.repeat)
    return Source(records, source.format_name, source.fields)
