"""Records of local files, directories, globs, the hub, or the embedded demo; and their mixtures.

Every record knows where it came from. JSON and CSV are parsed here and not by `datasets`, because a
bad record must be reported with its file and line.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from sft_fast.data.json_records import (
    COMPRESSIONS,
    START,
    BadRecord,
    JsonPart,
    Place,
    Placed,
    SourceRecord,
)
from sft_fast.data.table_records import EVAL_SPLITS, CsvPart, HubPart, TablePart, hub_eval_split

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = (*KINDS, *(f"{s}{c}" for s in (".jsonl", ".json", ".csv") for c in COMPRESSIONS))
# What `datasets` and the hub put beside the data.
_NO_DATA = re.compile(r"(dataset_infos?|dataset_dict|state|config)\.json|cache-.*\.arrow|\..*")
_SPLITS = ("train", *EVAL_SPLITS)
_SPLIT_FOLDER = re.compile(rf"({'|'.join(_SPLITS)})([-_. ]?(set|split|data|\d+))*")
_SPLIT_EXPRESSION = re.compile(r"(?P<name>[\w-]+)(?P<slices>\[.*\])?")
_RECORD_NUMBERS = re.compile(r"\[(\d*):(\d*)\]")
_HUB_SOURCE = re.compile(
    r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<rev>[\w./-]+))?"
)
_GLOB_CHARACTERS = re.compile(r"[*?\[]")


class _Part(Protocol):
    """A file, or something that reads like one."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str: ...

    def identity(self) -> str: ...

    def count(self) -> int | None: ...

    def read(self, start: Place = START) -> Placed: ...


class Position(NamedTuple):
    """How far a source was read, as JSON can hold it."""

    passes: int = 0
    """Whole passes over the source."""
    part: int = 0
    """Which of its files is being read."""
    number: int = 0
    """Records read in this pass."""
    place: Place = START
    """How far the file was read."""

    @classmethod
    def of(cls, values: Sequence[Any]) -> Position:
        """The position that JSON has as a list."""
        passes, part, number, place = values
        return cls(passes, part, number, Place(*place))


