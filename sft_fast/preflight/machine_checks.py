"""Checks of a configuration against this machine: models, data, disk. Reads heads, not contents.

Nothing is downloaded and torch is not imported: hub ids that are not cached are taken on trust.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.config.layout import layout_problems
from sft_fast.constants import DTYPE_BYTES
from sft_fast.errors import ConfigError, Problem

if TYPE_CHECKING:
    from sft_fast.config.schema import Config
    from sft_fast.config.sections import (
        CheckpointConfig,
        DataConfig,
        ExportConfig,
        LoraConfig,
        ModelConfig,
        PackingConfig,
        ParallelConfig,
        RouterConfig,
        TokenizerConfig,
    )
    from sft_fast.data.source import Source
    from sft_fast.models.architecture import Architecture

HEAD_RECORDS = 50
LARGEST_LIST_BYTES = 32 << 20
"""A JSON list has to be read whole; larger ones are left to the run."""


@dataclass
class Findings:
    """What the checks saw.

    Attributes:
        problems: what would stop a run.
        notes: what was found right, and what was not looked at, in words.
        architecture: of the model, where its config.json is on this machine.
    """

    problems: list[Problem]
    notes: list[str]
    architecture: Architecture | None = None


def check_machine(config: Config) -> Findings:
    """Looks at everything that `config` names."""
    findings = Findings([], [])
    problems = findings.problems
    problems += _check_plugins(config.plugins)
    problems += _check_model(
        config.model, config.packing, config.parallel, config.lora, config.router, findings
    )
    _note_transformer_engine(config.model, findings)
    problems += _check_tokenizer(config.model, config.tokenizer, config.lora, findings)
    problems += _check_data(config.data, findings)
    problems += _check_resume(config.checkpoint.resume, Path(config.output_dir))
    unwritable = _check_output_dir(Path(config.output_dir), config.model, config.tokenizer)
    problems += unwritable
    if findings.architecture is not None and not unwritable:
        needed = _bytes_to_write(
            findings.architecture, config.model, config.lora, config.checkpoint, config.export
        )
        problems += _check_disk(Path(config.output_dir), needed, config.checkpoint, findings)
    # Model and tokenizer are often one directory, of which both checks say the same.
    findings.problems[:] = dict.fromkeys(findings.problems)
    findings.notes[:] = dict.fromkeys(findings.notes)
    return findings


def _check_plugins(plugins: Sequence[str]) -> Iterator[Problem]:
    for number, path in enumerate(plugins):
        if not Path(path).is_file():
            yield Problem((f"plugins[{number}]",), f"{path} does not exist", "a Python file")


def _check_model(
    model: ModelConfig,
    packing: PackingConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
    router: RouterConfig,
    findings: Findings,
) -> Iterator[Problem]:
    from sft_fast.models.architecture import read_hf_config
    from sft_fast.models.hub import is_downloaded, known_folder
    from sft_fast.models.locate import read_architecture
    from sft_fast.models.router import router_note, router_problems

    path = model.path
    if path is None:
        return
    try:
        folder = known_folder(path, model.revision, "model.path")
        if folder is None or (is_downloaded(path) and not (folder / "config.json").is_file()):
            findings.notes.append(_not_looked_at("model.path", path))
            return
        architecture = read_architecture(model, folder, num_tokens=0)
    except ConfigError as error:
        yield from error.problems
        return
    findings.architecture = architecture
    findings.notes.append(f"model.path: {folder / 'config.json'} is supported")
    if not model.random_init and not is_downloaded(path):
        yield from _check_weights(folder, read_hf_config(folder), architecture)
    yield from layout_problems(architecture, model, packing, parallel, lora)
    yield from router_problems(architecture, router, lora)
    if note := router_note(read_hf_config(folder), router):
        findings.notes.append(f"model.path: {note}")


def _note_transformer_engine(model: ModelConfig, findings: Findings) -> None:
    """The run may be on another machine, so this is a note."""
    from importlib.util import find_spec

    if model.uses_transformer_engine and find_spec("transformer_engine") is None:
        findings.notes.append(
            "model.transformer_impl, model.fp8: need Transformer Engine, which is not installed "
            "on this machine"
        )


def _check_weights(
    folder: Path, hf_config: dict[str, Any], architecture: Architecture
) -> Iterator[Problem]:
    from sft_fast.models.weights import check_weights

    try:
        check_weights(folder, hf_config, architecture)
    except ValueError as error:
        found = str(error).removeprefix("model.path: ")
        yield Problem(("model.path",), found, "trained weights as *.safetensors")


def _check_tokenizer(
    model: ModelConfig, tokenizer: TokenizerConfig, lora: LoraConfig, findings: Findings
) -> Iterator[Problem]:
    from sft_fast.data.templates import TEMPLATES
    from sft_fast.models.hub import is_downloaded, known_folder
    from sft_fast.models.locate import check_tokenizer_files

    template = tokenizer.chat_template
    key, path, revision = "tokenizer.path", tokenizer.path, None
    if path is None:
        assert model.path is not None, "the configuration demands a tokenizer for model.shape"
        key, path, revision = "model.path", model.path, model.revision
    try:
        folder = None if path == "demo" else known_folder(path, revision, key)
        if folder is not None and not is_downloaded(path):
            check_tokenizer_files(folder, key)
            _check_vocabulary(folder, model, tokenizer, lora, findings)
        elif path != "demo":
            findings.notes.append(_not_looked_at(key, path))
    except ConfigError as error:
        yield from error.problems
    if template is not None and template not in TEMPLATES and not Path(template).is_file():
        from sft_fast.errors import nearest

        near = nearest(template, TEMPLATES)
        yield Problem(
            ("tokenizer.chat_template",),
            f"{template} is no file and no template",
            f"a Jinja file, or one of {', '.join(TEMPLATES)}",
            f"did you mean {near}?" if near else "",
        )


def _check_vocabulary(
    folder: Path,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    lora: LoraConfig,
    findings: Findings,
) -> None:
    """Notes ids that the model does not have; raises ConfigError as `with_tokens`."""
    from sft_fast.models.locate import file_token_ids, with_tokens

    known = file_token_ids(folder)
    if known is None or findings.architecture is None:
        return
    num_ids = max(known.values(), default=-1) + 1
    added = [token for token in dict.fromkeys(tokenizer.add_tokens) if token not in known]
    grown = with_tokens(findings.architecture, range(num_ids, num_ids + len(added)), model, lora)
    if num_ids > grown.vocab_size:
        findings.notes.append(
            f"the tokenizer has {num_ids} ids, the model {grown.vocab_size}: a run stops where one "
            "of the others occurs in the data"
        )


def require_data(data: DataConfig) -> None:
    """Looks for the files of the data, so that a run without them does not start first.

    Raises:
        ValueError: one that is meant as a path is not there.
    """
    from sft_fast.data.source import load_records, looks_local

    for key, name, _, _ in _data_entries(data):
        path = os.path.expanduser(name)
        if looks_local(path) and not os.path.exists(path):
            try:
                load_records(name)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _check_data(data: DataConfig, findings: Findings) -> Iterator[Problem]:
    for entry in _data_entries(data):
        yield from _check_source(*entry, findings)


def _data_entries(data: DataConfig) -> Iterator[tuple[str, str, str, dict[str, str | None]]]:
    """Key, path, format and fields of every source."""
    for part in ("train", "eval"):
        chosen = getattr(data, part)
        if chosen is None:
            continue
        entries = [chosen] if isinstance(chosen, str) else chosen
        for number, entry in enumerate(entries):
            name = entry if isinstance(entry, str) else entry.path
            key = f"data.{part}" if isinstance(chosen, str) else f"data.{part}[{number}]"
            own_format = None if isinstance(entry, str) else entry.format
            own_fields = None if isinstance(entry, str) else entry.fields
            fields = data.fields if own_fields is None else own_fields
            yield key, name, own_format or data.format, fields


def _check_source(
    key: str, name: str, format_name: str, fields: dict[str, str | None], findings: Findings
) -> Iterator[Problem]:
    from sft_fast.data.source import KINDS, Source, load_records, looks_local

    path = Path(name).expanduser()
    if name != "demo" and not path.exists() and not looks_local(str(path)) and "*" not in name:
        findings.notes.append(f"{key}: {name} is taken for a hub id and was not looked at")
        return
    is_large_list = path.is_file() and path.stat().st_size > LARGEST_LIST_BYTES
    if is_large_list and path.suffix == ".json":
        findings.notes.append(f"{key}: {name} exists; its records were not looked at")
        return
    try:
        # The split decides which records are used; the head of the file shows their form.
        rows = load_records(name, evaluation=path.suffix == "" and key.startswith("data.eval"))
        if any(KINDS.get(Path(file).suffix) in ("parquet", "arrow") for file in rows.files):
            findings.notes.append(f"{key}: {name} exists; its records were not looked at")
            return
        bad = list(_bad_rows(Source(rows, format_name, fields), findings, key))
    except ValueError as error:
        is_there = path.exists() or "*" in name
        expected = (
            "records that a format knows" if is_there else "a file, directory, glob or hub id"
        )
        yield Problem((key,), str(error), expected)
        return
    for message in bad:
        yield Problem((key,), message, "records that a format knows")


def _bad_rows(source: Source, findings: Findings, key: str) -> Iterator[str]:
    """Messages of the first records that cannot be used, at most three."""
    from sft_fast.data.formats import ConversationReader
    from sft_fast.data.json_records import BadRecord

    reader = ConversationReader(source.format_name, source.fields)
    messages, count = [], 0
    for row in islice(source.records.scan(), HEAD_RECORDS):
        count += 1
        try:
            if isinstance(row, BadRecord):
                raise ValueError(row.message)
            reader.group(row)
        except ValueError as error:
            messages.append(str(error))
            if len(messages) == 3:
                break
    kinds = ", ".join(sorted({known.name for known in reader.files.values()}))
    if not messages:
        findings.notes.append(
            f"{key}: the first {count} records of {source.records.name} are {kinds}"
        )
    yield from messages


def _check_resume(resume: str, output_dir: Path) -> Iterator[Problem]:
    from sft_fast.runtime.run_files import check_resume

    try:
        check_resume(resume, output_dir)
    except ValueError as error:
        found, _, expected = str(error).removeprefix("checkpoint.resume: ").partition("; expected ")
        yield Problem(("checkpoint.resume",), found, expected)


def _check_output_dir(
    folder: Path, model: ModelConfig, tokenizer: TokenizerConfig
) -> list[Problem]:
    from sft_fast.runtime.run_directory import check_inputs, check_output_dir

    try:
        check_output_dir(folder)
    except ValueError as error:
        found = str(error).removeprefix("output_dir: ")
        expected = "a directory that can be written, and that is empty or a run's own"
        return [Problem(("output_dir",), found, expected)]
    inputs = {"model.path": model.path, "tokenizer.path": tokenizer.path}
    try:
        check_inputs(folder, inputs)
    except ValueError as error:
        key, _, found = str(error).partition(": ")
        return [Problem((key, "output_dir"), found, "a model that the run does not replace")]
    return []


def _bytes_to_write(
    architecture: Architecture,
    model: ModelConfig,
    lora: LoraConfig,
    checkpoint: CheckpointConfig,
    export: ExportConfig,
) -> int:
    """Of checkpoints and export, at the most at one time."""
    from sft_fast.models.flops import num_parameters

    # fp32 copies and two moments beside the weights; with LoRA only the adapters are written.
    state = DTYPE_BYTES[model.dtype] + 12 if lora.rank == 0 else 0
    exported = DTYPE_BYTES[export.dtype or model.dtype] if export.enabled else 0
    # One more checkpoint than is kept lies there while it is written.
    return num_parameters(architecture) * (state * (checkpoint.keep_last + 1) + exported)


def _check_disk(
    folder: Path, needed: int, checkpoint: CheckpointConfig, findings: Findings
) -> Iterator[Problem]:
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        yield Problem(
            ("output_dir", "checkpoint.keep_last"),
            f"{free / 2**30:.1f} GiB free at {_existing(folder)}",
            f"{needed / 2**30:.1f} GiB for {checkpoint.keep_last} checkpoints, the one "
            "being written, and the export",
            "another output_dir, or a smaller checkpoint.keep_last",
        )
    else:
        findings.notes.append(
            f"output_dir: checkpoints and export need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _not_looked_at(key: str, path: str) -> str:
    return f"{key}: {path} is taken for a hub id and was not looked at"
