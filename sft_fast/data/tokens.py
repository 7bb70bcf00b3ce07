"""From a rendered chat to token ids and the mask of the supervised tokens.

A text is tokenised once and whole. A token is supervised when it holds at least one supervised
character. A token that also holds prompt characters is supervised too, because it is the first
token of the answer; such tokens are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """Supervised characters [start, end) of a text.

    Attributes:
        start, end: the characters.
        end_of_turn: the special token that closes them, if one does.
        weight: factor of the loss on them.
    """

    start: int
    end: int
    end_of_turn: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: what is tokenised.
        spans: the supervised characters, ascending.
        trimmed_turns: turns behind the last supervised one, which are not in the text.
    """

    text: str
    spans: tuple[Span, ...]
    trimmed_turns: int = 0


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens.

    Attributes:
        input_ids: uint32 [n].
        supervised: bool [n]; the tokens that the model learns to write.
        boundary_tokens: supervised tokens that also hold characters of the prompt.
        weights: float16 [n], factor of each supervised token's loss; None: all 1.
    """

    input_ids: npt.NDArray[np.uint32]
    supervised: npt.NDArray[np.bool_]
    boundary_tokens: int
    weights: npt.NDArray[np.float16] | None = None

    def part(self, start: int, stop: int) -> Sample:
        """Tokens start to stop - 1."""
        chosen = slice(start, stop)
        weights = None if self.weights is None else self.weights[chosen]
        return Sample(
            self.input_ids[chosen], self.supervised[chosen], self.boundary_tokens, weights
        )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int], chats: Sequence[RenderedChat]
) -> list[Sample]:
    """Tokenises texts, each once and whole.

    Args:
        tokenizer: a fast tokenizer.
        special: special token -> id.
        chats: the texts.

    Raises:
        ValueError: two BOS tokens, characters without a token, a span without tokens, or an
            end-of-turn token that the tokenizer does not read as one token.
    """
    if not chats:
        return []
    encoded = tokenizer(
        [chat.text for chat in chats],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        _sample(chat, input_ids, offsets, tokenizer.bos_token_id, special)
        for chat, input_ids, offsets in zip(
            chats, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _sample(
    chat: RenderedChat,
    input_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    bos: int | None,
    special: Mapping[str, int],
) -> Sample:
    if bos is not None and list(input_ids[:2]) == [bos, bos]:
        raise ValueError("the text starts with two BOS tokens; remove one from the template")
    bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts = bounds[:, 0]
    # A token without characters of its own belongs to the character at its start.
    ends = np.maximum(bounds[:, 1], starts + 1)
    supervised = np.zeros(len(starts), dtype=np.bool_)
    is_weighted = any(span.weight != 1 for span in chat.spans)
    weights = np.zeros(len(starts), dtype=np.float16) if is_weighted else None
    boundary_tokens = 0
    for span in chat.spans:
        # Offsets ascend, so the tokens of a span are one run.
        first = int(np.searchsorted(ends, span.start, side="right"))
        stop = int(np.searchsorted(starts, span.end, side="left"))
        _check_span(span, chat.text, bounds[first:stop], input_ids[first:stop], special)
        supervised[first:stop] = True
        if weights is not None:
            weights[first:stop] = span.weight
        boundary_tokens += int(np.count_nonzero(starts[first:stop] < span.start))
    return Sample(np.asarray(input_ids, dtype=np.uint32), supervised, boundary_tokens, weights)


def _check_span(
    span: Span,
    text: str,
    bounds: npt.NDArray[np.int64],
    input_ids: Sequence[int],
    special: Mapping[str, int],
) -> None:
    if not len(bounds):
        raise ValueError("the tokenizer gives an answer no tokens at all")
    if span.end_of_turn is not None and input_ids[-1] != special[span.end_of_turn]:
        raise ValueError(
            f"the end-of-turn token {span.end_of_turn!r} has the id {special[span.end_of_turn]}, "
            f"but the tokenizer reads the end of an answer as the id {input_ids[-1]}"
        )
    # Some tokenizers leave characters without a token: spaces at most, or text was lost.
    covered = np.maximum.accumulate(bounds[:, 1])
    gap_starts = np.concatenate([[span.start], covered])
    gap_ends = np.concatenate([bounds[:, 0], [span.end]])
    for gap in np.flatnonzero(gap_starts < gap_ends):
        start, end = gap_starts[gap], gap_ends[gap]
        if text[start:end].strip():
            raise ValueError(
                f"the tokenizer drops {text[start:end]!r} of an answer: no token covers it"
            )
