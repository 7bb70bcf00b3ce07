"""The samples of sources that are read while they train; nothing of them is stored.

A source is read pass after pass, so it may be larger than the disk or have no end. Several sources
take turns by their weights, and a buffer of samples is shuffled. Every rank reads the same stream.
What comes next depends on the positions in the sources and on the buffer alone: they are the state
with which a stream goes on, and no record before them is read or tokenised again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_fast.data.build import (
    TRUNCATED,
    WANTED,
    BuildOptions,
    count_record,
    maker_options,
    store_fingerprint,
)
from sft_fast.data.formats import FileFormat
from sft_fast.data.json_records import BadRecord, SourceRecord
from sft_fast.data.known_ids import check_ids
from sft_fast.data.memory_store import MemoryStore, StreamSample
from sft_fast.data.sample_maker import Outcome, SampleMaker, make_all
from sft_fast.data.source import Position, Source
from sft_fast.data.store import DataReport, TokenStore
from sft_fast.data.targets import sample_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BATCH_RECORDS = 32
"""Records tokenised at once: few, because the first step waits for the first of them."""
FEWEST_RECORDS = 1000
"""The share of bad records is taken of at least so many."""
NUM_ENDS_KEPT = 1000
IN_EVAL = "in data.eval"

Reject = Callable[[str, int, str, str], None]
"""Called with file, line, reason and message of a record that is not used, or not whole."""


@dataclass(frozen=True)
class SourceState:
    """Where one source of a stream stands."""

    position: Position
    """Behind the last record that was taken."""
    files: dict[str, FileFormat]
    """What the first records of its files decided."""
    num_samples: int
    """Samples taken."""


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands; enough to continue it elsewhere."""

    sources: tuple[SourceState, ...]
    report: DataReport
    """What became of the records taken so far."""
    buffer: tuple[StreamSample, ...]
    """The samples that are shuffled."""
    waiting: tuple[StreamSample, ...]
    """Those that come into the buffer next: the rest of the last record."""
    num_draws: int
    """Random numbers drawn."""
    last_tokens: tuple[int, ...]
    """The last token of each of the first samples."""

    def as_json(self) -> str:
        """All but the samples, as text."""
        sources = [
            {
                "position": one.position,
                "files": {name: asdict(known) for name, known in one.files.items()},
                "num_samples": one.num_samples,
            }
            for one in self.sources
        ]
        report = asdict(self.report)
        numbers = {"num_buffered": len(self.buffer), "num_draws": self.num_draws}
        ends = {"last_tokens": self.last_tokens}
        return json.dumps({"sources": sources, "report": report, **numbers, **ends})

    @classmethod
    def of(cls, text: str, samples: Sequence[StreamSample]) -> StreamState:
        """The state that `as_json` wrote, with its samples: those of the buffer, then the rest."""
        values = json.loads(text)
        sources = tuple(
            SourceState(
                Position.of(one["position"]),
                {name: _format_of(known) for name, known in one["files"].items()},
                one["num_samples"],
            )
            for one in values["sources"]
        )
        buffered = values["num_buffered"]
        return cls(
            sources,
            DataReport(**values["report"]),
            tuple(samples[:buffered]),
            tuple(samples[buffered:]),
            values["num_draws"],
            tuple(values["last_tokens"]),
        )


