"""What makes the data of a source read right: settings, or a file of messages written anew.

Settings are tried on the first records; those with which all of them are read are proposed. Where
none are, each record is read as what it is by itself, out of a file that is not as expected too:
records inside of one object, tables by columns, other separators.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft_fast.data.conversation import ROLES, Conversation
from sft_fast.data.convert import json_line, messages_record
from sft_fast.data.formats import ConversationReader
from sft_fast.data.formats.turns import role_of
from sft_fast.data.json_records import BadRecord, SourceRecord, open_content, parse_json_prefix
from sft_fast.data.source import Source
from sft_fast.files import write_atomically

LOOKED_AT = 500
"""Records that settings are tried on."""
MOST_ROLES = 6
LONGEST_ROLE = 30
_NO_TEXT = frozenset(
    ("id", "uuid", "source", "url", "lang", "language", "category", "split", "title")
)
Fields = dict[str, str | None]


@dataclass(frozen=True)
class Fix:
    """What to change.

    Attributes:
        why: what was found.
        settings: keys of a source, and of `data`: format and fields; empty: a file is to be read.
        records: records in any format that is recognised, if the file has to be written anew.
    """

    why: str
    settings: Mapping[str, Any]
    records: Sequence[SourceRecord | BadRecord] = ()


def find_fix(source: Source) -> Fix | None:
    """What makes the records of a source read right; None: they do.

    Raises:
        ValueError: they do not, and nothing was found; the message is that of the first record.
    """
    try:
        records = list(islice(source.records.scan(), LOOKED_AT))
    except ValueError as error:
        shape = _other_shape(source)
        if shape is None:
            raise
        return Fix(f"{error}", {}, shape)
    fault = _first_error(records, source.format_name, dict(source.fields))
    if fault is None:
        return None
    usable = [record for record in records if isinstance(record, SourceRecord)]
    # A record that is alone may hold the others.
    shape = _other_shape(source) if len(usable) <= 1 else None
    if shape is not None:
        return Fix("the file is no list of records", {}, shape)
    if len(usable) == len(records):
        for format_name, fields, why in _settings([record.values for record in usable]):
            if _first_error(records, format_name, fields) is None:
                return Fix(why, {"format": format_name, "fields": fields})
    if _num_read(records) == 0:
        raise fault
    return Fix(f"{fault}", {}, list(source.records.scan()))


def write_fix(fix: Fix, path: Path) -> tuple[int, int]:
    """Writes the records of a fix as messages, and those that cannot be read to `<path>.rejected`.

    Returns: records written, records rejected.

    Raises:
        ValueError: the file exists, or no record can be used.
    """
    if path.exists():
        raise ValueError(f"{path} exists; move it away")
    rejected: list[str] = []
    written = 0
    with write_atomically(path) as file:
        for record in fix.records:
            try:
                file.write(json_line(messages_record(_read_alone(record)), record_origin(record)))
                written += 1
            except ValueError as error:
                rejected.append(str(error))
        if not written:
            raise ValueError(f"no record can be used, the first: {rejected[0]}")
    if rejected:
        listed = path.with_name(path.name + ".rejected")
        listed.write_text("\n".join(rejected) + "\n", encoding="utf-8")
    return written, len(rejected)


def record_origin(record: SourceRecord | BadRecord) -> str:
    """Where a record is from: file:line."""
    return f"{record.file}:{record.line}"


def _read_alone(record: SourceRecord | BadRecord) -> Conversation:
    """The conversation of a record by itself, whatever the others are."""
    if isinstance(record, BadRecord):
        raise ValueError(record.message)
    return ConversationReader("auto")(record)


def _num_read(records: Sequence[SourceRecord | BadRecord], chats_only: bool = False) -> int:
    count = 0
    for record in records:
        try:
            conversation = _read_alone(record)
        except ValueError:
            continue
        count += bool(conversation.messages) or not chats_only
    return count


def _first_error(
    records: Sequence[SourceRecord | BadRecord], format_name: str, fields: Fields
) -> ValueError | None:
    """What is wrong with the first record that cannot be read with these settings."""
    try:
        reader = ConversationReader(format_name, fields)
        for record in records:
            if isinstance(record, BadRecord):
                raise ValueError(record.message)
            reader(record)
    except ValueError as error:
        return error
    return None


def _settings(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Fields, str]]:
    """Settings that may fit, the surest first: format, fields, and what was seen."""
    yield "auto", {}, "the format is recognised by itself"
    columns = list(records[0])
    for column in columns:
        turns = [turn for record in records for turn in _turns(record.get(column))]
        if turns and (fields := _names(turns)) is not None:
            named = fields if column == "messages" else {"messages": column, **fields}
            yield "messages", named, f"{column!r} holds the turns"
    if {"chosen", "rejected"} <= set(columns):
        why = "pairs of answers are for preference training; the chosen ones are trained"
        yield "messages", {"messages": "chosen", "rejected": None}, why
        yield "prompt_completion", {"completion": "chosen", "rejected": None}, why
    texts = [
        column
        for column in columns
        if column.lower() not in _NO_TEXT
        and all(isinstance(record.get(column), str) for record in records)
    ]
    if len(texts) == 2:
        prompt, completion = texts
        why = f"{prompt!r} and {completion!r} are the only texts; look whether that is their order"
        yield "prompt_completion", {"prompt": prompt, "completion": completion}, why


def _turns(value: Any) -> list[dict[str, Any]]:
    is_list = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    return value if is_list else []


def _names(turns: Sequence[Mapping[str, Any]]) -> Fields | None:
    """What turns call their keys and roles, where that is not what we call them."""
    keys = [k for k in turns[0] if all(isinstance(turn.get(k), str) for turn in turns)]
    distinct = {key: list(dict.fromkeys(turn[key] for turn in turns)) for key in keys}
    roles = [
        key
        for key in keys
        if len(distinct[key]) <= MOST_ROLES and max(map(len, distinct[key])) <= LONGEST_ROLE
    ]
    if not roles or len(keys) < 2:
        return None
    role = min(roles, key=lambda key: len(distinct[key]))
    content = max((k for k in keys if k != role), key=lambda k: sum(map(len, distinct[k])))
    unknown = [name for name in distinct[role] if role_of(name) not in ROLES]
    known = {role_of(name) for name in distinct[role]} - set(unknown)
    # Who speaks first is asked by nobody.
    missing = [name for name in ("user", "assistant") if name not in known]
    if len(unknown) != len(missing):
        return None
    names = {"role": role, "content": content, **dict(zip(missing, unknown, strict=True))}
    return {name: key for name, key in names.items() if name != key}


def _other_shape(source: Source) -> list[SourceRecord | BadRecord] | None:
    """The records of a file that is no list of them; None where it is none that is known."""
    if len(source.records.files) != 1 or not Path(source.records.files[0]).is_file():
        return None
    name = source.records.files[0]
    with open_content(name) as stream:
        raw = stream.read()
    is_utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        return None
    is_csv = ".csv" in name or ".tsv" in name
    for rows in [_csv_rows(text)] if is_csv else _json_rows(text):
        records = [SourceRecord(row, name, number) for number, row in enumerate(rows, start=1)]
        # A list of anything with texts might be records of texts: only chats are sure to be meant.
        if _num_read(records[:LOOKED_AT], chats_only=True):
            return list(records)
    return None


def _csv_rows(text: str) -> list[dict[str, Any]]:
    try:
        dialect = csv.Sniffer().sniff(text.split("\n")[0], delimiters=",;\t|")
        columns, *rows = csv.reader(io.StringIO(text), dialect=dialect)
    except (csv.Error, ValueError):
        return []
    if len(set(columns)) != len(columns):
        return []
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]


def _json_rows(text: str) -> Iterator[list[dict[str, Any]]]:
    """What may be the records of a text of JSON: its values, or what its only value holds."""
    values, place = [], 0
    try:
        while place < len(text.rstrip()):
            place += len(text[place:]) - len(text[place:].lstrip())
            value, place = parse_json_prefix(text, place, "the file")
            values.append(value)
    except ValueError:
        return
    yield [value for value in values if isinstance(value, dict)]
    if len(values) == 1:
        yield _table(values[0])


def _table(value: Any) -> list[dict[str, Any]]:
    """The records of one value: a list, an object around it, or a table as pandas writes it."""
    if isinstance(value, list):
        return [row for row in value if isinstance(row, dict)]
    if not isinstance(value, dict) or not value:
        return []
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    parts = list(value.values())
    lists = [part for part in parts if isinstance(part, list) and part]
    if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
        return list(lists[0])
    if len(lists) == len(parts) and len({len(part) for part in parts}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if all(isinstance(part, dict) for part in parts) and len({tuple(part) for part in parts}) == 1:
        return [{column: value[column][key] for column in value} for key in parts[0]]
    return []
