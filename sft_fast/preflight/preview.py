"""What the first rows of a source become: tokens, their mask, and the rows they are packed into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sft_fast.config.schema import Config
from sft_fast.config.sections import DataConfig, PackingConfig
from sft_fast.constants import round_up
from sft_fast.data.build import maker_options
from sft_fast.data.choices import Part
from sft_fast.data.from_config import build_options, find_sources, stage_options
from sft_fast.data.json_records import BadRecord, SourceRecord
from sft_fast.data.sample_maker import SampleMaker
from sft_fast.data.tokens import Sample
from sft_fast.packing.bins import BinPlan, PackingOptions, plan_bins
from sft_fast.packing.streaming import StreamPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["trained", "trained special", "masked", "masked special"]
MAX_TOKENS_OF_A_CHARACTER = 4


@dataclass(frozen=True)
class TextRun:
    """Text of one token, or of the few that make one character.

    Attributes:
        text: what the model reads or learns to write.
        ids: the tokens.
        kind: trained = a target of the loss; special = added to the vocabulary as a control token.
    """

    text: str
    ids: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Shown:
    """One sample.

    Attributes:
        origin: file:line of its row.
        runs: the text, in order.
        num_tokens, num_supervised: counts; the first token is never a target and does not count.
        num_answers: runs of trained tokens.
        warnings: what deserves a look, in words.
    """

    origin: str
    runs: tuple[TextRun, ...]
    num_tokens: int
    num_supervised: int
    num_answers: int
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """Where the sample is from, its tokens, and how many of them train."""
        share = self.num_supervised / self.num_tokens
        return (
            f"{self.origin}: {self.num_tokens} tokens, {self.num_supervised} trained ({share:.0%}) "
            f"in {self.num_answers} answer{'s' if self.num_answers != 1 else ''}"
        )


@dataclass(frozen=True)
class Preview:
    """Samples of the first rows.

    Attributes:
        samples: in the order of the rows.
        rejected: messages of rows that cannot be used or are too long.
        bins: the samples packed; indices into `samples`.
        capacity: tokens of a pack.
        template: which chat template was used, in words.
    """

    samples: tuple[Shown, ...]
    rejected: tuple[str, ...]
    bins: BinPlan | None
    capacity: int
    template: str

    def bin_summary(self, number: int) -> str:
        """What a pack holds and how full it is."""
        assert self.bins is not None
        chosen = [self.samples[index] for index in self.bins.bin(number)]
        used = sum(sample.num_tokens for sample in chosen)
        trained = sum(sample.num_supervised for sample in chosen)
        return (
            f"{len(chosen)} samples, {used} of {self.capacity} tokens "
            f"({used / self.capacity:.1%} full), {trained} trained"
        )


def make_preview(
    config: Config, tokenizer: PreTrainedTokenizerBase, num_rows: int, part: Part = "train"
) -> Preview:
    """Renders, tokenises and packs the first rows of every source, as a run would.

    Raises:
        ValueError: a source does not exist, or the configuration has no such part.
    """
    sources = find_sources(config.data, part)
    if sources is None:
        raise ValueError("the configuration has no data.eval and no data.eval_fraction to preview")
    samples: list[Shown] = []
    rejected: list[str] = []
    template = ""
    special = special_ids(tokenizer)
    build = build_options(config.model, config.data, config.packing, stage=stage_options(config))
    trains_answers = build.stage.rules().trains_answers
    texts: dict[tuple[int, ...], str] = {}
    for source in sources:
        maker = SampleMaker(tokenizer, maker_options(source, build))
        template = maker.template_source
        for row in islice(source.records.scan(), num_rows):
            if isinstance(row, BadRecord):
                rejected.append(row.message)
                continue
            made, messages, notes = samples_of(maker, row, config.data, config.packing)
            rejected += messages
            samples += [
                show(sample, row.origin, tokenizer, special, texts, trains_answers, notes)
                for sample in made
            ]
    lengths = np.array([sample.num_tokens for sample in samples], dtype=np.int32)
    packing = config.packing
    bins = None
    if len(samples):
        options = PackingOptions(packing.alignment, packing.max_samples_per_bin, packing.pool_size)
        strategy = StreamPlan.strategy if config.data.streaming else packing.strategy
        bins = plan_bins(
            lengths,
            packing.capacity,
            strategy,
            config.seed,
            options=options,
            group_size=build.group_size,
        )
    return Preview(tuple(samples), tuple(rejected), bins, packing.capacity, template)


def samples_of(
    maker: SampleMaker, row: SourceRecord, data: DataConfig, packing: PackingConfig
) -> tuple[list[Sample], list[str], list[str]]:
    """The samples of a row, why it is not used as it is, and what else deserves a look."""
    try:
        maker.look(row)
    except ValueError as error:
        return [], [f"{row.origin}: {error}"], []
    (outcome,) = maker.make([row], {}, True)
    messages = [message for _, message in outcome.notes]
    if outcome.rejected is not None:
        return [], [f"{outcome.rejected[1]} ({outcome.rejected[0]})"], []
    fitting: list[Sample] = []
    size = outcome.group_size
    for first in range(0, len(outcome.samples), size):
        group = outcome.samples[first : first + size]
        alignment = packing.alignment if size > 1 else 1
        length = sum(round_up(len(sample.input_ids), alignment) for sample in group)
        if length <= packing.capacity:
            fitting += group
        else:
            messages.append(
                f"{row.origin}: {length} tokens, more than packing.capacity "
                f"{packing.capacity}; data.over_length is {data.over_length}"
            )
    notes = [f"worth a look: {name}" for name in outcome.odd]
    notes += [f"without effect: {name}" for name in outcome.unread]
    return fitting, messages, notes


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens, of added ones too."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {number for number, token in added if token.special}


def show(
    sample: Sample,
    origin: str,
    tokenizer: Any,
    special: set[int],
    texts: dict[tuple[int, ...], str],
    trains_answers: bool = True,
    notes: Sequence[str] = (),
) -> Shown:
    """`texts` remembers the text of tokens that were seen before; answers should end with a token
    that stops; `notes` are warnings of the row."""
    ids, supervised = sample.input_ids.tolist(), sample.supervised
    starts = np.flatnonzero(supervised & ~np.insert(supervised[:-1], 0, False))
    ends = np.flatnonzero(supervised & ~np.append(supervised[1:], False))
    unended = sum(ids[end] not in special for end in ends)
    warnings = list(notes)
    if unended and trains_answers:
        warnings.append(f"{unended} answers end with no special token: the model may not stop")
    if supervised[1:].all():
        warnings.append("every token is trained, prompts too")
    return Shown(
        origin,
        tuple(text_runs(ids, supervised, tokenizer, special, texts)),
        len(ids),
        int(np.count_nonzero(supervised[1:])),
        len(starts),
        tuple(warnings),
    )


def text_runs(
    ids: Sequence[int],
    supervised: NDArray[np.bool_],
    tokenizer: Any,
    special: set[int],
    texts: dict[tuple[int, ...], str],
) -> Iterator[TextRun]:
    """Cuts a sample at its tokens; tokens that hold parts of one character stay together."""
    start = 0
    while start < len(ids):
        stop = start + 1
        text = text_of(tuple(ids[start:stop]), tokenizer, texts)
        while "\ufffd" in text and stop < min(len(ids), start + MAX_TOKENS_OF_A_CHARACTER):
            if supervised[stop] != supervised[start] or ids[stop] in special:
                break
            stop += 1
            text = text_of(tuple(ids[start:stop]), tokenizer, texts)
        kind = "trained" if supervised[start] else "masked"
        if ids[start] in special:
            kind += " special"
        yield TextRun(text, tuple(ids[start:stop]), kind)  # type: ignore[arg-type]
        start = stop


def text_of(ids: tuple[int, ...], tokenizer: Any, texts: dict[tuple[int, ...], str]) -> str:
    """The text of some tokens, with the space that decoding them alone would drop."""
    if ids not in texts:
        text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        token = tokenizer.convert_ids_to_tokens(ids[0])
        # Decoding drops the space in front of the first word of a text; here no token is first.
        is_spaced = isinstance(token, str) and token.startswith("\u2581")
        texts[ids] = f" {text}" if is_spaced and not text.startswith(" ") else text
    return texts[ids]


def runs(shown: Shown) -> Iterator[tuple[Kind, str]]:
    """(kind, text) of neighbouring runs of one kind."""
    for kind, group in groupby(shown.runs, key=lambda run: run.kind):
        yield kind, "".join(run.text for run in group)
