"""Rows from local JSON files, directories, globs, the hub, or the embedded demo.

Local files are parsed here and not by `datasets`, because a bad row must be reported with its file
and line. Every row knows where it came from.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import xxhash

from sft_fast.data.json_rows import BadRow, JsonPart, Row

SUFFIXES = (".jsonl", ".json", ".ndjson")
EVAL_SPLITS = ("eval", "validation", "valid", "val", "dev", "test")
_SPLIT_EXPRESSION = re.compile(r"(?P<name>[\w-]+)(?P<slices>\[.*\])?")
_HUB_SOURCE = re.compile(
    r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<rev>[\w./-]+))?"
)
_GLOB_CHARACTERS = re.compile(r"[*?\[]")


class _Part(Protocol):
    """A file, or something that reads like one."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str: ...

    def read(self) -> Iterator[Row | BadRow]: ...


class Rows:
    """The rows of a source, read again from the start by every iteration.

    Attributes:
        name: what the user wrote, with the split that was chosen.
    """

    def __init__(self, name: str, parts: Sequence[_Part], selection: str | None = None) -> None:
        self.name = name
        self._parts = tuple(parts)
        self._selection = selection

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files (or of the hub split), in reading order."""
        return tuple(part.name for part in self._parts)

    @cached_property
    def digest(self) -> str:
        """xxh3_128 of the content and of the selected slice, whatever the files are called."""
        hasher = xxhash.xxh3_128((self._selection or "").encode())
        for part in self._parts:
            hasher.update(part.digest().encode())
        return hasher.hexdigest()

    def scan(self) -> Iterator[Row | BadRow]:
        """Yields every row in order, the unreadable ones as `BadRow`.

        Raises:
            ValueError: for a file that cannot be read at all.
        """
        if self._selection is None:
            yield from self._scan_all()
            return
        total = sum(1 for _ in self._scan_all())
        for start, stop in _slice_bounds(self._selection, total):
            for number, row in enumerate(self._scan_all()):
                if number >= stop:
                    break
                if number >= start:
                    yield row

    def __iter__(self) -> Iterator[Row]:
        """Yields every row in order.

        Raises:
            ValueError: at the first row that is unreadable, naming file:line:column.
        """
        for row in self.scan():
            if isinstance(row, BadRow):
                raise ValueError(row.message)
            yield row

    def _scan_all(self) -> Iterator[Row | BadRow]:
        for part in self._parts:
            yield from part.read()


def load_rows(source: str, split: str | None = None, *, evaluation: bool = False) -> Rows:
    """Finds the rows of a data source; the rows themselves are read on iteration.

    Args:
        source: "demo"; a .jsonl/.json file (lines of objects, or one list of objects); a directory
            of such files; a glob; or a hub name, `owner/name[:config][@revision]`.
        split: split name, with slices if wanted (`train[:90%]`, `train[100:]`). A single file or a
            glob has the one split `train`. The split of a file in a directory is the split word in
            its name (`train-00.jsonl`); where no name has one, all files are `train`.
            None means `train`, or, with `evaluation`, the first of `EVAL_SPLITS` that the source
            has (a single file or a glob is then used whole).
        evaluation: chooses the default of `split`.

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
    if _looks_local(path):
        raise ValueError(_missing_file_message(path))
    return _load_hub(source, split, evaluation)


class _HubPart:
    """One split of a hub data set, downloaded on first use and read from its memory map."""

    def __init__(self, source: str, repo: str, config: str | None, rev: str | None, split: str):
        self.name = f"{source}[{split}]"
        self._source, self._repo, self._config, self._rev = source, repo, config, rev
        self._split = split

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self._repo, self._config, split=self._split, revision=self._rev
            )
        except (OSError, ValueError) as error:
            raise _hub_error(self._source, error) from error

    def digest(self) -> str:
        return str(self._dataset._fingerprint)

    def read(self) -> Iterator[Row | BadRow]:
        if len(self._dataset) == 0:
            raise ValueError(f"{self.name}: the split has no rows")
        for number, values in enumerate(self._dataset, start=1):
            yield Row(values, self.name, number)


