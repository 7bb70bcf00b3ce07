"""The token store: what training reads, memory-mapped, and written once per fingerprint.

A store is a directory:

    tokens.bin         uint32 [total]        token ids, samples one after another
    supervised.bin     uint8 [total / 8]     1 bit per token, little-endian: the token is a target
    weights.bin        float16 [total]       factor of each token's loss; only if one is not 1
    lengths.*.bin      column [N]            tokens of each sample
    lines.*.bin        column [N]            line of each sample's record, as the step from the last
    rejected.jsonl     the records that were dropped or truncated: file, line, reason, message
    meta.json          version, fingerprint and what it was made of, sizes and hashes of the arrays,
                       files, report, and a checksum of these lines

That is 4.125 bytes a token and, for the two columns (columns.py), 0.25 to 3.25 bytes a sample as a
rule: at most 1.1 times the ids from 12 tokens a sample on, weights aside.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from sft_fast.constants import ceil_div
from sft_fast.data.columns import BLOCK_DTYPE, Column, ColumnEncoder
from sft_fast.data.targets import count_targets
from sft_fast.files import sync_folder
from sft_fast.runtime.workplaces import make_workplace

logger = logging.getLogger(__name__)

STORE_VERSION = 4
MOST_REJECTED = 10_000
FLUSH_TOKENS = 1 << 20
"""Tokens collected in memory before they are written; a multiple of 8."""
FLUSH_SAMPLES = 1 << 13
"""Samples collected likewise: many short ones occupy far more than their tokens."""
META_FILE = "meta.json"
NEAR_DUPLICATE = "near duplicate"
"""Reason of samples that `data.near_duplicates` leaves out."""
REJECTED_FILE = "rejected.jsonl"
ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.uint32),
    "supervised": np.dtype(np.uint8),
    "weights": np.dtype(np.float16),
    "lengths.blocks": BLOCK_DTYPE,
    "lengths.data": np.dtype(np.uint8),
    "lines.blocks": BLOCK_DTYPE,
    "lines.data": np.dtype(np.uint8),
}
COLUMNS = ("lengths", "lines")
STEP_BIAS = 1 << 31
"""Added to the steps of line numbers: another file starts again at line 1."""


@dataclass
class DataReport:
    """What became of a source's records.

    Attributes:
        source: name of the source and its split.
        formats: file -> format that it was read in, and the columns that are.
        template: which chat template was used.
        rows: records read.
        samples: samples stored.
        tokens: tokens stored.
        supervised_tokens: stored tokens that are targets.
        longest: tokens of the longest sample, before any truncation.
        truncated: samples cut to the capacity.
        cut_tokens: tokens that were cut off them.
        split: records that gave several samples, because they were too long or their template
            rewrites earlier answers.
        trimmed_turns: turns behind the last supervised one of their record; they are not stored.
        boundary_tokens: supervised tokens that also hold characters of a prompt.
        rejected: reason -> records that are not in the store.
        unread: column, or key of turns, that has no effect -> records that have it.
        odd: what is seldom meant, though it is read as it stands -> records that have it.
        left_out: files of the source's directory that were not read, having no split in their name.
    """

    source: str = ""
    formats: dict[str, str] = field(default_factory=dict)
    template: str = ""
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    split: int = 0
    trimmed_turns: int = 0
    boundary_tokens: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    odd: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The report in a few lines of text."""
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        formats = "; ".join(sorted(set(self.formats.values())))
        lines = [
            f"{self.source}: {self.samples} samples of {self.rows} records, read as {formats}, "
            f"rendered with {self.template} template",
            f"{self.tokens} tokens, {self.supervised_tokens} supervised ({share:.1f} %), "
            f"longest sample {self.longest}",
        ]
        if self.left_out:
            lines.append(
                f"not read: {', '.join(self.left_out)}, in whose name is no split; name it alone, "
                "or a glob with it, to read it"
            )
        if self.unread:
            counts = (f"{name or repr(name)} ({n})" for name, n in sorted(self.unread.items()))
            lines.append(f"in records, without effect: {', '.join(counts)}")
        if self.odd:
            counts = (f"{name} ({count})" for name, count in sorted(self.odd.items()))
            lines.append(f"in records, worth a look: {', '.join(counts)}")
        lines += [f"not used: {count} records, {why}" for why, count in self.rejected.items()]
        if self.truncated:
            lost = f"{self.cut_tokens / (self.tokens + self.cut_tokens):.1%}"
            lines.append(
                f"truncated: {self.truncated} samples, {self.cut_tokens} tokens cut off ({lost})"
            )
        if self.split:
            lines.append(f"split into several samples: {self.split} records")
        if self.trimmed_turns:
            lines.append(f"trimmed: {self.trimmed_turns} turns behind the last supervised one")
        if self.boundary_tokens:
            lines.append(f"{self.boundary_tokens} answers start inside a token of their prompt")
        return "\n".join(lines)


