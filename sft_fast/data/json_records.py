"""Parses JSON Lines files and JSON lists; a bad record is reported with file, line and column.

Keys that occur twice in one object are refused: a parser would keep the last one and say nothing.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import xxhash

CONTEXT_CHARACTERS = 80
IDENTITY_BYTES = 1 << 16
LONGEST_LINE_BYTES = 32 << 20
"""A record needs many times its size while it is read, and a small compressed file can hold any."""
LONGEST_LIST_BYTES = 4 << 30
TOO_LONG = f"the line has more than {LONGEST_LINE_BYTES >> 20} MiB; split the record"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_PYTHON_LIST = re.compile(r"\s*[\[{]+\s*'")


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One object of the source.

    Attributes:
        values: the object.
        file: path of its file, or the hub name and split.
        line: line it starts on, or its record number in a hub data set; counted from 1.
    """

    values: dict[str, Any]
    file: str
    line: int

    @property
    def origin(self) -> str:
        """Where the record is from: file:line."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read; `message` starts with its file:line:column."""

    file: str
    line: int
    message: str
    reason: str = "unreadable"


class Place(NamedTuple):
    """How far a part was read, as JSON can hold it; `read(place)` goes on behind it."""

    number: int = 0
    """Records read, unreadable ones included."""
    line: int = 0
    """Lines read."""
    hint: Any = None
    """How the part gets there without reading what comes before; None: it reads that again."""


START = Place()
Placed = Iterator[tuple[Place, SourceRecord | BadRecord]]
"""Records, each with the place behind it."""


