"""Records of tables: CSV with lines, and Parquet, Arrow and the hub through `datasets`."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from sft_fast.data.json_records import (
    START,
    BadRecord,
    Place,
    Placed,
    SourceRecord,
    count_lines,
    file_digest,
    file_identity,
    open_content,
)
from sft_fast.data.table_values import record_converter

_OTHER_DELIMITER = re.compile(r"[;\t|,]")
EVAL_SPLITS = ("eval", "validation", "valid", "val", "dev", "test")
ROWS_PER_STATE = 256


class CsvPart:
    """A CSV file (.tsv: with tabs) with a line of column names; every value is text.

    Read with the standard library: `datasets` guesses types, so that the answer "42" becomes a
    number and the answer "NA" nothing, and it does not know the lines of the records.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def digest(self) -> str:
        """Hash of the file's bytes."""
        return file_digest(self.name)

    def count(self) -> int | None:
        """Lines below the column names: a record may have several."""
        with open_content(self.name) as stream:
            return count_lines(stream) - 1

    def identity(self) -> str:
        """As `JsonPart.identity`."""
        return file_identity(self.name)

    def read(self, start: Place = START) -> Placed:
        """Yields the records behind `start`; what comes before is parsed again.

        Raises:
            ValueError: the file is no CSV, or holds no record.
        """
        # The limit of 128 KiB a field is shorter than some answers.
        csv.field_size_limit(sys.maxsize)
        delimiter = "\t" if ".tsv" in self.name else ","
        reader = csv.reader(self._lines(), delimiter=delimiter, strict=True)
        try:
            columns = next(reader, None)
            if not columns:
                raise ValueError(f"{self.name}: the file is empty; expected column names and rows")
            if len(columns) == 1 and (found := _OTHER_DELIMITER.search(columns[0])):
                raise ValueError(
                    f"{self.name}:1: the column names are separated by {found[0]!r}; expected "
                    f"{delimiter!r}. Save it with that, or with tabs as .tsv"
                )
            if len(set(columns)) != len(columns):
                raise ValueError(f"{self.name}:1: a column name occurs twice: {', '.join(columns)}")
            for number, (line, values) in enumerate(self._rows(reader), start=1):
                if number > start.number:
                    yield Place(number, reader.line_num), self._record(line, values, columns)
        except csv.Error as error:
            raise ValueError(f"{self.name}:{reader.line_num}: not valid CSV: {error}") from None
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error}") from error

    def _rows(self, reader: Any) -> Iterator[tuple[int, list[str]]]:
        """First line and fields of each row that is not blank."""
        line, count = reader.line_num + 1, 0
        for values in reader:
            count += 1
            if values:
                yield line, values
            line = reader.line_num + 1
        if not count:
            raise ValueError(f"{self.name}: there are column names but no records")

    def _record(self, line: int, values: list[str], columns: list[str]) -> SourceRecord | BadRecord:
        if len(values) == len(columns):
            return SourceRecord(dict(zip(columns, values, strict=True)), self.name, line)
        problem = f"{len(values)} fields; expected {len(columns)} ({', '.join(columns)})"
        return BadRecord(self.name, line, f"{self.name}:{line}: the record has {problem}")

    def _lines(self) -> Iterator[str]:
        with open_content(self.name) as stream:
            for line, raw in enumerate(stream, start=1):
                try:
                    yield (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self.name}:{line}:{error.start + 1}: byte 0x{raw[error.start]:02x} is "
                        "not UTF-8; save the file as UTF-8"
                    ) from None


class TablePart:
    """A Parquet or Arrow file, read record by record; lines are record numbers."""

    def __init__(self, name: str, kind: str) -> None:
        """`kind` is "parquet" or "arrow"."""
        self.name = name
        self._kind = kind

    def digest(self) -> str:
        """Hash of the file's bytes."""
        return file_digest(self.name)

    def count(self) -> int | None:
        """Records, from the end of a Parquet file; None for Arrow."""
        if self._kind != "parquet":
            return None
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(self.name).num_rows

    def identity(self) -> str:
        """As `JsonPart.identity`."""
        return file_identity(self.name)

    def read(self, start: Place = START) -> Placed:
        """Yields the records behind `start`.

        Raises:
            ValueError: the file cannot be read, or has no rows.
        """
        import datasets

        try:
            # Streaming reads the file where it is; otherwise it would be copied to a cache first.
            dataset = datasets.load_dataset(
                self._kind, data_files=[self.name], split="train", streaming=True
            )
            yield from _read_dataset(dataset, self.name, start)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            hint = "; write that column as JSON text" if "dtype equivalent" in str(error) else ""
            raise ValueError(
                f"{self.name}: not a readable {self._kind} file: {error}{hint}"
            ) from error