class Records:
    """The records of a source, read again from the start by every iteration.

    Attributes:
        name: what the user wrote, with the split that was chosen.
        left_out: files of the directory that are in no split, because others have one in their name
            and these do not.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[_Part],
        selection: str | None = None,
        share: tuple[float, float] | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """
        Args:
            name: see above.
            parts: the files, in reading order.
            selection: slices of the records, as in `[:90%]`.
            share: only records whose content hashes into [low, high) of [0, 1).
            left_out: see above.
        """
        self.name = name
        self.left_out = tuple(left_out)
        self._parts = tuple(parts)
        self._selection = selection
        self._share = share

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files (or of the hub split), in reading order."""
        return tuple(part.name for part in self._parts)

    @cached_property
    def digest(self) -> str:
        """`content_digest` when it was first asked for."""
        return self.content_digest()

    def content_digest(self) -> str:
        """xxh3_128 of the content and of the selected records, whatever the files are called."""
        chosen = self._selection or "" if self._share is None else f"{self._selection}{self._share}"
        hasher = xxhash.xxh3_128(chosen.encode())
        for part in self._parts:
            hasher.update(part.digest().encode())
        return hasher.hexdigest()

    @cached_property
    def identity(self) -> str:
        """xxh3_128 of what tells these records from others, without reading all of them."""
        parts = [self._selection or "", *(part.identity() for part in self._parts)]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    def count(self) -> int | None:
        """About how many records there are, without parsing them; None: it cannot be told."""
        counts = [part.count() for part in self._parts]
        known = [count for count in counts if count is not None]
        if self._selection is not None or len(known) < len(counts):
            return None
        low, high = self._share or (0.0, 1.0)
        return round(sum(known) * (high - low))

    def hold_out(self, fraction: float) -> tuple[Records, Records]:
        """Parts the records in two: what is left, and about `fraction` of them held out.

        The content of a record decides, so that equal records stay together: no held-out record is
        also among the others.
        """
        whole = (self.name, self._parts, self._selection)
        kept, held_out = (fraction, 1.0), (0.0, fraction)
        return Records(*whole, kept, self.left_out), Records(*whole, held_out, self.left_out)

    def scan(self) -> Iterator[SourceRecord | BadRecord]:
        """Yields every record in order, the unreadable ones as `BadRecord`.

        Raises:
            ValueError: for a file that cannot be read at all.
        """
        if self._share is None:
            yield from self._scan_selection()
            return
        low, high = self._share
        num_records, is_empty = 0, True
        for num_records, record in enumerate(self._scan_selection(), start=1):  # noqa: B007
            # An unreadable record is reported once: by the part that is trained on.
            place = 1 - 2**-53 if isinstance(record, BadRecord) else _share_of(record)
            if low <= place < high:
                is_empty = False
                yield record
        if is_empty:
            what = "holds out none" if low == 0 else "leaves none"
            raise ValueError(
                f"data.eval_fraction {what} of the {num_records} records of {self.name}, each of "
                "which is drawn by its content; choose another share, or name data.eval"
            )

    def _scan_selection(self) -> Iterator[SourceRecord | BadRecord]:
        if self._selection is None:
            yield from self._scan_all()
            return
        total = sum(1 for _ in self._scan_all())
        for start, stop in _slice_bounds(self._selection, total):
            for number, record in enumerate(self._scan_all()):
                if number >= stop:
                    break
                if number >= start:
                    yield record

    def __iter__(self) -> Iterator[SourceRecord]:
        """Yields every record in order.

        Raises:
            ValueError: at the first record that is unreadable, naming file:line:column.
        """
        for record in self.scan():
            if isinstance(record, BadRecord):
                raise ValueError(record.message)
            yield record

    def follow(
        self, start: Position | None = None
    ) -> Iterator[tuple[Position, SourceRecord | BadRecord]]:
        """Yields the records behind `start`, for ever: after the last one comes the first again.

        Returns: each record, with the position behind it.

        Raises:
            ValueError: there are no records, or slices that are no record numbers.
        """
        begin = start or Position()
        while True:
            is_empty = begin.number == 0
            for position, record in self._follow_pass(begin):
                is_empty = False
                yield position, record
            if is_empty:
                raise ValueError(f"{self.name}: there are no records")
            begin = Position(begin.passes + 1)

    def _follow_pass(self, start: Position) -> Iterator[tuple[Position, SourceRecord | BadRecord]]:
        """What is left of one pass."""
        first, stop = _stream_bounds(self._selection or "[:]")
        number = start.number
        if number == stop:
            return
        for part_number, part in enumerate(self._parts[start.part :], start.part):
            for place, record in part.read(start.place if part_number == start.part else START):
                number += 1
                if number > first:
                    yield Position(start.passes, part_number, number, place), record
                if number == stop:
                    return

    def _scan_all(self) -> Iterator[SourceRecord | BadRecord]:
        for part in self._parts:
            for _, record in part.read():
                yield record


@dataclass(frozen=True)
class Source:
    """Records with how to read and how often to use them.

    Attributes:
        records: the records.
        format_name: a registered format, or "auto": decided by the first record of each file.
        fields: our field -> the source's column.
        weight: share of this source in a mixture, relative to the other weights; None: all records.
        repeat: how many times each record is used, with a weight: at most.
    """

    records: Records
    format_name: str = "auto"
    fields: Mapping[str, str | None] = field(default_factory=dict)
    weight: float | None = None
    repeat: int = 1


