"""Builds the token store of a source, or finds the one that was built before."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import xxhash

from sft_fast.constants import round_up
from sft_fast.data.choices import OnBadRecord, OverLength
from sft_fast.data.format_registry import (
    code_digest,
    code_of_function,
    format_names,
    is_ours,
    load_format,
)
from sft_fast.data.json_records import BadRecord, SourceRecord
from sft_fast.data.render import MaskOptions
from sft_fast.data.sample_maker import (
    SFT_OPTIONS,
    MakerOptions,
    Outcome,
    SampleMaker,
    StageOptions,
    long_lived_objects,
    make_all,
)
from sft_fast.data.source import Source
from sft_fast.data.store import NEAR_DUPLICATE, DataReport, StoreWriter, TokenStore
from sft_fast.data.store_check import open_whole, store_path
from sft_fast.data.tokenizer import tokenizer_digest
from sft_fast.registry import SFT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 6
"""Raised whenever the same records and options give other tokens or another mask than before."""
BATCH_RECORDS = 512
SHOWN_RECORDS = 5
PROGRESS_SECONDS = 1.0
Progress = Callable[[str], None]
# Reasons in the list of rejected records that are no rejections, or follow from a chosen policy.
_NOTES = ("truncated", "split")
WANTED = ("too long", NEAR_DUPLICATE)
TRUNCATED = "nothing to learn"


@dataclass(frozen=True)
class BuildOptions:
    """What, beside the source and the tokenizer, decides the content of a store.

    Attributes:
        capacity: tokens of a pack; no sample is longer.
        over_length: what happens to longer samples: "error" stops with their list, "drop" leaves
            them out, "truncate_right" and "truncate_left" cut their end or start off,
            "split_turns" makes several conversations of one.
        on_bad_row: "error" stops with the list of the records that cannot be used, "skip" leaves
            them out. What is left out is counted and listed either way.
        max_rejected: largest share of records, 0 to 1, that may be left out because they cannot be
            used, or have nothing to learn once they are truncated.
        mask: what is supervised.
        row_functions: registered functions that each conversation goes through, in order.
        stage: what it says of samples.
        alignment: tokens that a sample takes up a multiple of, where several share a pack.
    """

    capacity: int
    over_length: OverLength = "error"
    on_bad_row: OnBadRecord = "error"
    max_rejected: float = 0.01
    mask: MaskOptions = field(default_factory=MaskOptions)
    row_functions: tuple[str, ...] = ()
    stage: StageOptions = SFT_OPTIONS
    alignment: int = 1

    @property
    def group_size(self) -> int:
        """Samples of a record that stay together."""
        return self.stage.rules().group_size

    def of_any_length(self) -> BuildOptions:
        """These options, under which samples that are too long stop nothing."""
        return replace(self, capacity=sys.maxsize) if self.over_length == "error" else self

    def __post_init__(self) -> None:
        for name, kind in (("over_length", OverLength), ("on_bad_row", OnBadRecord)):
            found, allowed = getattr(self, name), get_args(kind)
            if found not in allowed:
                raise ValueError(f"{name} is {found!r}; expected one of {', '.join(allowed)}")
        if self.capacity < 2:
            raise ValueError(f"capacity is {self.capacity}; expected 2 tokens at least")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected is {self.max_rejected}; expected a share from 0 to 1")


def store_fingerprint(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    source_digest: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """xxh3_128 of everything that a store's content depends on, and the parts it is made of.

    Where the source and the tokenizer are kept does not count, only what they contain. Neither do
    the capacity, where no sample is changed for it, nor what is done about bad records: a store is
    checked against these whenever it is opened. `source_digest` stands in for that of the records.
    """
    is_auto = source.format_name == "auto"
    formats = format_names() if is_auto else (load_format(source.format_name).name,)
    parts: dict[str, Any] = {
        "code": CODE_VERSION,
        "source": source_digest or source.records.digest,
        "format": "auto" if is_auto else formats[0],
        "fields": dict(source.fields),
        "own_code": code_digest(formats, options.row_functions),
        "row_functions": [name.rpartition("/")[2] for name in options.row_functions],
        "template": _digest(tokenizer.chat_template),
        "tokenizer": tokenizer_digest(tokenizer),
        "mask": asdict(options.mask),
    }
    if options.over_length != "error":
        parts |= {"over_length": options.over_length, "capacity": options.capacity}
    if options.stage.name != SFT:
        parts["stage"] = stage_parts(options.stage)
    if options.group_size > 1 and options.alignment > 1:
        parts["alignment"] = options.alignment
    return _digest(parts), parts


def stage_parts(stage: StageOptions) -> list[Any]:
    """What a store's content depends on of a stage; its loss and its measures are no part of it."""
    rules = stage.rules()
    targets: Any = type(rules).targets
    parts = [stage.name, rules.group_size]
    if not is_ours(targets):
        parts += [dict(stage.section), code_of_function(targets)]
    return parts