class TokenStore:
    """A store on disk, opened read-only.

    Attributes:
        path: its directory.
        tokens: uint32 [total] memory map.
        supervised_bits: uint8 [ceil(total / 8)] memory map; bit t % 8 of byte t // 8, counted from
            the lowest, is 1 if token t is supervised as a target.
        offsets: int64 [num_samples + 1]; computed on first use, as the next three are.
        lengths: int32 [num_samples], tokens.
        num_supervised: int32 [num_samples]; the first token of a sample has no position before it,
            is never a target and does not count.
        loss_weights: float64 [num_samples], sum of the weights of these targets; None: all 1.
        weights: float16 [total] memory map, factor of each target's loss, above 0; None: all 1.
        fingerprint: of everything that the content depends on.
        parts: what the fingerprint was made of, name -> value or digest.
        report: how the store was built.
        files: (first sample, name) of every file, in order.
    """

    def __init__(
        self, path: Path, meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]
    ) -> None:
        self.path = path
        self.tokens = arrays["tokens"]
        self.supervised_bits = arrays["supervised"]
        self.weights = arrays.get("weights")
        self.fingerprint: str = meta["fingerprint"]
        self.parts: dict[str, Any] = meta["parts"]
        self.report = DataReport(**meta["report"])
        columns = (
            Column(meta["samples"], arrays[f"{name}.blocks"], arrays[f"{name}.data"])
            for name in COLUMNS
        )
        self._lengths, self._line_steps = columns
        self.files: list[tuple[int, str]] = [(first, name) for first, name in meta["files"]]

    @property
    def num_samples(self) -> int:
        """How many samples the store holds."""
        return self._lengths.size

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 [num_samples], tokens of each sample."""
        return self._lengths.values().astype(np.int32)

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [num_samples + 1]; sample i is tokens[offsets[i]:offsets[i + 1]]."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def _targets(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64] | None]:
        """(`num_supervised`, `loss_weights`), each [num_samples]."""
        return count_targets(self)

    @property
    def num_supervised(self) -> npt.NDArray[np.int32]:
        """int32 [num_samples], targets of each sample."""
        return self._targets[0]

    @property
    def loss_weights(self) -> npt.NDArray[np.float64] | None:
        """float64 [num_samples], sum of the targets' weights; None = all weights are 1."""
        return self._targets[1]

    def array_files(self) -> list[Path]:
        """The files that are memory-mapped."""
        return sorted(self.path.glob("*.bin"))

    @property
    def rejected_path(self) -> Path:
        """The list of records that were dropped, truncated or split."""
        return self.path / REJECTED_FILE

    def rejected(self) -> Iterator[dict[str, Any]]:
        """Yields the entries of that list: file, line, reason, message."""
        with self.rejected_path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def summary(self) -> str:
        """The report in a few lines of text, and where records that are not whole are listed."""
        report = self.report
        is_listed = report.rejected or report.truncated or report.split
        return report.summary() + (f"\nlisted in {self.rejected_path}" if is_listed else "")

    def file(self, sample: int) -> str:
        """Name of the file that a sample was made from."""
        return self.files[bisect_right(self.files, sample, key=lambda entry: entry[0]) - 1][1]

    def line(self, sample: int) -> int:
        """Line of the record that a sample was made from."""
        return self._line_steps.sum(sample + 1) - (sample + 1) * STEP_BIAS

    def span(self, sample: int) -> tuple[int, int]:
        """The sample is tokens[start:stop]; found in O(1), before all offsets are computed too."""
        offsets = vars(self).get("offsets")
        if offsets is not None:
            return int(offsets[sample]), int(offsets[sample + 1])
        return self._lengths.sum(sample), self._lengths.sum(sample + 1)

    def last_tokens(self, count: int) -> npt.NDArray[np.uint32]:
        """uint32 [count or fewer], the last token of each of the first samples."""
        return self.tokens[self.offsets[1 : count + 1] - 1]

    def origin(self, sample: int) -> str:
        """`file:line` of the record that a sample was made from."""
        return f"{self.file(sample)}:{self.line(sample)}"

    def sample(self, sample: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Token ids uint32 [n] and supervised mask bool [n] of one sample."""
        start, stop = self.span(sample)
        first = start // 8
        bits = np.unpackbits(self.supervised_bits[first : ceil_div(stop, 8)], bitorder="little")
        mask = bits[start - 8 * first : stop - 8 * first].astype(np.bool_)
        return np.asarray(self.tokens[start:stop]), mask


def open_store(path: str | Path) -> TokenStore:
    """Opens a store without reading its arrays.

    Raises:
        ValueError: there is no complete store of this version at `path`.
        OSError: the disk does not answer; that says nothing of the store.
    """
    path = Path(path)
    meta = read_meta(path)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in meta["bytes"]:
        file = path / f"{name}.bin"
        found = file.stat().st_size if file.exists() else None
        expected = meta["bytes"][name]
        if found != expected:
            raise ValueError(
                f"{file} has {'no' if found is None else found} bytes, expected {expected}; "
                f"delete {path} and it is built anew"
            )
        dtype = ARRAYS[name]
        # An empty file cannot be mapped.
        arrays[name] = np.memmap(file, dtype, "r") if expected else np.zeros(0, dtype)
    return TokenStore(path, meta, arrays)


def read_meta(path: Path) -> dict[str, Any]:
    """The content of meta.json; raises as `open_store`."""
    file = path / META_FILE
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} is no token store: {error}") from error
    try:
        meta = json.loads(text)
        version, checksum = meta["version"], meta.pop("checksum", None)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}; delete {path}") from error
    if version != STORE_VERSION:
        raise ValueError(
            f"the token store {path} has version {version}, expected {STORE_VERSION}; "
            "delete it and it is built anew"
        )
    if checksum != meta_checksum(meta):
        raise ValueError(f"{file} is damaged: its checksum is another; delete {path}")
    assert isinstance(meta, dict)
    return meta


def meta_checksum(meta: Mapping[str, Any]) -> str:
    """xxh3_128 of what meta.json says."""
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())


class StoreWriter:
    """Writes a store: everything goes to a temporary directory that is renamed when complete.

    As a context manager it removes the temporary directory unless `commit` was reached. What
    builds that were killed have left behind is removed as well.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: where the store will appear; its parent is created if needed.

        Raises:
            ValueError: something is there already.
        """
        self._path = Path(path)
        if self._path.exists():
            raise ValueError(f"{self._path} exists; a token store is written to a new directory")
        self._folder = make_workplace(self._path.parent, "building")
        self._open_files = ExitStack()
        enter = self._open_files.enter_context
        self._token_file = enter((self._folder / "tokens.bin").open("wb"))
        self._bit_file = enter((self._folder / "supervised.bin").open("wb"))
        self._reject_file = enter((self._folder / REJECTED_FILE).open("w", encoding="utf-8"))
        self._pending_tokens: list[npt.NDArray[np.uint32]] = []
        self._pending_bits: list[npt.NDArray[np.bool_]] = []
        self._num_pending = 0
        self._num_written = 0
        self._weight_file: BinaryIO | None = None
        self._hashers = {name: xxhash.xxh3_128() for name in ARRAYS}
        self._pending_weights: list[npt.NDArray[np.float16]] = []
        self._columns = {name: ColumnEncoder() for name in COLUMNS}
        self._column_files = {
            f"{name}.{part}": enter((self._folder / f"{name}.{part}.bin").open("wb"))
            for name in COLUMNS
            for part in ("blocks", "data")
        }
        self._num_samples = 0
        self._last_line = 0
        self._files: list[tuple[int, str]] = []

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._open_files.close()
        except OSError:
            # What could not be written when the disk was full; that is the error already.
            if error is None:
                raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            # A failed write does not say of which file.
            error.filename = str(self._folder)

    def add(
        self,
        input_ids: npt.NDArray[np.uint32],
        supervised: npt.NDArray[np.bool_],
        file: str,
        line: int,
        weights: npt.NDArray[np.float16] | None = None,
    ) -> None:
        """Appends a sample.

        Args:
            input_ids: uint32 [n].
            supervised: bool [n]; True = the token is a target.
            file: the record's file.
            line: the record's line, below 2^31.
            weights: float16 [n], above 0 where supervised; None: all 1.
        """
        if weights is not None and self._weight_file is None:
            self._start_weights()
        if self._weight_file is not None:
            ones = np.ones(len(input_ids), np.float16)
            self._pending_weights.append(ones if weights is None else weights)
        self._pending_tokens.append(input_ids)
        self._pending_bits.append(supervised)
        self._num_pending += len(input_ids)
        self._columns["lengths"].append(len(input_ids))
        if not self._files or self._files[-1][1] != file:
            self._files.append((self._num_samples, file))
        self._columns["lines"].append(line - self._last_line + STEP_BIAS)
        self._last_line = line
        self._num_samples += 1
        if self._num_pending >= FLUSH_TOKENS or len(self._pending_tokens) >= FLUSH_SAMPLES:
            self._flush(last=False)

    def reject(self, file: str, line: int, reason: str, message: str) -> None:
        """Lists a record that is not in the store, or not whole."""
        self._reject_file.write(rejected_line(file, line, reason, message))

    @property
    def rejected_path(self) -> Path:
        """Where `keep_rejected` puts the list of rejected records."""
        return self._path.with_name(f"{self._path.name}.{REJECTED_FILE}")

    def keep_rejected(self) -> None:
        """Saves the list of rejected records of a store that will not appear."""
        self._reject_file.flush()
        shutil.copyfile(self._folder / REJECTED_FILE, self.rejected_path)

    def commit(self, fingerprint: str, parts: Mapping[str, Any], report: DataReport) -> TokenStore:
        """Makes the store appear, complete; another that appeared meanwhile is used as it is.

        Args:
            fingerprint: of everything that the content depends on.
            parts: what the fingerprint was made of.
            report: what became of the records.
        """
        assert self._num_samples, "an empty store cannot be memory-mapped"
        self._flush(last=True)
        self._open_files.close()
        meta: dict[str, Any] = {
            "version": STORE_VERSION,
            "fingerprint": fingerprint,
            "parts": dict(parts),
            "samples": self._num_samples,
            "bytes": {
                name: (self._folder / f"{name}.bin").stat().st_size
                for name in ARRAYS
                if name != "weights" or self._weight_file is not None
            },
            "files": [[first, name] for first, name in self._files],
            "report": asdict(report),
        }
        meta["xxh3_128"] = {name: self._hashers[name].hexdigest() for name in meta["bytes"]}
        # Escapes: a file name may be no UTF-8.
        text = json.dumps(meta | {"checksum": meta_checksum(meta)}, indent=1)
        (self._folder / META_FILE).write_text(text, encoding="utf-8")
        for file_path in self._folder.iterdir():
            _sync(file_path)
        _sync(self._folder)
        try:
            os.rename(self._folder, self._path)
        except OSError:
            # Another process was faster: its store is complete, for it was renamed as well.
            if not (self._path / META_FILE).exists():
                raise
        _sync(self._path.parent)
        self.rejected_path.unlink(missing_ok=True)
        return open_store(self._path)

    def _flush(self, last: bool) -> None:
        """Writes what was collected; before the last flush only whole bytes of mask bits."""
        for name, encoder in self._columns.items():
            for part, values in zip(("blocks", "data"), encoder.take(last=last), strict=True):
                self._append(self._column_files[f"{name}.{part}"], f"{name}.{part}", values)
        if not self._pending_tokens:
            return
        tokens = np.concatenate(self._pending_tokens)
        bits = np.concatenate(self._pending_bits)
        count = len(tokens) if last else len(tokens) // 8 * 8
        self._append(self._token_file, "tokens", tokens[:count])
        packed = np.packbits(bits[:count], bitorder="little")
        self._append(self._bit_file, "supervised", packed)
        self._pending_tokens, self._pending_bits = [tokens[count:]], [bits[count:]]
        self._num_pending = len(tokens) - count
        self._num_written += count
        if self._weight_file is not None:
            weights = np.concatenate(self._pending_weights)
            self._append(self._weight_file, "weights", weights[:count])
            self._pending_weights = [weights[count:]]

    def _append(self, file: BinaryIO, name: str, values: npt.NDArray[Any]) -> None:
        """Writes and hashes the next part of an array."""
        data = np.ascontiguousarray(values).view(np.uint8).data
        self._hashers[name].update(data)
        file.write(data)

    def _start_weights(self) -> None:
        """Opens the file of weights, with 1 for every token that came before."""
        self._weight_file = self._open_files.enter_context(
            (self._folder / "weights.bin").open("wb")
        )
        remaining = self._num_written
        while remaining:
            count = min(remaining, FLUSH_TOKENS)
            self._append(self._weight_file, "weights", np.ones(count, np.float16))
            remaining -= count
        self._pending_weights = [np.ones(self._num_pending, np.float16)]


def rejected_line(file: str, line: int, reason: str, message: str) -> str:
    """How a record that is not used, or not whole, is listed."""
    entry = {"file": file, "line": line, "reason": reason, "message": message}
    return json.dumps(entry, ensure_ascii=False) + "\n"


class RejectedList:
    """The records that a stream does not use, or not whole, as lines of a file, each once.

    A record comes again in the next pass, and after a resume. The file has MOST_REJECTED at most: a
    stream has no end, and all of them are counted.
    """

    def __init__(self, path: Path) -> None:
        """Reads and writes nothing yet; what is there stays."""
        self._path = path
        self._is_writable = True

    @cached_property
    def _lines(self) -> set[str]:
        try:
            with self._path.open(encoding="utf-8") as stream:
                return set(stream)
        except FileNotFoundError:
            return set()

    def add(self, file: str, line: int, reason: str, message: str) -> None:
        """Lists a record; a list that cannot be written stops no training."""
        entry = rejected_line(file, line, reason, message)
        try:
            if not self._is_writable or entry in self._lines or len(self._lines) >= MOST_REJECTED:
                return
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(entry)
            self._lines.add(entry)
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("warning: %s is not written: %s", self._path, error)
            self._is_writable = False


def _sync(path: Path) -> None:
    """Forces a file or a directory to disk."""
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