class _SourceReader:
    """What becomes of the records of one source, for ever."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        options: BuildOptions,
        processes: int,
    ) -> None:
        self.source = source
        self.position = Position()
        self.num_samples = 0
        how = maker_options(source, options)
        self._maker = SampleMaker(tokenizer, how)
        self.template = self._maker.template_source
        self._outcomes = self._read(tokenizer, how, processes)

    def _read(self, *how: Any) -> Iterator[tuple[Position, Outcome]]:
        tokenizer, options, processes = how
        records: Iterator[tuple[Position, SourceRecord | BadRecord]]
        records = self.source.records.follow(self.position)
        for batch in make_all(
            self._maker, tokenizer, options, records, processes, batch_records=BATCH_RECORDS
        ):
            yield from batch

    def restore(self, state: SourceState) -> None:
        """Goes on from `state`; not once something was taken."""
        self.position, self.num_samples = state.position, state.num_samples
        self._maker.files.update(state.files)

    def take(self) -> Outcome:
        """The next outcome.

        Raises:
            ValueError: a whole pass gave no sample; or as `Records.follow`.
        """
        passes = self.position.passes
        self.position, outcome = next(self._outcomes)
        if self.position.passes > passes:
            name = self.source.records.name
            if not self.num_samples:
                raise ValueError(f"no sample of {name} can be used")
            logger.info("%s: read %d times to its end, begins anew", name, self.position.passes)
        return outcome

    def format_of(self, file: str) -> str:
        """The format and the columns of a file, in words; "" = none is known."""
        known = self._maker.files.get(file)
        return "" if known is None else str(known)

    def state(self) -> SourceState:
        """Where the source stands."""
        return SourceState(self.position, self._maker.files.copy(), self.num_samples)


class SampleStream(Iterator[StreamSample]):
    """Samples without end; the same on every rank.

    Attributes:
        report: what became of the records so far.
        parts: what decides the samples, name -> value or digest; see `store_fingerprint`.
        fingerprint: xxh3_128 of the parts.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        options: BuildOptions,
        *,
        buffer_size: int,
        seed: int = 0,
        processes: int = 1,
        held_out: Collection[int] = (),
        reject: Reject | None = None,
        num_known: int | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            sources: where there are several, each has a weight.
            tokenizer: from `load_tokenizer`.
            options: as for a store.
            buffer_size: samples to choose the next one from; 1 = in the order of the sources.
            seed: of the choice.
            processes: how many tokenise; 1 = this one.
            held_out: `sample_hash` of samples that may not train.
            reject: told of every record that is not used, or not whole.
            num_known: token ids that the model has; None = all.

        Raises:
            ValueError: several sources without weights, or with a `repeat`.
        """
        if len(sources) > 1 and any(source.weight is None for source in sources):
            raise ValueError(
                "data.train: of several sources that are streamed each needs a weight, because "
                "how long they are is not known"
            )
        if any(source.repeat > 1 for source in sources):
            raise ValueError(
                "data.train: repeat does not go with data.streaming: a source that has ended "
                "begins anew, as often as train.steps asks for"
            )
        self._options, self._buffer_size, self._seed = options, buffer_size, seed
        self._held_out, self._reject, self._num_known = held_out, reject, num_known
        self._readers = [_SourceReader(source, tokenizer, options, processes) for source in sources]
        self.parts = stream_parts(sources, tokenizer, options) | {"buffer": buffer_size}
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(self.parts).encode())
        self.report = DataReport(
            source=" + ".join(source.records.name for source in sources),
            template=self._readers[0].template,
            left_out=[name for source in sources for name in source.records.left_out],
        )
        self._buffer: list[StreamSample] = []
        self._waiting: list[StreamSample] = []
        self._num_draws = 0
        self._last_tokens: list[int] = []

    def restore(self, state: StreamState) -> None:
        """Goes on from `state`; not once something was read."""
        for reader, source in zip(self._readers, state.sources, strict=True):
            reader.restore(source)
        # Where the records are kept is no part of the state.
        self.report = replace(deepcopy(state.report), left_out=self.report.left_out)
        self._buffer, self._waiting = list(state.buffer), list(state.waiting)
        self._num_draws = state.num_draws
        self._last_tokens = list(state.last_tokens)

    def state(self) -> StreamState:
        """Where the stream stands, the last sample taken."""
        return StreamState(
            tuple(reader.state() for reader in self._readers),
            deepcopy(self.report),
            tuple(self._buffer),
            tuple(self._waiting),
            self._num_draws,
            tuple(self._last_tokens),
        )

    def head(self) -> Sequence[StreamSample]:
        """The samples in the buffer, which is filled first."""
        while len(self._buffer) < self._buffer_size:
            self._buffer.append(self._next_in_order())
        return self._buffer

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [buffer_size], tokens of the samples in the buffer."""
        return MemoryStore.of(self.head()).lengths

    def last_tokens(self, count: int) -> NDArray[np.uint32]:
        """uint32 [count or fewer], the last token of each of the first samples."""
        self.head()
        return np.array(self._last_tokens[:count], np.uint32)

    def summary(self) -> str:
        """What was read so far, in a few lines of text."""
        self.head()
        return f"{self.report.summary()}\nread so far; the rest comes while it trains"

    def __next__(self) -> StreamSample:
        """Returns a random sample of the buffer, whose place the next one in order takes.

        Raises:
            ValueError: a record that cannot be used or is too long, where the options say "error";
                more of them than `max_rejected`; or none can be used.
        """
        self.head()
        bits = xxhash.xxh3_64_intdigest(
            self._num_draws.to_bytes(8, "little"), seed=self._seed % 2**64
        )
        self._num_draws += 1
        place = bits * len(self._buffer) >> 64
        taken, self._buffer[place] = self._buffer[place], self._next_in_order()
        return taken

    def _next_in_order(self) -> StreamSample:
        while not self._waiting:
            reader = min(self._readers, key=_turn)
            outcome = reader.take()
            if outcome.file not in self.report.formats and (name := reader.format_of(outcome.file)):
                self.report.formats[outcome.file] = name
            self._drop_held_out(outcome)
            self._count(outcome)
            samples = outcome.samples if outcome.rejected is None else []
            reader.num_samples += len(samples)
            # As many as are read before the first step, so that a resumed run knows the same.
            room = min(self._buffer_size, NUM_ENDS_KEPT) - len(self._last_tokens)
            self._last_tokens += [int(sample.input_ids[-1]) for sample in samples[: max(room, 0)]]
            origin = f"{outcome.file}:{outcome.line}"
            if self._num_known is not None:
                for sample in samples:
                    check_ids(sample.input_ids, self._num_known, origin)
            # Copies: the arrays of a batch are one, which a sample in the buffer would keep alive.
            self._waiting = [
                StreamSample(
                    sample.input_ids.copy(),
                    sample.supervised.copy(),
                    None if sample.weights is None else sample.weights.copy(),
                    origin,
                )
                for sample in samples
            ]
        return self._waiting.pop(0)

    def _drop_held_out(self, outcome: Outcome) -> None:
        kept = [s for s in outcome.samples if sample_hash(s.input_ids) not in self._held_out]
        if len(kept) == len(outcome.samples):
            return
        listed = (IN_EVAL, f"{outcome.file}:{outcome.line}: data.eval has the same sample")
        if kept:
            outcome.notes.append(listed)
        else:
            outcome.rejected = listed
        outcome.samples[:] = kept

    def _count(self, outcome: Outcome) -> None:
        """Counts a record, and stops at one too many that cannot be used."""
        report, options = self.report, self._options
        report.rows += 1
        for reason, message in count_record(report, outcome):
            if self._reject is not None:
                self._reject(outcome.file, outcome.line, reason, message)
        if options.over_length == "error" and outcome.longest > options.capacity:
            raise ValueError(
                f"{outcome.file}:{outcome.line}: {outcome.longest} tokens, more than "
                f"packing.capacity = {options.capacity}. Raise it, or set data.over_length to "
                "drop, truncate_right, truncate_left or split_turns"
            )
        if outcome.rejected is None or outcome.rejected[0] in (*WANTED, IN_EVAL):
            return
        reason, message = outcome.rejected
        if reason != TRUNCATED and options.on_bad_row == "error":
            raise ValueError(
                f"{message} ({reason}). Mend or remove the record, or set data.on_bad_row: skip"
            )
        num_bad = sum(
            count for why, count in report.rejected.items() if why not in (*WANTED, IN_EVAL)
        )
        if num_bad > options.max_rejected * max(report.rows, FEWEST_RECORDS):
            reasons = ", ".join(f"{count} {why}" for why, count in report.rejected.items())
            raise ValueError(
                f"{num_bad} of {report.rows} records of {report.source} cannot be used "
                f"({reasons}), more than data.max_rejected = {options.max_rejected}; mend them or "
                f"raise it. The last: {message}"
            )


def _format_of(values: dict[str, Any]) -> FileFormat:
    return FileFormat(**values | {"unread": tuple(values["unread"])})


def _turn(reader: _SourceReader) -> float:
    """Whose turn it is: the source that is furthest behind its share of the samples."""
    return (reader.num_samples + 1) / (reader.source.weight or 1.0)


def stream_parts(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, options: BuildOptions
) -> dict[str, Any]:
    """What decides the samples of a stream; as `store_fingerprint`, but for the digest of the
    sources, which are not read whole."""
    every = [
        store_fingerprint(source, tokenizer, options, source.records.identity)[1]
        for source in sources
    ]
    common = {name: every[0][name] for name in ("tokenizer", "template")}
    for parts, source in zip(every, sources, strict=True):
        parts |= {"weight": source.weight}
        del parts["tokenizer"], parts["template"]
    return {**common, "stream": every}


TrainingData = TokenStore | SampleStream
"""What a run trains on."""
