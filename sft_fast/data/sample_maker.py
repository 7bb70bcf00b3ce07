"""From records to samples, in this process or in several, with the same result.

Batches of records go out in order and their outcomes come back in order; what a batch becomes
depends on nothing but its records, so the number of processes cannot be seen in the store.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from sft_fast.constants import round_up
from sft_fast.data.choices import OverLength
from sft_fast.data.conversation import OPENING_ROLES, Conversation
from sft_fast.data.format_registry import (
    apply_row_function,
    can_be_loaded_elsewhere,
    format_names,
)
from sft_fast.data.formats import ConversationReader, FileFormat
from sft_fast.data.json_records import BadRecord, SourceRecord
from sft_fast.data.oddities import find_oddities
from sft_fast.data.render import ChatRenderer, MaskOptions, RenderedChat
from sft_fast.data.tokens import Sample
from sft_fast.registry import SFT, load_plugins, stages
from sft_fast.runtime.processes import die_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_PER_PROCESS = 3
"""Batches that wait for each process: enough to keep it busy, few enough for little memory."""
SERIAL_BATCHES = 64
"""A source of no more batches is not worth the start of processes."""


@dataclass
class Outcome:
    """What became of one record.

    Attributes:
        file, line: the record.
        samples: its samples; usually one.
        rejected: (reason, message) if there are none.
        notes: (reason, message) of what happened to samples that are there.
        longest: tokens before any truncation.
        truncated: samples that were cut.
        cut_tokens: tokens that were cut off.
        trimmed_turns: turns behind the last supervised one.
        unread: its columns, and keys of its turns, that have no effect.
        odd: what is seldom meant in it, see `find_oddities`.
        group_size: samples of a record that stay together.
    """

    file: str
    line: int
    samples: list[Sample] = field(default_factory=list)
    rejected: tuple[str, str] | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)
    longest: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    trimmed_turns: int = 0
    unread: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    group_size: int = 1


class SampleRules(Protocol):
    """What a stage says of samples; `sft_fast.stages.Stage` is one."""

    group_size: ClassVar[int]
    """Samples of a record, which stay together."""
    trains_answers: ClassVar[bool]
    """The targets are the tokens of answers, and end with one that stops."""

    def targets(self, sample: Sample) -> Sample:
        """The sample with the stage's own targets."""


class AnswerRules:
    """Those of supervised fine-tuning."""

    group_size: ClassVar[int] = 1
    trains_answers: ClassVar[bool] = True

    def targets(self, sample: Sample) -> Sample:
        """The sample as it is: the answers' tokens are the targets."""
        return sample


@dataclass(frozen=True)
class StageOptions:
    """The stage of a run, in a form that other processes read.

    Attributes:
        name: as registered; "sft" has no rules of its own.
        plugins: files to run first.
        section: its keys in the configuration.
    """

    name: str = SFT
    plugins: tuple[str, ...] = ()
    section: Mapping[str, Any] = field(default_factory=dict)

    def rules(self) -> SampleRules:
        """Runs the plugins, and makes the stage."""
        load_plugins(self.plugins)
        if self.name == SFT:
            return AnswerRules()
        kind: Any = stages.get(self.name)
        made: SampleRules = kind(None if kind.section is None else kind.section(**self.section))
        return made


SFT_OPTIONS = StageOptions()


@dataclass(frozen=True)
class MakerOptions:
    """How records become samples; see `BuildOptions`."""

    format_name: str
    fields: Mapping[str, str | None]
    row_functions: Sequence[str]
    mask: MaskOptions
    capacity: int
    over_length: OverLength
    stage: StageOptions = SFT_OPTIONS
    alignment: int = 1

    def can_be_made_elsewhere(self) -> bool:
        """Whether other processes find the formats and row functions."""
        names = format_names() if self.format_name == "auto" else ()
        return can_be_loaded_elsewhere(names or (self.format_name,), self.row_functions)