def _load_demo(split: str | None, evaluation: bool) -> Rows:
    from sft_fast.data.demo import demo_files

    match = _SPLIT_EXPRESSION.fullmatch(split or ("eval" if evaluation else "train"))
    assert match is not None
    files = demo_files()
    if match["name"] not in ("train", "eval"):
        raise ValueError(f"the demo data has no split {match['name']!r}; it has train and eval")
    chosen = [JsonPart(f"demo/{n}", c) for n, c in files.items() if n.startswith(match["name"])]
    return Rows(f"demo[{match['name']}]", chosen, _selection(split))


def _load_files(source: str, paths: Sequence[str], split: str | None) -> Rows:
    if split is not None and re.match(r"[\w-]+", split)[0] != "train":  # type: ignore[index]
        raise ValueError(
            f"{source} has the one split 'train', not {split!r}; "
            "to hold out a part of it use slices, for example 'train[90%:]'"
        )
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise ValueError(f"{path}: cannot read this kind of file; expected {_listed(SUFFIXES)}")
    return Rows(source, [JsonPart(path) for path in paths], _selection(split))


def _load_directory(path: str, split: str | None, evaluation: bool) -> Rows:
    names = sorted(name for name in os.listdir(path) if name.endswith(SUFFIXES))
    if not names:
        raise ValueError(f"the directory {path} holds no {_listed(SUFFIXES)} file")
    by_split: dict[str, list[str]] = {}
    for name in names:
        words = re.split(r"[^a-z]+", name.lower())
        found = next((word for word in words if word in ("train", *EVAL_SPLITS)), "")
        by_split.setdefault(found, []).append(os.path.join(path, name))
    if set(by_split) == {""}:
        by_split = {"train": by_split[""]}
    wanted = re.split(r"\[", split)[0] if split else None
    if wanted is None:
        candidates = EVAL_SPLITS if evaluation else ("train",)
        wanted = next((name for name in candidates if name in by_split), candidates[0])
    if wanted not in by_split:
        raise ValueError(
            f"the directory {path} has no split {wanted!r}; its file names give "
            f"{_listed(sorted(name for name in by_split if name))}. Put the split's name in the "
            "file's name (train-00.jsonl), or name one file"
        )
    parts = [JsonPart(name) for name in by_split[wanted]]
    return Rows(f"{path}[{wanted}]", parts, _selection(split))


def _load_hub(source: str, split: str | None, evaluation: bool) -> Rows:
    match = _HUB_SOURCE.fullmatch(source)
    if not match:
        raise ValueError(
            f"the data source {source!r} does not exist here and is not a hub name; "
            "expected a path, or owner/name[:config][@revision]"
        )
    repo, config, rev = match["repo"], match["config"], match["rev"]
    if split is None:
        split = _hub_eval_split(source, repo, config, rev) if evaluation else "train"
    return Rows(f"{source}[{split}]", [_HubPart(source, repo, config, rev, split)])


def _hub_eval_split(source: str, repo: str, config: str | None, rev: str | None) -> str:
    import datasets

    try:
        names = datasets.get_dataset_split_names(repo, config, revision=rev)
    except (OSError, ValueError) as error:
        raise _hub_error(source, error) from error
    for name in EVAL_SPLITS:
        if name in names:
            return name
    raise ValueError(
        f"{source} has none of the splits {_listed(EVAL_SPLITS)}; it has {_listed(names)}. "
        "Choose one with data.eval_split, for example 'train[95%:]'"
    )


def _hub_error(source: str, error: Exception) -> ValueError:
    return ValueError(
        f"the data source {source!r} is no local file or directory, and the hub answered: {error}"
    )


def _selection(split: str | None) -> str | None:
    """The slices of a split expression: 'train[:90%]' -> '[:90%]'."""
    match = _SPLIT_EXPRESSION.fullmatch(split or "")
    return match["slices"] if match else None


def _slice_bounds(selection: str, total: int) -> list[tuple[int, int]]:
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(f"rows{selection}").to_absolute({"rows": total})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"cannot read the slice {selection!r}: {error}") from error
    bounds = [(part.from_, part.to) for part in instructions]
    if all(start >= stop for start, stop in bounds):
        raise ValueError(f"the slice {selection!r} of {total} rows is empty")
    return bounds


def _looks_local(path: str) -> bool:
    is_file_name = path.endswith((*SUFFIXES, ".csv", ".parquet", ".arrow", ".txt", ".gz"))
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