def load_records(
    source: str, split: str | None = None, *, evaluation: bool = False, streaming: bool = False
) -> Records:
    """Finds the records of a data source; the records themselves are read on iteration.

    Args:
        source: "demo"; a file of one of `SUFFIXES`; a directory of such files, also in directories
            below it; a glob; or a hub name, `owner/name[:config][@revision]`.
        split: split name, with slices if wanted (`train[:90%]`, `train[100:]`). A single file or a
            glob has the one split `train`. The split of a file in a directory is the split word in
            its name (`train-00.jsonl`), or else the folder of that name; where none has one, all
            files are `train`.
            None means `train`, or, with `evaluation`, the first of `EVAL_SPLITS` that the source
            has (a single file or a glob is then used whole).
        evaluation: chooses the default of `split`.
        streaming: reads a hub data set while it comes, without a copy on disk; slices are then
            record numbers only. Local files are never copied.

    Raises:
        ValueError: the source or the split does not exist, or a file is empty or not UTF-8.
    """
    if split is not None and not _SPLIT_EXPRESSION.fullmatch(split):
        raise ValueError(f"cannot read the split {split!r}; expected for example 'train[:90%]'")
    if source == "demo":
        return _load_demo(split, evaluation)
    if not source:
        raise ValueError("the data source is empty; name a file, a directory or a hub data set")
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _load_directory(path, split, evaluation)
    if os.path.exists(path):
        return _load_files(source, [path], split)
    if _GLOB_CHARACTERS.search(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise ValueError(f"no file matches the data source {source!r}")
        return _load_files(source, found, split)
    if looks_local(path):
        raise ValueError(_missing_file_message(path))
    return _load_hub(source, split, evaluation, streaming)


def _load_demo(split: str | None, evaluation: bool) -> Records:
    from sft_fast.data.demo import demo_files

    match = _SPLIT_EXPRESSION.fullmatch(split or ("eval" if evaluation else "train"))
    assert match is not None
    files = demo_files()
    if match["name"] not in ("train", "eval"):
        raise ValueError(f"the demo data has no split {match['name']!r}; it has train and eval")
    chosen = [JsonPart(f"demo/{n}", c) for n, c in files.items() if n.startswith(match["name"])]
    return Records(f"demo[{match['name']}]", chosen, _selection(split))


def _load_files(source: str, paths: Sequence[str], split: str | None) -> Records:
    if split is not None and re.match(r"[\w-]+", split)[0] != "train":  # type: ignore[index]
        raise ValueError(
            f"{source} has the one split 'train', not {split!r}; "
            "to hold out a part of it use slices, for example 'train[90%:]'"
        )
    return Records(source, [_file_part(path) for path in paths], _selection(split))


def _file_part(path: str) -> _Part:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(
            f"{path} is a pipe or a device, and records are read more than once; expected a file"
        )
    kind = _kind(path)
    if kind == "json":
        return JsonPart(path)
    if kind == "csv":
        return CsvPart(path)
    if kind is not None:
        return TablePart(path, kind)
    raise ValueError(f"{path}: cannot read this kind of file; expected {_listed(SUFFIXES)}")


def _kind(path: str) -> str | None:
    """What a file's name says of its content; compressed tables do not exist."""
    stem, compression = os.path.splitext(path)
    if compression not in COMPRESSIONS:
        return KINDS.get(compression)
    kind = KINDS.get(os.path.splitext(stem)[1])
    return kind if kind in ("json", "csv") else None


def _load_directory(path: str, split: str | None, evaluation: bool) -> Records:
    by_split = _files_by_split(path)
    wanted = re.split(r"\[", split)[0] if split else None
    if wanted is None:
        candidates = EVAL_SPLITS if evaluation else ("train",)
        wanted = next((name for name in candidates if name in by_split), candidates[0])
    if wanted not in by_split:
        found = _listed(sorted(name for name in by_split if name))
        raise ValueError(
            f"the directory {path} has no split {wanted!r}; its file names give {found}"
            f"{_without_split(by_split)}. Put the split's name in the file's name "
            "(train-00.jsonl), or name one file"
        )
    parts = [_file_part(os.path.join(path, name)) for name in by_split[wanted]]
    left_out = [os.path.join(path, name) for name in by_split.get("", ())]
    return Records(f"{path}[{wanted}]", parts, _selection(split), left_out=left_out)


def _files_by_split(path: str) -> dict[str, list[str]]:
    """Split -> the data files of a directory, relative to it, sorted; "": those without one."""
    names = []
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        found = [name for name in files if _kind(name) and not _NO_DATA.fullmatch(name)]
        names += [os.path.relpath(os.path.join(folder, name), path) for name in found]
    if not names:
        raise ValueError(f"the directory {path} holds no {_listed(SUFFIXES)} file")
    by_split: dict[str, list[str]] = {}
    stems: dict[str, str] = {}
    for name in sorted(names):
        stem = re.sub(r"\.\w+(\.(gz|zst))?$", "", name)
        if stem in stems:
            raise ValueError(
                f"the directory {path} holds {stems[stem]} and {name}: the same records twice? "
                "Name the one to use"
            )
        stems[stem] = name
        by_split.setdefault(_split_of(name), []).append(name)
    return {"train": by_split[""]} if set(by_split) == {""} else by_split


def _without_split(by_split: Mapping[str, Sequence[str]]) -> str:
    names = by_split.get("", ())
    return f", and {_listed(names)} {'have' if len(names) > 1 else 'has'} none" if names else ""


def _split_of(name: str) -> str:
    """The split that a file's path names, or "".

    A word of the file's own name counts before the folders, and of these, the nearest first, only
    one whose whole name is a split: dev-tools is no dev split, test-set is one.
    """
    *folders, file = name.lower().split(os.sep)
    words = re.split(r"[^a-z]+", file)
    split = next((word for word in words if word in _SPLITS), None)
    if split is None:
        matches = (_SPLIT_FOLDER.fullmatch(folder) for folder in reversed(folders))
        split = next((match[1] for match in matches if match), "")
    return split


def _load_hub(source: str, split: str | None, evaluation: bool, streaming: bool) -> Records:
    match = _HUB_SOURCE.fullmatch(source)
    if not match:
        raise ValueError(
            f"the data source {source!r} does not exist here and is not a hub name; "
            "expected a path, or owner/name[:config][@revision]"
        )
    repo, config, rev = match["repo"], match["config"], match["rev"]
    if split is None:
        split = hub_eval_split(source, repo, config, rev) if evaluation else "train"
    bounds = None
    if streaming:
        slices = _selection(split) or ""
        split, bounds = split.removesuffix(slices), _stream_bounds(slices or "[:]")
    return Records(f"{source}[{split}]", [HubPart(source, repo, config, rev, split, bounds)])


def _stream_bounds(slices: str) -> tuple[int, int | None]:
    """Numbers of the first record that is streamed and of the one behind the last; None: the end.

    Raises:
        ValueError: the slices are no record numbers.
    """
    numbers = _RECORD_NUMBERS.fullmatch(slices)
    if not numbers:
        raise ValueError(
            f"cannot stream the slice {slices!r}: only record numbers are known before the end, "
            "for example 'train[:10000]'; or set data.streaming: false"
        )
    return int(numbers[1] or 0), int(numbers[2]) if numbers[2] else None


def _share_of(record: SourceRecord) -> float:
    """A number in [0, 1) that the content of a record decides."""
    text = json.dumps(record.values, sort_keys=True, default=str)
    return (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) >> 11) / 2**53