class JsonPart:
    """One JSON Lines file, or one file with a JSON list; told apart by their first character."""

    def __init__(self, name: str, content: bytes | None = None) -> None:
        """`content` replaces the file's bytes, for records that exist in memory only."""
        self.name = name
        self._content = content

    def digest(self) -> str:
        """Hash of the file's bytes."""
        return file_digest(self.name if self._content is None else io.BytesIO(self._content))

    def count(self) -> int | None:
        """Lines of a JSON Lines file; None for a list."""
        if self._first_character() == b"[":
            return None
        with self._open() as stream:
            return count_lines(stream)

    def identity(self) -> str:
        """A digest of what tells this part from another, without reading all of it."""
        return self.digest() if self._content is not None else file_identity(self.name)

    def read(self, start: Place = START) -> Placed:
        """Yields the records behind `start`.

        Raises:
            ValueError: the file cannot be read, or is empty.
        """
        try:
            is_list = self._first_character() == b"["
            yield from self._read_list(start) if is_list else self._read_lines(start)
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error}") from error

    def _open(self) -> BinaryIO:
        return io.BytesIO(self._content) if self._content is not None else open_content(self.name)

    def _first_character(self) -> bytes:
        with self._open() as stream:
            head = stream.read(1 << 16)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{self.name}:1:1: the file is UTF-16; expected UTF-8. Convert it")
            head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
            while not head:
                block = stream.read(1 << 16)
                if not block:
                    raise ValueError(
                        f"{self.name}: the file is empty; expected one record at least"
                    )
                head = block.lstrip()
        return head[:1]

    def _read_lines(self, start: Place) -> Placed:
        number, offset = start.number, start.hint or 0
        with self._open() as stream:
            if self._content is None and self.name.endswith(tuple(COMPRESSIONS)):
                # Compressed data has no way in but the beginning.
                for _ in islice(lines_of(stream), start.line):
                    pass
            else:
                stream.seek(offset)
            for line, (raw, num_bytes) in enumerate(lines_of(stream), start.line + 1):
                offset += num_bytes
                if num_bytes > LONGEST_LINE_BYTES:
                    number += 1
                    head = raw[:CONTEXT_CHARACTERS].decode("latin-1")
                    yield Place(number, line, offset), self._bad(line, 1, TOO_LONG, head)
                    continue
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.isspace():
                    continue
                number += 1
                yield Place(number, line, offset), self._parse(line, raw)

    def _parse(self, line: int, raw: bytes) -> SourceRecord | BadRecord:
        """The record of a line."""
        try:
            text = raw.decode("utf-8").rstrip("\r\n")
            values = _DECODER.decode(text)
        except UnicodeDecodeError as error:
            return self._bad(line, *_encoding_fault(error))
        except json.JSONDecodeError as error:
            if line == 1 and text.strip() == "{":
                raise ValueError(
                    f"{self.name}:1: one object over several lines; expected one object a "
                    "line, or a list [{...}, {...}]"
                ) from None
            return self._bad(line, error.colno, f"not valid JSON: {_fault(error)}", text)
        except (ValueError, RecursionError) as error:
            return self._bad(line, 1, f"not usable JSON: {error}", text)
        return self._record(values, line, text)

    def _read_list(self, start: Place) -> Placed:
        with self._open() as stream:
            raw = stream.read(LONGEST_LIST_BYTES + 1).removeprefix(b"\xef\xbb\xbf")
        if len(raw) > LONGEST_LIST_BYTES:
            raise ValueError(
                f"{self.name}: the list has more than {LONGEST_LIST_BYTES >> 30} GiB, and would be "
                "read at once; write one object a line"
            )
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ValueError(self._bad(line, *_encoding_fault(error)).message) from None
        decode = _DECODER.raw_decode
        position, line = _skip_space(text, text.index("[") + 1), 1
        counted, number = 0, 0
        if text.startswith("]", position):
            raise ValueError(f"{self.name}: the list is empty; expected one record at least")
        while True:
            line += text.count("\n", counted, position)
            counted = position
            try:
                values, end = decode(text, position)
            except json.JSONDecodeError as error:
                raise self._syntax_error(text, error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self._syntax_error(text, position, str(error)) from None
            number += 1
            if number > start.number:
                near = text[position : position + CONTEXT_CHARACTERS]
                yield Place(number, line), self._record(values, line, near)
            end = _skip_space(text, end)
            if text.startswith("]", end):
                break
            if not text.startswith(",", end):
                raise self._syntax_error(text, end, "expected ',' or ']' after a record")
            position = _skip_space(text, end + 1)
            if text.startswith("]", position):
                raise self._syntax_error(text, end, "a comma behind the last record")
        end = _skip_space(text, end + 1)
        if end != len(text):
            raise self._syntax_error(text, end, "text after the end of the list")

    def _record(self, values: Any, line: int, text: str) -> SourceRecord | BadRecord:
        if isinstance(values, dict):
            return SourceRecord(values, self.name, line)
        kind = type_name(values)
        return self._bad(line, 1, f"the record is {kind}; expected an object {{...}}", text)

    def _bad(self, line: int, column: int, problem: str, text: str) -> BadRecord:
        near = _excerpt(text, column)
        message = f"{self.name}:{line}:{column}: {problem}, near {near!r}"
        return BadRecord(self.name, line, message)

    def _syntax_error(self, text: str, position: int, problem: str) -> ValueError:
        line = text.count("\n", 0, position) + 1
        start = text.rfind("\n", 0, position) + 1
        stop = text.find("\n", position)
        record = text[start : stop if stop >= 0 else len(text)]
        problem = f"not valid JSON: {problem}"
        return ValueError(self._bad(line, position - start + 1, problem, record).message)


def open_content(path: str) -> BinaryIO:
    """Opens a file for reading; .gz and .zst are decompressed on the way.

    Raises:
        OSError: while reading, for compressed data that is damaged or cut short.
    """
    compression = next((c for suffix, c in COMPRESSIONS.items() if path.endswith(suffix)), None)
    if compression is None:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), compression))


