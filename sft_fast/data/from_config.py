"""From the configuration's sections to sources, options and a token store."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from sft_fast.data.build import BuildOptions, Progress
from sft_fast.data.choices import Part
from sft_fast.data.mixture import prepare_mixture
from sft_fast.data.render import MaskOptions
from sft_fast.data.source import Source, load_records
from sft_fast.data.store import TokenStore
from sft_fast.models.locate import known_architecture

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
) -> BuildOptions:
    """What decides the content of the stores.

    Args:
        model: of the configuration, for the architecture.
        data: what is read and trained.
        packing: its capacity.
        architecture: of the model; None: what `known_architecture` says, dense if it says nothing.
    """
    trim_tail = data.trim_tail
    if trim_tail is None:
        architecture = architecture or known_architecture(model)
        trim_tail = getattr(architecture, "num_experts", 0) == 0
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
    )


def open_configured_store(
    config: Config,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None = None,
    architecture: Architecture | None = None,
    *,
    any_length: bool = False,
) -> TokenStore:
    """Opens the store of these sources, and builds what is missing.

    Arguments as for `prepare_mixture` and `build_options`. With `any_length` samples that are too
    long do not stop it, as `data.over_length: error` would have it.

    Raises:
        ValueError: as `prepare_mixture`.
    """
    options = build_options(config.model, config.data, config.packing, architecture)
    if any_length and options.over_length == "error":
        options = replace(options, capacity=sys.maxsize)
    return prepare_mixture(
        sources,
        tokenizer,
        options,
        config.data.cache_dir or os.path.join(config.output_dir, "data"),
        processes=config.data.num_processes,
        progress=progress,
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