def _selection(split: str | None) -> str | None:
    """The slices of a split expression: 'train[:90%]' -> '[:90%]'."""
    match = _SPLIT_EXPRESSION.fullmatch(split or "")
    return match["slices"] if match else None


def _slice_bounds(selection: str, total: int) -> list[tuple[int, int]]:
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(f"records{selection}").to_absolute(
            {"records": total}
        )
    except (ValueError, AssertionError) as error:
        raise ValueError(f"cannot read the slice {selection!r}: {error}") from error
    bounds = [(part.from_, part.to) for part in instructions]
    if all(start >= stop for start, stop in bounds):
        raise ValueError(f"the slice {selection!r} of {total} records is empty")
    return bounds


def looks_local(path: str) -> bool:
    """True for what is meant as a path, whether it exists or not."""
    is_file_name = path.endswith((*SUFFIXES, *COMPRESSIONS, ".txt"))
    first = path.split("/")[0]
    return is_file_name or path.startswith((".", "/")) or ("/" in path and os.path.isdir(first))


def _missing_file_message(path: str) -> str:
    parent = Path(path).parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent = parent.parent
        return f"{path} does not exist; the path is right up to {parent.resolve()}"
    names = os.listdir(parent)
    near = difflib.get_close_matches(Path(path).name, names, n=3)
    nearest = f"; nearest names there: {_listed(near)}" if near else ""
    return f"{path} does not exist in {parent.resolve()}{nearest}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