class SampleMaker:
    """Formats, renders and tokenises records, and makes them fit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: MakerOptions) -> None:
        self._options, self._rules = options, options.stage.rules()
        self._reader = ConversationReader(options.format_name, options.fields)
        self._renderer = ChatRenderer(tokenizer, options.mask)
        self.template_source = self._renderer.template_source

    def look(self, record: SourceRecord) -> FileFormat:
        """The format of a record's file; ValueError where nothing recognises it."""
        return self._reader.look(record)

    @property
    def files(self) -> dict[str, FileFormat]:
        """What is known of the files so far."""
        return self._reader.files

    def make(
        self, records: Sequence[SourceRecord], files: Mapping[str, FileFormat], needs_samples: bool
    ) -> list[Outcome]:
        """Makes the samples of a batch.

        Args:
            records: the batch.
            files: what the first records of their files decided.
            needs_samples: False: the records are only checked, without the cost of tokenising.
        """
        self._reader.files.update(files)
        size = self._rules.group_size
        outcomes = [Outcome(record.file, record.line, group_size=size) for record in records]
        chats: list[tuple[int, Conversation, RenderedChat]] = []
        for number, record in enumerate(records):
            outcome = outcomes[number]
            reason = "not in the format"
            try:
                group = self._reader.group(record)
                self._check_group(record, group)
                odd = [name for one in group for name in find_oddities(one)]
                outcome.odd = tuple(dict.fromkeys(odd))
                reason = "not rendered"
                unread = [key for one in group for key in self._renderer.unread_keys(one)]
                outcome.unread = tuple(dict.fromkeys((*group[0].unread, *unread)))
                rendered = [self._render(conversation) for conversation in group]
                self._check_rendered(rendered)
            except ValueError as error:
                message = (
                    str(error) if reason == "not in the format" else f"{record.origin}: {error}"
                )
                outcome.rejected = (reason, message)
                continue
            outcome.trimmed_turns = sum(r[0][1].trimmed_turns for r in rendered if len(r) == 1)
            chats += [(number, *entry) for entries in rendered for entry in entries]
        if needs_samples:
            self._tokenize(chats, outcomes)
        return outcomes

    def _render(self, conversation: Conversation) -> list[tuple[Conversation, RenderedChat]]:
        """The chats that a conversation is rendered as, each with what it holds of it."""
        for name in self._options.row_functions:
            conversation = apply_row_function(name, conversation)
        conversation = self._renderer.fitted(conversation)
        rendered = self._renderer.render_samples(conversation)
        parts = [conversation]
        if len(rendered) > 1:
            parts = self._renderer.one_per_answer(conversation)
        return list(zip(parts, rendered, strict=True))

    def _check_group(self, record: SourceRecord, group: Sequence[Conversation]) -> None:
        """Raises ValueError unless the record has as many conversations as the stage compares."""
        if len(group) == self._rules.group_size:
            return
        name = self.look(record).name
        raise ValueError(
            f"{record.origin}: the format {name!r} gives {len(group)} conversations a record, but "
            f"the stage {self._options.stage.name!r} takes {self._rules.group_size}; choose "
            "another data.format or stage"
        )

    def _check_rendered(self, rendered: Sequence[Sequence[Any]]) -> None:
        """Raises ValueError where a conversation that is compared became several samples."""
        if self._rules.group_size > 1 and any(len(chats) != 1 for chats in rendered):
            raise ValueError(
                "the template rewrites earlier answers, so that a conversation becomes several "
                "samples, which cannot be compared; set data.changing_history, or train_on: last"
            )

    def _tokenize(
        self, chats: Sequence[tuple[int, Conversation, RenderedChat]], outcomes: list[Outcome]
    ) -> None:
        samples: list[Sample | ValueError]
        try:
            made = self._renderer.tokenize([chat for _, _, chat in chats])
            samples = [self._with_targets(sample) for sample in made]
        except ValueError:
            # One chat is at fault: find it, the others are good.
            samples = [self._tokenize_one(chat) for _, _, chat in chats]
        groups: dict[int, list[tuple[Conversation, Sample]]] = {}
        for (number, conversation, _), sample in zip(chats, samples, strict=True):
            outcome = outcomes[number]
            if isinstance(sample, ValueError):
                origin = f"{outcome.file}:{outcome.line}"
                outcome.rejected = ("not tokenized", f"{origin}: {sample}")
            else:
                groups.setdefault(number, []).append((conversation, sample))
        for number, group in groups.items():
            if outcomes[number].rejected is None:
                self._fit_record(outcomes[number], group)
        for outcome in outcomes:
            if outcome.rejected is not None:
                # All samples of a record or none.
                outcome.samples.clear()

    def _tokenize_one(self, chat: RenderedChat) -> Sample | ValueError:
        try:
            return self._with_targets(self._renderer.tokenize([chat])[0])
        except ValueError as error:
            return error

    def _with_targets(self, sample: Sample) -> Sample:
        """The sample with the targets of the stage; ValueError where the stage makes no sample."""
        made: object = self._rules.targets(sample)
        if made is sample:
            return sample
        try:
            if not isinstance(made, Sample):
                raise ValueError(f"{type(made).__name__}; expected a Sample")
            made.check()
        except ValueError as error:
            name = self._options.stage.name
            raise ValueError(f"targets() of the stage {name!r} returned {error}") from None
        return made

    def _fit_record(self, outcome: Outcome, group: Sequence[tuple[Conversation, Sample]]) -> None:
        """Adds the samples of a record, or what the policy makes of those that are too long."""
        origin, capacity = f"{outcome.file}:{outcome.line}", self._options.capacity
        if outcome.group_size == 1:
            for conversation, sample in group:
                self._fit(outcome, origin, conversation, sample, capacity)
            return
        alignment, policy = self._options.alignment, self._options.over_length
        length = sum(round_up(len(sample.input_ids), alignment) for _, sample in group)
        outcome.longest = length
        if length > capacity and policy in ("drop", "split_turns"):
            why = "together" if policy == "drop" else "together, which cannot be split"
            outcome.rejected = ("too long", f"{origin}: {length} tokens {why}")
            return
        if length > capacity and policy != "error":
            # Each gets an equal part of the room.
            capacity = capacity // (outcome.group_size * alignment) * alignment
        for conversation, sample in group:
            self._fit(outcome, origin, conversation, sample, capacity)
        outcome.longest = length

    def _fit(
        self,
        outcome: Outcome,
        origin: str,
        conversation: Conversation,
        sample: Sample,
        capacity: int,
    ) -> None:
        """Adds a sample, or what the policy makes of one that is too long."""
        length, policy = len(sample.input_ids), self._options.over_length
        outcome.longest = max(outcome.longest, length)
        message = f"{origin}: {length} tokens"
        if length <= capacity or policy == "error":
            # "error" is decided on the finished store, which is good for a larger capacity.
            fitting = [sample]
        elif policy == "drop":
            outcome.rejected = ("too long", message)
            return
        elif policy == "split_turns":
            try:
                fitting = self._split(self._renderer.with_options(conversation))
            except ValueError as error:
                outcome.rejected = ("not rendered", f"{origin}, a part of it: {error}")
                return
            if not fitting:
                outcome.rejected = ("too long", f"{message}, and no turn at which to split it")
                return
            outcome.notes.append(("split", f"{message}, now {len(fitting)} samples"))
        else:
            start = length - capacity if policy == "truncate_left" else 0
            fitting = [sample.part(start, start + capacity)]
            outcome.truncated += 1
            outcome.cut_tokens += length - capacity
            outcome.notes.append(("truncated", message))
        for part in fitting:
            if not part.supervised[1:].any():
                outcome.rejected = ("nothing to learn", f"{origin}: no supervised token is left")
                return
        outcome.samples += fitting

    def _split(self, conversation: Conversation) -> list[Sample]:
        """Samples that fit, of a conversation cut at its turns; none where that is impossible.

        It is cut in two in front of the user's turn nearest to the middle, and so on. Every part
        keeps the opening turns and the tools, not the other turns before it; what trains nothing is
        no sample.
        """
        turns = conversation.messages
        first = next((n for n, turn in enumerate(turns) if turn.role not in OPENING_ROLES), 0)
        places = [
            number
            for number in range(first + 1, len(turns))
            if turns[number].role == "user" and turns[number - 1].role == "assistant"
        ]
        if not places:
            return []
        ends = [sum(len(turn.content) for turn in turns[:number]) for number in places]
        middle = sum(len(turn.content) for turn in turns) / 2
        place = min(zip(places, ends, strict=True), key=lambda entry: abs(entry[1] - middle))[0]
        samples: list[Sample] = []
        for half in (turns[:place], (*turns[:first], *turns[place:])):
            if not any(turn.supervised for turn in half):
                continue
            part = replace(conversation, messages=half)
            for made in self._renderer.tokenize(self._renderer.render_samples(part)):
                sample = self._with_targets(made)
                fits = len(sample.input_ids) <= self._options.capacity
                fitting = [sample] if fits else self._split(part)
                if not fitting:
                    return []
                samples += fitting
        return samples


