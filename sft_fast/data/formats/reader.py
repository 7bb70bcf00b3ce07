"""The reader of records: one format for all, or the one that each file's first record shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sft_fast.data.conversation import Conversation
from sft_fast.data.format_registry import (
    Format,
    detect_format,
    get_format,
    load_format,
)
from sft_fast.data.json_records import SourceRecord, type_name
from sft_fast.data.source import Records, Source

T = TypeVar("T")


@dataclass(frozen=True)
class FileFormat:
    """What the first record of a file decides.

    Attributes:
        name: the format.
        line: the first record's line.
        types: column -> the type of its value in that record, in words.
        unread: columns of that record that have no effect.
    """

    name: str
    line: int
    types: Mapping[str, str]
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        read = [column for column in self.types if column not in self.unread]
        return f"{self.name} (columns {', '.join(read)})"


class ConversationReader:
    """Reads records of one or more files; "auto" is decided by the first record of each file.

    Attributes:
        files: file -> what its first record decided, for the files seen so far.
    """

    def __init__(
        self,
        format_name: str,
        fields: Mapping[str, str | None] | None = None,
        files: Mapping[str, FileFormat] | None = None,
    ) -> None:
        """`files`: what another reader found out, so that both read the same."""
        self._fields = dict(fields or {})
        self._fixed = None if format_name == "auto" else load_format(format_name)
        if self._fixed is not None:
            self._fixed.check_mapping(self._fields)
        self.files: dict[str, FileFormat] = dict(files or {})

    def __call__(self, record: SourceRecord) -> Conversation:
        """The conversation of a record.

        Raises:
            ValueError: the record is not what the format needs; the message starts with file:line.
        """
        return self._read(record, lambda known: known.read(record.values, self._fields))

    def group(self, record: SourceRecord) -> tuple[Conversation, ...]:
        """The conversations of a record that a stage compares; one for other formats.

        Raises:
            ValueError: as for one conversation.
        """
        return self._read(record, lambda known: known.read_group(record.values, self._fields))

    def _read(self, record: SourceRecord, read: Callable[[Format], T]) -> T:
        try:
            return read(get_format(self.look(record).name))
        except ValueError as error:
            differs = self._difference(record)
            raise ValueError(f"{record.origin}: {error}{differs}") from error
        # A format of the user's own may raise anything; where it happened goes along.
        except BaseException as error:
            known = self.files.get(record.file)
            error.add_note(f"while reading {record.origin} as {known.name if known else None!r}")
            raise

    def look(self, record: SourceRecord) -> FileFormat:
        """The format of a record's file, found out with this record if it is the first one.

        Raises:
            ValueError: no format recognises the record.
        """
        if record.file not in self.files:
            if self._fixed is not None:
                name = self._fixed.name
            else:
                name = detect_format(list(record.values), record.values, self._fields)
                get_format(name).check_mapping(self._fields)
            types = {column: type_name(value) for column, value in record.values.items()}
            unread = get_format(name).unread(record.values, self._fields)
            self.files[record.file] = FileFormat(name, record.line, types, unread)
        return self.files[record.file]

    def _difference(self, record: SourceRecord) -> str:
        """How a bad record differs from the file's first one, which decided the format."""
        first = self.files.get(record.file)
        if first is None or first.line == record.line:
            return ""
        texts = [
            f"{column!r} is {type_name(value)} in line {record.line} but {first.types[column]} "
            f"in line {first.line}"
            for column, value in record.values.items()
            if column in first.types and type_name(value) != first.types[column]
        ]
        if self._fixed is None:
            if not texts:
                texts.append(f"line {first.line} decided that the file is {first.name}")
            with contextlib.suppress(ValueError):
                fits = detect_format(list(record.values), record.values, self._fields)
                if fits != first.name:
                    texts.append(f"this record is {fits}: put each kind into a file of its own")
        return f" ({'; '.join(texts)})" if texts else ""


def read_conversations(
    records: Records | Sequence[Source],
    format_name: str = "auto",
    fields: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[SourceRecord, Conversation]]:
    """Yields every record with its conversation.

    Args:
        records: the records, or sources that know their format and fields themselves.
        format_name: format of `records` that are no sources.
        fields: our field -> the column, of `records` that are no sources.

    Raises:
        ValueError: at the first record that cannot be used; the message starts with file:line.
    """
    sources = (
        [Source(records, format_name, fields or {})] if isinstance(records, Records) else records
    )
    for source in sources:
        reader = ConversationReader(source.format_name, source.fields)
        for record in source.records:
            yield record, reader(record)
