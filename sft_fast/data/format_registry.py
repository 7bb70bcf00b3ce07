"""The open registry of formats, and what a format function is given.

A format is a function `record -> Conversation`, registered by name. Its record carries our field
names: the aliases of the format and the user's `fields` are resolved before it is called.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_fast.data.conversation import Conversation, checked_text


class Record(dict[str, Any]):
    """The fields of one row under our names.

    Attributes:
        columns: field -> the name that the source uses.
        aliases: field -> the names that were looked for.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        super().__init__({field: row[column] for field, column in columns.items()})
        self.columns = columns
        self.available = ", ".join(row)
        self.aliases: Mapping[str, Sequence[str]] = {}

    def label(self, field: str) -> str:
        """How messages call a field."""
        column = self.columns.get(field, field)
        return f"{field!r}" if column == field else f"{field!r} (column {column!r})"

    def require(self, field: str) -> Any:
        """The value of a field; raises ValueError where the row has none."""
        if field not in self:
            names = ", ".join(self.aliases.get(field, (field,)))
            raise ValueError(
                f"no column for {field!r}: looked for {names}; the row has {self.available}. "
                f"Name it with data.fields: {{{field}: <column>}}"
            )
        return self[field]

    def optional_text(self, field: str) -> str | None:
        """The text of a field, or None where it is absent, null or blank."""
        value = self.get(field)
        if value is None or not checked_text(value, self.label(field)).strip():
            return None
        return str(value)

    def text(self, field: str) -> str:
        """The text of a field; raises ValueError where it is missing, not text, or blank."""
        checked_text(self.require(field), self.label(field))
        text = self.optional_text(field)
        if text is None:
            raise ValueError(f"{self.label(field)} is empty; give it text or remove the row")
        return text


@dataclass(frozen=True)
class Format:
    """A registered format.

    Attributes:
        name: its name in `data.format`.
        build: Record -> Conversation.
        fields: field -> column names that are looked for; empty: the record is the whole row.
        detect: row -> whether the row is in this format; None: never chosen by "auto".
    """

    name: str
    build: Callable[[Record], Conversation]
    fields: Mapping[str, tuple[str, ...]]
    detect: Callable[[Mapping[str, Any]], bool] | None

    def check_mapping(self, mapping: Mapping[str, str]) -> None:
        """Raises ValueError where `data.fields` names a field that this format does not have."""
        unknown = [field for field in mapping if self.fields and field not in self.fields]
        if unknown:
            raise ValueError(
                f"data.fields: the format {self.name!r} has no field {unknown[0]!r}; "
                f"its fields are {', '.join(self.fields)}"
            )

    def read(
        self, row: Mapping[str, Any], mapping: Mapping[str, str] | None = None
    ) -> Conversation:
        """Turns a row into a checked conversation.

        Args:
            row: one object of the source.
            mapping: our field -> the source's column.

        Raises:
            ValueError: the row does not hold what the format needs.
        """
        conversation = self.build(self._record(row, mapping or {}))
        conversation.check()
        return conversation

    def _record(self, row: Mapping[str, Any], mapping: Mapping[str, str]) -> Record:
        for field, column in mapping.items():
            if column not in row:
                raise ValueError(
                    f"no column {column!r}, which data.fields gives for {field!r}; "
                    f"the row has {', '.join(row)}"
                )
        if not self.fields:
            return Record(row, {name: name for name in row} | dict(mapping))
        columns = dict(mapping)
        for field, aliases in self.fields.items():
            if field in mapping:
                continue
            names = [name for name in aliases if name in row and name not in mapping.values()]
            filled = [name for name in names if row[name] not in (None, "")]
            if len(filled) > 1:
                raise ValueError(
                    f"the columns {filled[0]!r} and {filled[1]!r} could both be {field!r}; "
                    f"choose with data.fields: {{{field}: {filled[0]}}}"
                )
            if names:
                columns[field] = (filled or names)[0]
        record = Record(row, columns)
        record.aliases = self.fields
        return record


_FORMATS: dict[str, Format] = {}


def register_format(
    name: str,
    *,
    fields: Mapping[str, tuple[str, ...]] | None = None,
    detect: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Callable[[Callable[[Record], Conversation]], Callable[[Record], Conversation]]:
    """Registers a function `record -> Conversation` as the format `name`.

    Args:
        name: value of `data.format`.
        fields: field -> column names to look for, in words that users know; None: the function
            gets every column as it is.
        detect: whether a row is in this format, for "auto"; asked in the order of registration.

    Raises:
        ValueError: the name is taken.
    """

    def register(build: Callable[[Record], Conversation]) -> Callable[[Record], Conversation]:
        if name in _FORMATS or name == "auto":
            raise ValueError(f"the format name {name!r} is taken; choose another")
        _FORMATS[name] = Format(name, build, fields or {}, detect)
        return build

    return register


def format_names() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_FORMATS))


def get_format(name: str) -> Format:
    """The format registered as `name`.

    Raises:
        ValueError: there is none; the message lists what exists and the nearest name.
    """
    if name in _FORMATS:
        return _FORMATS[name]
    near = difflib.get_close_matches(name, format_names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"data.format: unknown format {name!r}; expected auto, {', '.join(format_names())}.{hint}"
    )


def detect_format(
    columns: Sequence[str], first_row: Mapping[str, Any], fields: Mapping[str, str] | None = None
) -> str:
    """Name of the first registered format that recognises a source.

    Args:
        columns: the column names of the source.
        first_row: its first row.
        fields: our field -> the source's column; the row is looked at under our names too.

    Raises:
        ValueError: none does; the message says what the row has.
    """
    row = dict.fromkeys(columns) | dict(first_row)
    row |= {field: row.get(column) for field, column in (fields or {}).items()}
    for candidate in _FORMATS.values():
        if candidate.detect is not None and candidate.detect(row):
            return candidate.name
    raise ValueError(
        f"cannot tell the format from the columns {', '.join(columns)}; set data.format to one of "
        f"{', '.join(format_names())}, and data.fields where the columns have other names"
    )