Batch = tuple[Sequence[SourceRecord], Mapping[str, FileFormat], bool]
Tag = TypeVar("Tag")
_maker: SampleMaker | None = None


def make_all(
    maker: SampleMaker,
    tokenizer: PreTrainedTokenizerBase,
    options: MakerOptions,
    records: Iterable[tuple[Tag, SourceRecord | BadRecord]],
    processes: int | None,
    *,
    batch_records: int,
    needs_samples: Callable[[], bool] = lambda: True,
) -> Iterator[list[tuple[Tag, Outcome]]]:
    """Yields what becomes of records, batch after batch, in order.

    Args:
        maker: of this process.
        tokenizer: for the makers of the other processes.
        options: likewise.
        records: each with whatever is to come back with its outcome.
        processes: how many; 1: this one; None: this one for small sources, else one per core.
        batch_records: records of a batch; they are read ahead of the outcomes by a few batches.
        needs_samples: asked for each batch; False: its records are only checked.
    """
    known: deque[list[tuple[Tag, Outcome | None]]] = deque()

    def batches() -> Iterator[Batch]:
        numbered = iter(records)
        while entries := list(islice(numbered, batch_records)):
            usable: list[SourceRecord] = []
            known.append([(tag, _look(maker, record, usable)) for tag, record in entries])
            files = {record.file: maker.files[record.file] for record in usable}
            yield usable, files, needs_samples()

    if not options.can_be_made_elsewhere():
        processes = 1
    for outcomes in _make_batches(maker, tokenizer, options, batches(), processes):
        made = iter(outcomes)
        # Those that cannot be read come back in their place, whoever makes the others.
        yield [(tag, outcome or next(made)) for tag, outcome in known.popleft()]