class HubPart:
    """One split of a hub data set: downloaded on first use, or streamed."""

    def __init__(
        self,
        source: str,
        repo: str,
        config: str | None,
        rev: str | None,
        split: str,
        bounds: tuple[int, int | None] | None = None,
    ) -> None:
        """
        Args:
            source: the hub name as the user wrote it.
            repo: its repository.
            config: its configuration; None = the only one.
            rev: its revision; None = the newest.
            split: split expression; with `bounds` only the name of a split.
            bounds: first record and the record behind the last (None: the end) to stream; None: the
                split is downloaded.
        """
        self.name = f"{source}[{split}]"
        self._source, self._repo, self._config, self._rev = source, repo, config, rev
        self._split, self._bounds = split, bounds

    @cached_property
    def _builder(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset_builder(self._repo, self._config, revision=self._rev)
        except (OSError, ValueError) as error:
            raise hub_error(self._source, error) from error

    @cached_property
    def _dataset(self) -> Any:
        """The downloaded split."""
        builder = self._builder
        try:
            builder.download_and_prepare()
            return builder.as_dataset(split=self._split)
        except (OSError, ValueError) as error:
            raise hub_error(self._source, error) from error

    def digest(self) -> str:
        """Hash of repository, revision or files, split and slice."""
        # The hash of a builder is that of the revision, or of the data files.
        parts = (self._repo, self._builder.config.name, self._builder.hash, self._split)
        return " ".join(map(str, (*parts, self._bounds or "")))

    def count(self) -> int | None:
        """Rows; None for a stream."""
        return len(self._dataset) if self._bounds is None else None

    def identity(self) -> str:
        """As `JsonPart.identity`."""
        return self.digest()

    def read(self, start: Place = START) -> Placed:
        """Yields the records behind `start`.

        Raises:
            ValueError: the hub does not give them, or there are none.
        """
        if self._bounds is None:
            yield from _read_dataset(self._dataset, self.name, start)
            return
        try:
            # A new one for every pass: a stream that was told where to begin begins there again.
            dataset = self._builder.as_streaming_dataset(split=self._split)
            yield from _read_dataset(dataset, self.name, start, *self._bounds)
        except OSError as error:
            raise hub_error(self._source, error) from error


def _read_dataset(
    dataset: Any, name: str, start: Place, first: int = 0, stop: int | None = None
) -> Placed:
    """Yields rows first to stop - 1 of a `datasets` data set, those behind `start`."""
    begin, hint = max(start.number, first), start.hint
    skipped = begin
    if hint is not None:
        # The state of a stream leads to its rows without reading what comes before.
        state, place_of_state = hint
        dataset.load_state_dict(state)
        skipped -= place_of_state
    end = None if stop is None else skipped + max(stop - begin, 0)
    number, convert = begin, record_converter(getattr(dataset, "features", None))
    for number, values in enumerate(islice(dataset, skipped, end), start=begin + 1):
        # Taking the state costs as much as a few rows.
        if number % ROWS_PER_STATE == 0 and hasattr(dataset, "state_dict"):
            hint = (dataset.state_dict(), number)
        yield Place(number, number, hint), SourceRecord(convert(values), name, number)
    if number == first:
        raise ValueError(f"{name}: there are no records")


def hub_eval_split(source: str, repo: str, config: str | None, rev: str | None) -> str:
    """The first of `EVAL_SPLITS` that a hub data set has; ValueError where it has none."""
    import datasets

    try:
        names = datasets.get_dataset_split_names(repo, config, revision=rev)
    except (OSError, ValueError) as error:
        raise hub_error(source, error) from error
    for name in EVAL_SPLITS:
        if name in names:
            return name
    raise ValueError(
        f"{source} has none of the splits {', '.join(EVAL_SPLITS)}; it has {', '.join(names)}. "
        "Choose one with data.eval_split, for example 'train[95%:]'"
    )


def hub_error(source: str, error: Exception) -> ValueError:
    """What is said when the hub does not give a data set."""
    return ValueError(
        f"the data source {source!r} is no local file or directory, and the hub answered: {error}"
    )