def prepare_store(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    cache_dir: str | Path,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Opens the store of these inputs in `cache_dir`, and builds it first where it is missing.

    A damaged store is built anew. Arguments and errors are those of `build_store`.
    """
    fingerprint, _ = store_fingerprint(source, tokenizer, options)
    path = store_path(cache_dir, fingerprint)
    if (store := open_whole(path, progress)) is not None:
        # Where the records are kept is no part of the fingerprint.
        store.report.left_out = list(source.records.left_out)
        store.report.source = source.records.name
        check_store(store, options)
        return store
    return build_store(source, tokenizer, options, path, processes=processes, progress=progress)


def build_store(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    path: str | Path,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Reads, formats, renders and tokenises every record, and writes the store in one step.

    Args:
        source: the records and how to read them; weight and repeat play no part here.
        tokenizer: from `load_tokenizer`.
        options: see `BuildOptions`.
        path: directory of the store; must not exist.
        processes: how many work on it; None: one for small sources, else one per core. The result
            is the same.
        progress: called with a line of text about once a second.

    Raises:
        ValueError: records that cannot be used or are too long, where the options say "error"; more
            of them than `max_rejected`; or none is left. The message names file:line. Or the files
            changed while they were read.
    """
    fingerprint, parts = store_fingerprint(source, tokenizer, options)
    with StoreWriter(path) as writer, long_lived_objects():
        report = _Builder(source, tokenizer, options, writer, progress).run(processes)
        if source.records.content_digest() != parts["source"]:
            raise ValueError(
                f"{source.records.name} changed while it was read; start again when it is complete"
            )
        store = writer.commit(fingerprint, parts, report)
    check_store(store, options)
    return store


@dataclass
class BadRecords:
    """The records that are not in a store though nobody wanted that.

    Attributes:
        count: of them.
        num_unusable: those without the ones that have nothing to learn once they are truncated.
        first: messages of the first few.
        first_unusable: those of the first few unusable ones.
    """

    count: int = 0
    num_unusable: int = 0
    first: list[str] = field(default_factory=list)
    first_unusable: list[str] = field(default_factory=list)

    def add(self, reason: str, message: str) -> None:
        """Counts a record that was rejected, unless it is to be."""
        if reason in WANTED:
            return
        self.count += 1
        if self.count <= SHOWN_RECORDS:
            self.first.append(message)
        if reason == TRUNCATED:
            return
        self.num_unusable += 1
        if self.num_unusable <= SHOWN_RECORDS:
            self.first_unusable.append(message)


class _Builder:
    """One pass over the records. Bad records are counted, so that one error can tell of all."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        options: BuildOptions,
        writer: StoreWriter,
        progress: Progress | None,
    ) -> None:
        self._source, self._tokenizer, self._options = source, tokenizer, options
        self._writer = writer
        self._progress = progress
        self._told = time.monotonic()
        self._maker_options = maker_options(source, options)
        self._maker = SampleMaker(tokenizer, self._maker_options)
        self._report = DataReport(
            source=source.records.name,
            template=self._maker.template_source,
            left_out=list(source.records.left_out),
        )
        self._bad = BadRecords()

    def run(self, processes: int | None) -> DataReport:
        for batch in make_all(
            self._maker,
            self._tokenizer,
            self._maker_options,
            self._records(),
            processes,
            batch_records=BATCH_RECORDS,
            needs_samples=self._needs_samples,
        ):
            for _, outcome in batch:
                self._add(outcome)
            self._tell()
        self._report.formats = {file: str(known) for file, known in self._maker.files.items()}
        try:
            _check_report(self._report, self._options, self._bad, self._writer.rejected_path)
        except ValueError:
            if self._bad.count > SHOWN_RECORDS:
                self._writer.keep_rejected()
            raise
        return self._report

    def _records(self) -> Iterator[tuple[None, SourceRecord | BadRecord]]:
        for record in self._source.records.scan():
            self._report.rows += 1
            yield None, record

    def _needs_samples(self) -> bool:
        # Once the build cannot succeed, the other records are only read, to list the bad ones.
        return not self._bad.num_unusable or self._options.on_bad_row == "skip"

    def _add(self, outcome: Outcome) -> None:
        for reason, message in count_record(self._report, outcome):
            self._writer.reject(outcome.file, outcome.line, reason, message)
        if outcome.rejected is not None:
            self._bad.add(*outcome.rejected)
            return
        for sample in outcome.samples:
            ids, supervised = sample.input_ids, sample.supervised
            self._writer.add(ids, supervised, outcome.file, outcome.line, sample.weights)

    @cached_property
    def _num_records(self) -> int | None:
        return self._source.records.count()

    def _tell(self) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._told >= PROGRESS_SECONDS:
            self._told = now
            records, tokens = self._report.rows, self._report.tokens
            total = "" if self._num_records is None else f" of about {self._num_records}"
            self._progress(
                f"{self._source.records.name}: {records}{total} records, {tokens} tokens"
            )


def maker_options(source: Source, options: BuildOptions) -> MakerOptions:
    """How the records of `source` become samples."""
    return MakerOptions(
        source.format_name,
        source.fields,
        options.row_functions,
        options.mask,
        options.capacity,
        options.over_length,
        options.stage,
        options.alignment,
    )


def count_record(report: DataReport, outcome: Outcome) -> list[tuple[str, str]]:
    """Counts what became of a record; a store and a stream count alike.

    Returns: (reason, message) of all that is to be listed of it.
    """
    report.longest = max(report.longest, outcome.longest)
    report.split += len(outcome.samples) > outcome.group_size
    report.trimmed_turns += outcome.trimmed_turns
    for counts, names in ((report.unread, outcome.unread), (report.odd, outcome.odd)):
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    if outcome.rejected is not None:
        reason = outcome.rejected[0]
        report.rejected[reason] = report.rejected.get(reason, 0) + 1
        return [outcome.rejected]
    report.truncated += outcome.truncated
    report.cut_tokens += outcome.cut_tokens
    for sample in outcome.samples:
        report.samples += 1
        report.tokens += len(sample.input_ids)
        report.supervised_tokens += int(np.count_nonzero(sample.supervised[1:]))
        report.boundary_tokens += sample.boundary_tokens
    return outcome.notes


def check_store(store: TokenStore, options: BuildOptions) -> None:
    """Checks a store against the options that its fingerprint leaves out.

    Raises:
        ValueError: records that cannot be used or are too long, as `build_store`.
    """
    report = store.report
    bad = BadRecords()
    for entry in store.rejected():
        if entry["reason"] not in _NOTES:
            bad.add(entry["reason"], entry["message"])
    _check_report(report, options, bad, store.rejected_path)
    if options.over_length == "error" and report.longest > options.capacity:
        size = options.group_size
        alignment = options.alignment if size > 1 else 1
        lengths = round_up(store.lengths.astype(np.int64), alignment).reshape(-1, size).sum(axis=1)
        too_long = np.flatnonzero(lengths > options.capacity)
        shown = [f"{store.origin(i * size)}: {lengths[i]} tokens" for i in too_long[:SHOWN_RECORDS]]
        *others, last = [policy for policy in get_args(OverLength) if policy != "error"]
        name = "samples" if size == 1 else "groups of samples"
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} {name} of {report.source} are longer than "
            f"packing.capacity = {options.capacity} tokens, the longest has {report.longest}. Set "
            f"packing.capacity to {report.longest} or more, or data.over_length to "
            f"{', '.join(others)} or {last}:\n{_first(shown, len(too_long))}"
        )


def _check_report(
    report: DataReport, options: BuildOptions, bad: BadRecords, listed_in: Path
) -> None:
    """Checks what was left out; `listed_in` lists all of it."""
    if bad.num_unusable and options.on_bad_row == "error":
        raise ValueError(
            f"{bad.num_unusable} of {report.rows} records of {report.source} cannot be used; mend "
            f"or remove them:\n{_first(bad.first_unusable, bad.num_unusable, listed_in)}"
        )
    reasons = ", ".join(f"{count} {why}" for why, count in report.rejected.items())
    if not report.samples:
        raise ValueError(f"no sample of {report.source} can be used: {reasons or 'no records'}")
    if bad.count > options.max_rejected * report.rows:
        raise ValueError(
            f"{bad.count} of {report.rows} records of {report.source} cannot be used "
            f"({bad.count / report.rows:.1%}: {reasons}), more than data.max_rejected = "
            f"{options.max_rejected}; mend them or raise it:\n"
            f"{_first(bad.first, bad.count, listed_in)}"
        )


def _first(messages: list[str], total: int, listed_in: Path | None = None) -> str:
    lines = [f"  {message}" for message in messages[:SHOWN_RECORDS]]
    if total > SHOWN_RECORDS:
        where = "" if listed_in is None else f", all listed in {listed_in}"
        lines.append(f"  and {total - SHOWN_RECORDS} more{where}")
    return "\n".join(lines)


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
