"""What a token store holds: lengths, supervised share, turns, duplicates, odd special tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.render import ChatRenderer, MaskOptions
from sft_fast.data.store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ORIGINS = 3
SHOWN_COUNTS = 8


@dataclass(frozen=True)
class StoreStatistics:
    """Statistics of a store.

    Attributes:
        samples, tokens, supervised_tokens: counts.
        lengths: percentile ("p50", and "min", "mean", "max") -> tokens of a sample.
        supervised_share: the same percentiles of each sample's supervised share, 0 to 1.
        answers: supervised runs of a sample -> samples.
        too_long: samples longer than a pack.
        duplicates: samples whose tokens an earlier sample of another record has as well.
        double_bos: samples that start with two BOS tokens.
        inner_bos: samples with a BOS token behind the first one, where turns do not begin with it.
        unended: supervised runs that end with no special token: the model would not learn to stop.
        examples: name of one of the last five -> origins of the first samples it concerns.
    """

    samples: int
    tokens: int
    supervised_tokens: int
    lengths: dict[str, float]
    supervised_share: dict[str, float]
    answers: dict[int, int]
    too_long: int
    duplicates: int
    double_bos: int
    inner_bos: int
    unended: int
    examples: dict[str, list[str]]

    def summary(self) -> str:
        """The statistics in a few lines of text."""
        share = self.supervised_tokens / max(self.tokens, 1)
        answers = ", ".join(f"{count} with {runs}" for runs, count in self.answers.items())
        if len(self.answers) > SHOWN_COUNTS:
            runs = np.repeat(list(self.answers), list(self.answers.values()))
            answers = _listed(_percentiles(runs), "{:.0f}")
        lines = [
            f"samples: {self.samples}, tokens: {self.tokens}, supervised: {share:.1%}",
            "tokens a sample: " + _listed(self.lengths, "{:.0f}"),
            "supervised share of a sample: " + _listed(self.supervised_share, "{:.1%}"),
            f"answers a sample: {answers}",
        ]
        for name, meaning in (
            ("too_long", "samples are longer than packing.capacity"),
            ("duplicates", "samples are copies of another"),
            ("double_bos", "samples start with two BOS tokens"),
            ("inner_bos", "samples have a BOS token behind their first one"),
            ("unended", "answers end with no special token: the model would not learn to stop"),
        ):
            count = getattr(self, name)
            where = f", first {', '.join(self.examples[name])}" if count else ""
            lines.append(f"{'!' if count else ' '} {count} {meaning}{where}")
        return "\n".join(lines)


def store_statistics(
    store: TokenStore,
    tokenizer: PreTrainedTokenizerBase,
    capacity: int,
    trains_answers: bool = True,
) -> StoreStatistics:
    """Reads a whole store, sample by sample.

    Args:
        store: the samples.
        tokenizer: that they were made with.
        capacity: tokens of a pack.
        trains_answers: the targets are answers, which should end with a token that stops.
    """
    bos: Any = tokenizer.bos_token_id
    is_odd_inside = bos is not None and not _begins_turns(tokenizer)
    special = np.array(sorted(tokenizer.all_special_ids) + _added(tokenizer), dtype=np.int64)
    first: dict[int, int] = {}
    answers: Counter[int] = Counter()
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    shares = np.zeros(store.num_samples)
    for number in range(len(store.offsets) - 1):
        tokens, supervised = store.sample(number)
        shares[number] = supervised.mean()
        ends = np.flatnonzero(supervised & ~np.append(supervised[1:], False))
        answers[len(ends)] += 1
        earlier = first.setdefault(xxhash.xxh3_64_intdigest(tokens.data), number)
        # A source that is repeated has the same records again.
        is_copy = earlier != number and store.origin(earlier) != store.origin(number)
        found = {
            "too_long": int(len(tokens) > capacity),
            "duplicates": int(is_copy),
            "double_bos": int(bos is not None and tokens[:2].tolist() == [bos, bos]),
            "inner_bos": int(is_odd_inside and bool((tokens[2:] == bos).any())),
            "unended": int((~np.isin(tokens[ends], special)).sum()) if trains_answers else 0,
        }
        for name, count in found.items():
            counts[name] += count
            if count and len(examples.setdefault(name, [])) < SHOWN_ORIGINS:
                examples[name].append(store.origin(number))
    return StoreStatistics(
        samples=store.num_samples,
        tokens=len(store.tokens),
        supervised_tokens=int(store.num_supervised.sum()),
        lengths=_percentiles(store.lengths),
        supervised_share=_percentiles(shares),
        answers=dict(sorted(answers.items())),
        too_long=counts["too_long"],
        duplicates=counts["duplicates"],
        double_bos=counts["double_bos"],
        inner_bos=counts["inner_bos"],
        unended=counts["unended"],
        examples=examples,
    )


def _begins_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a BOS token for every exchange."""
    turns = (Message("user", "a"), Message("assistant", "b")) * 2
    try:
        chat = ChatRenderer(tokenizer, MaskOptions("last_turn")).render(Conversation(turns))
    except ValueError:
        # It wants more than a plain exchange.
        return False
    return chat.text.count(str(tokenizer.bos_token)) > 1


def _added(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    decoder = tokenizer.added_tokens_decoder.items()
    return [number for number, token in decoder if token.special]


def _percentiles(values: Any) -> dict[str, float]:
    named = {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 90, 99)}
    ends = {"min": float(values.min()), "mean": float(values.mean())}
    return {**ends, **named, "max": float(values.max())}


def _listed(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())