def _look(
    maker: SampleMaker, record: SourceRecord | BadRecord, usable: list[SourceRecord]
) -> Outcome | None:
    """The outcome of a record that cannot be read or has no format; None: it is added to usable."""
    if isinstance(record, BadRecord):
        return Outcome(record.file, record.line, rejected=(record.reason, record.message))
    try:
        maker.look(record)
    except ValueError as error:
        rejected = ("not in the format", f"{record.origin}: {error}")
        return Outcome(record.file, record.line, rejected=rejected)
    usable.append(record)
    return None


def _make_batches(
    maker: SampleMaker,
    tokenizer: PreTrainedTokenizerBase,
    options: MakerOptions,
    batches: Iterator[Batch],
    processes: int | None,
) -> Iterator[list[Outcome]]:
    if processes is None:
        for batch in islice(batches, SERIAL_BATCHES):
            yield maker.make(*batch)
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    first = next(batches, None)
    if first is None:
        return
    if processes == 1:
        yield maker.make(*first)
        for batch in batches:
            yield maker.make(*batch)
        return
    yield from _make_elsewhere(tokenizer, options, first, batches, processes)


def _make_elsewhere(
    tokenizer: PreTrainedTokenizerBase,
    options: MakerOptions,
    first: Batch,
    batches: Iterator[Batch],
    processes: int,
) -> Iterator[list[Outcome]]:
    # Not forked from this process: it has threads, and a GPU perhaps.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft_fast.data.sample_maker", "transformers"])
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start, initargs=(tokenizer, options)
    )
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        waiting.append(pool.submit(_make, first))
        for batch in batches:
            waiting.append(pool.submit(_make, batch))
            if len(waiting) >= processes * BATCHES_PER_PROCESS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            "a process that prepares the data has ended without a word: it was killed, by the "
            "system perhaps for want of memory; data.num_processes sets how many there are"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def long_lived_objects() -> Iterator[None]:
    """Keeps the collector of cycles from what there is already.

    Records are many objects, which make it look through all of a process's, of large libraries'
    too, again and again.
    """
    is_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()


def _start(tokenizer: Any, options: MakerOptions) -> None:
    global _maker
    # Its parent is the fork server, which ends with the run, however that ends.
    die_with_parent()
    # One thread each: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _maker = SampleMaker(tokenizer, options)
    gc.freeze()


def _make(batch: Batch) -> list[Outcome]:
    assert _maker is not None, "the pool's initializer has run"
    return _maker.make(*batch)
