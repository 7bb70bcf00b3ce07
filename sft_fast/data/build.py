"""Builds the token store of a source, or finds the one that was built before."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import xxhash

from sft_fast.data.conversation import Conversation
from sft_fast.data.formats import ConversationReader, format_names, get_format
from sft_fast.data.json_rows import BadRow, Row
from sft_fast.data.render import ChatRenderer, RenderedChat, Sample
from sft_fast.data.source import Rows
from sft_fast.data.store import DataReport, StoreWriter, TokenStore, open_store
from sft_fast.data.tokenizer import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 1
"""Raised whenever the same rows and options give other tokens or another mask than before."""
BATCH_CONVERSATIONS = 512
SHOWN_ROWS = 5
OverLength = Literal["error", "drop", "truncate_right"]
OnBadRow = Literal["error", "skip"]
OVER_LENGTH: tuple[OverLength, ...] = get_args(OverLength)
ON_BAD_ROW: tuple[OnBadRow, ...] = get_args(OnBadRow)


@dataclass(frozen=True)
class BuildOptions:
    """What, beside the rows, the format and the tokenizer, decides the content of a store.

    Attributes:
        capacity: tokens of a packed row; no sample is longer.
        over_length: what happens to longer samples: "error" stops with their list, "drop" leaves
            them out, "truncate_right" cuts their end off.
        on_bad_row: "error" stops with the list of the rows that cannot be used, "skip" leaves them
            out. What is left out is counted and listed either way.
        fields: our field -> the source's column.
    """

    capacity: int
    over_length: OverLength = "error"
    on_bad_row: OnBadRow = "error"
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("over_length", OVER_LENGTH), ("on_bad_row", ON_BAD_ROW)):
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ValueError(f"{name} is {found!r}; expected one of {', '.join(allowed)}")
        if self.capacity < 2:
            raise ValueError(f"capacity is {self.capacity}; expected 2 tokens at least")


def store_fingerprint(
    rows: Rows, format_name: str, tokenizer: PreTrainedTokenizerBase, options: BuildOptions
) -> tuple[str, dict[str, Any]]:
    """xxh3_128 of everything that a store's content depends on, and the parts it is made of.

    Where the source and the tokenizer are kept does not count, only what they contain.
    """
    parts: dict[str, Any] = {
        "code": CODE_VERSION,
        "source": rows.digest,
        "format": format_name,
        "format_code": _format_code(format_name),
        "template": _digest(tokenizer.chat_template),
        "tokenizer": tokenizer_digest(tokenizer),
        **asdict(options),
    }
    return _digest(parts), parts


def prepare_store(
    rows: Rows,
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    cache_dir: str | Path,
) -> TokenStore:
    """Opens the store of these inputs in `cache_dir`, and builds it first where it is missing.

    A damaged store is built anew. Arguments and errors are those of `build_store`.
    """
    fingerprint, _ = store_fingerprint(rows, format_name, tokenizer, options)
    path = Path(cache_dir) / fingerprint
    if path.exists():
        try:
            return open_store(path)
        except ValueError:
            shutil.rmtree(path)
    return build_store(rows, format_name, tokenizer, options, path)


def build_store(
    rows: Rows,
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    path: str | Path,
) -> TokenStore:
    """Reads, formats, renders and tokenises every row, and writes the store in one step.

    Args:
        rows: from `load_rows`.
        format_name: a registered format, or "auto": decided by the first row of each file.
        tokenizer: from `load_tokenizer`.
        options: see `BuildOptions`.
        path: directory of the store; must not exist.

    Raises:
        ValueError: rows that cannot be used or are too long, where the options say "error"; or
            none is left. The message names file:line.
    """
    fingerprint, parts = store_fingerprint(rows, format_name, tokenizer, options)
    with StoreWriter(path) as writer:
        builder = _Builder(rows, format_name, tokenizer, options, writer)
        return writer.commit(fingerprint, parts, builder.run())


class _Builder:
    """One pass over the rows. Bad rows are collected, so that one error can list them all."""

    def __init__(
        self,
        rows: Rows,
        format_name: str,
        tokenizer: PreTrainedTokenizerBase,
        options: BuildOptions,
        writer: StoreWriter,
    ) -> None:
        self._rows = rows
        self._options = options
        self._writer = writer
        self._reader = ConversationReader(format_name, options.fields)
        self._renderer = ChatRenderer(tokenizer)
        self._report = DataReport(
            source=rows.name,
            formats=self._reader.formats,
            template=self._renderer.template_source,
        )
        self._bad_rows: list[str] = []
        self._too_long: list[str] = []

    def run(self) -> DataReport:
        batch: list[tuple[Row, RenderedChat]] = []
        for row, conversation in self._conversations():
            try:
                batch.append((row, self._renderer.render(conversation)))
            except ValueError as error:
                self._bad_row(row.file, row.line, "not rendered", f"{row.origin}: {error}")
            if len(batch) == BATCH_CONVERSATIONS:
                self._tokenize(batch)
                batch = []
        if batch:
            self._tokenize(batch)
        self._raise_collected()
        return self._report

    def _conversations(self) -> Iterator[tuple[Row, Conversation]]:
        for row in self._rows.scan():
            self._report.rows += 1
            if isinstance(row, BadRow):
                self._bad_row(row.file, row.line, row.reason, row.message)
                continue
            try:
                conversation = self._reader(row)
            except ValueError as error:
                self._bad_row(row.file, row.line, "not in the format", str(error))
                continue
            yield row, conversation

    @property
    def _stopping(self) -> bool:
        return bool(self._bad_rows) and self._options.on_bad_row == "error"

    def _tokenize(self, batch: list[tuple[Row, RenderedChat]]) -> None:
        if self._stopping:
            # The costly step; the other rows are still read, to list the bad ones.
            return
        try:
            samples = self._renderer.tokenize([chat for _, chat in batch])
        except ValueError:
            # One chat is at fault: find it, the others are good.
            samples = []
            kept = []
            for row, chat in batch:
                try:
                    samples += self._renderer.tokenize([chat])
                    kept.append((row, chat))
                except ValueError as error:
                    self._bad_row(row.file, row.line, "not tokenized", f"{row.origin}: {error}")
            batch = kept
        for (row, _), sample in zip(batch, samples, strict=True):
            self._add(row, sample)

    def _add(self, row: Row, sample: Sample) -> None:
        length, capacity = len(sample.input_ids), self._options.capacity
        self._report.longest = max(self._report.longest, length)
        input_ids, supervised = sample.input_ids, sample.supervised
        if length > capacity:
            message = f"{row.origin}: {length} tokens"
            self._too_long.append(message)
            if self._options.over_length != "truncate_right":
                self._reject(row.file, row.line, "too long", message)
                return
            input_ids, supervised = input_ids[:capacity], supervised[:capacity]
        if not supervised[1:].any():
            message = f"{row.origin}: no supervised token among the first {capacity}"
            self._reject(row.file, row.line, "nothing to learn", message)
            return
        if length > capacity:
            self._report.truncated += 1
            self._writer.reject(row.file, row.line, "truncated", message)
        self._writer.add(input_ids, supervised, row.file, row.line)
        self._report.samples += 1
        self._report.tokens += len(input_ids)
        self._report.supervised_tokens += int(supervised[1:].sum())
        self._report.boundary_tokens += sample.boundary_tokens

    def _bad_row(self, file: str, line: int, reason: str, message: str) -> None:
        self._bad_rows.append(message)
        self._reject(file, line, reason, message)

    def _reject(self, file: str, line: int, reason: str, message: str) -> None:
        self._report.rejected[reason] = self._report.rejected.get(reason, 0) + 1
        self._writer.reject(file, line, reason, message)

    def _raise_collected(self) -> None:
        if self._stopping:
            raise ValueError(
                f"{len(self._bad_rows)} of {self._report.rows} rows of {self._rows.name} cannot "
                f"be used; mend or remove them:\n{_first(self._bad_rows)}"
            )
        if self._too_long and self._options.over_length == "error":
            raise ValueError(
                f"{len(self._too_long)} of {self._report.rows} samples of {self._rows.name} are "
                f"longer than packing.capacity = {self._options.capacity} tokens, the longest has "
                f"{self._report.longest}. Set packing.capacity to {self._report.longest} or more, "
                f"or data.over_length to drop or truncate_right:\n{_first(self._too_long)}"
            )
        if not self._report.samples:
            reasons = ", ".join(f"{count} {why}" for why, count in self._report.rejected.items())
            raise ValueError(f"no sample of {self._rows.name} can be used: {reasons}")


def _first(messages: list[str]) -> str:
    lines = [f"  {message}" for message in messages[:SHOWN_ROWS]]
    if len(messages) > SHOWN_ROWS:
        lines.append(f"  and {len(messages) - SHOWN_ROWS} more")
    return "\n".join(lines)


def _format_code(format_name: str) -> str:
    """Source code of formats that are not ours; ours are covered by `CODE_VERSION`."""
    names = format_names() if format_name == "auto" else (format_name,)
    functions = [get_format(name).build for name in names]
    return _digest([_code(function) for function in functions if not _is_ours(function)])


def _is_ours(function: Any) -> bool:
    return str(function.__module__).startswith("sft_fast.")


def _code(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except OSError:
        # Defined in an interactive session: only the compiled code is left.
        return repr((function.__code__.co_code, function.__code__.co_consts))


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