def lines_of(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, and how many bytes they have: of one that has more than
    LONGEST_LINE_BYTES only its first part is kept."""
    while line := stream.readline(LONGEST_LINE_BYTES + 1):
        num_bytes, rest = len(line), line
        while len(rest) > LONGEST_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE_BYTES + 1)
            num_bytes += len(rest)
        yield line, num_bytes


def count_lines(stream: BinaryIO) -> int:
    """Lines of a file, the last one with or without an end."""
    lines, last = 0, b"\n"
    while block := stream.read(1 << 20):
        lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def file_digest(file: str | BinaryIO) -> str:
    """xxh3_128 of a file's bytes as they are stored."""
    hasher = xxhash.xxh3_128()
    with open(file, "rb") if isinstance(file, str) else file as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def file_identity(name: str) -> str:
    """xxh3_128 of a file's size and ends: files too large to be read twice are told apart by it."""
    size = os.path.getsize(name)
    with open(name, "rb") as stream:
        head = stream.read(IDENTITY_BYTES)
        stream.seek(max(size - IDENTITY_BYTES, 0))
        return xxhash.xxh3_128_hexdigest(b"%d" % size + head + stream.read(IDENTITY_BYTES))


def type_name(value: Any) -> str:
    """What a JSON value is, in the words of an error message."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice in one object; keep one of the two")
    return values


def _refused_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write a number or null")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refused_constant, parse_float=_finite
)


def parse_json_prefix(text: str, start: int, label: str) -> tuple[Any, int]:
    """The JSON value that begins at a place of a text, and where it ends; rules of `parse_json`."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is not usable JSON: {error}") from None


def parse_json(text: str, label: str) -> Any:
    """A value out of JSON text inside a row, by the rules of the rows themselves.

    Args:
        text: of one value.
        label: how the message calls the text.

    Raises:
        ValueError: it is neither JSON nor a list of literals in Python's notation.
    """
    try:
        return _DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = ""
        if _PYTHON_LIST.match(text):
            # What pandas writes of a column of lists.
            with contextlib.suppress(SyntaxError, MemoryError, RecursionError, _NoLiteral):
                return _from_python(ast.parse(text.strip(), mode="eval").body, label)
            hint = "; it is Python's or numpy's notation: write the column with json.dumps"
        raise ValueError(f"{label} is not valid JSON: {error}{hint}") from None
    except ValueError as error:
        raise ValueError(f"{label} is not usable JSON: {error}") from None


def check_finite(value: Any, label: str) -> None:
    """Raises ValueError where a value, as tables have it, holds a number that JSON does not."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_finite(part, f"{key!r} in {label}")
    elif isinstance(value, list):
        for part in value:
            check_finite(part, label)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{label} is {value}, which JSON does not have; write a number or null")


class _NoLiteral(Exception):
    """Code that stands for no value of JSON."""


def _from_python(node: ast.expr, label: str) -> Any:
    """The value of a literal in Python's notation, by the rules of JSON."""
    match node:
        case ast.Dict():
            keys: list[Any] = [_from_python(k, label) if k else None for k in node.keys]
            if not all(isinstance(key, str) for key in keys):
                raise _NoLiteral
            values = [_from_python(value, label) for value in node.values]
            try:
                return _unique_keys(list(zip(keys, values, strict=True)))
            except ValueError as error:
                raise ValueError(f"{label} is not usable: {error}") from None
        case ast.List() | ast.Tuple():
            return [_from_python(part, label) for part in node.elts]
        case ast.Constant(value=str() | int() | float() | None as value):
            check_finite(value, label)
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            check_finite(value, label)
            return -value
    raise _NoLiteral


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _fault(error: json.JSONDecodeError) -> str:
    """What is wrong, in more words than the parser's where those mislead."""
    if error.msg != "Extra data":
        return error.msg
    is_comma = error.doc[error.pos :].strip() == ","
    return "a comma behind the object" if is_comma else "more text behind the object"


def _encoding_fault(error: UnicodeDecodeError) -> tuple[int, str, str]:
    """Column, problem and text of a decoding error."""
    raw: bytes = error.object
    start = raw.rfind(b"\n", 0, error.start) + 1
    before = raw[start : error.start].decode("utf-8")
    stop = error.start + CONTEXT_CHARACTERS
    text = before + raw[error.start : stop].decode("utf-8", errors="backslashreplace")
    problem = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
    return len(before) + 1, problem, text.split("\n")[0]


def _excerpt(text: str, column: int) -> str:
    start = max(0, min(column - 1 - CONTEXT_CHARACTERS // 2, len(text) - CONTEXT_CHARACTERS))
    return text[start : start + CONTEXT_CHARACTERS]
