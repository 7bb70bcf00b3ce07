"""From a rendered chat to token ids and the mask of the supervised tokens.

A text is tokenised once and whole. A token is supervised when it holds at least one supervised
character. A token that also holds prompt characters is supervised too, because it is the first
token of the answer; such tokens are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unicodedata import is_normalized, normalize

import numpy as np
import numpy.typing as npt

from sft_fast.data.token_cache import PieceTokenizer, can_be_cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_AT_ONCE = 1 << 20
MOST_BYTES = (1 << 16) - 1
"""Of a token that the table of lengths has."""


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
        sample: the tokens, where the source holds tokens; then there is no text.
    """

    text: str
    spans: tuple[Span, ...]
    trimmed_turns: int = 0
    sample: Sample | None = None


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

    def with_target_behind(self, weight: float = 1.0) -> Sample:
        """The sample [n + 1] whose one target is a token of no meaning behind the last one.

        So the hidden state that the head reads is that of the last token. Causal attention keeps
        the added token from all others.

        Args:
            weight: factor of its loss, beside that of the last supervised token.
        """
        supervised = np.zeros(len(self.input_ids) + 1, dtype=np.bool_)
        supervised[-1] = True
        if self.weights is not None:
            weight *= float(self.weights[self.supervised][-1])
        weights = None if weight == 1 else np.where(supervised, weight, 0).astype(np.float16)
        input_ids = np.append(self.input_ids, self.input_ids[-1:])
        return Sample(input_ids, supervised, 0, weights)

    def with_shared_weight(self, total: float = 256.0) -> Sample:
        """The sample whose supervised tokens share a weight, so that long ones count no more.

        Weights are relative; a large total keeps those of long samples exact in float16.

        Args:
            total: of the weights, beside those that the tokens have already.
        """
        targets = self.supervised.copy()
        targets[:1] = False  # no token before it predicts it
        own = 1.0 if self.weights is None else self.weights.astype(np.float32)
        weights = np.where(targets, own, 0) * (total / max(int(targets.sum()), 1))
        return Sample(self.input_ids, targets, self.boundary_tokens, weights.astype(np.float16))

    def check(self) -> None:
        """Raises ValueError for arrays that no token store can hold."""
        size = len(self.input_ids)
        arrays: dict[str, tuple[npt.NDArray[Any], type]] = {
            "input_ids": (self.input_ids, np.uint32),
            "supervised": (self.supervised, np.bool_),
        }
        if self.weights is not None:
            arrays["weights"] = self.weights, np.float16
        for name, (array, dtype) in arrays.items():
            if array.dtype != dtype or array.shape != (size,):
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}; expected "
                    f"{np.dtype(dtype)} {[size]}"
                )
        if self.weights is None:
            return
        wrong = self.weights[self.supervised & ~((self.weights > 0) & np.isfinite(self.weights))]
        if wrong.size:
            raise ValueError(
                f"the weight of a supervised token is {wrong[0]} in float16; expected a number "
                "above 0 that this holds"
            )

    def part(self, start: int, stop: int) -> Sample:
        """Tokens start to stop - 1."""
        chosen = slice(start, stop)
        weights = None if self.weights is None else self.weights[chosen]
        return Sample(
            self.input_ids[chosen], self.supervised[chosen], self.boundary_tokens, weights
        )


class TextTokenizer:
    """Tokenises rendered chats, each once and whole.

    Where every token stands for bytes of its own (byte-level BPE), a table of their lengths gives
    the places of the tokens, and the tokenizer need not keep track of them: that takes half the
    time, and a third of that where texts can be cut into pieces (token_cache.py). A text whose
    bytes the tokens do not add up to, and any other tokenizer, goes the way of character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]) -> None:
        """`special`: special token -> id."""
        self._tokenizer = tokenizer
        self._special = special
        added = tokenizer.added_tokens_decoder.items()
        self._swallowing = {i: t.content for i, t in added if t.lstrip or t.rstrip}
        """Id -> token, of those that take the white space beside them along."""
        self._lengths = _byte_lengths(tokenizer)
        self._is_nfc = tokenizer.backend_tokenizer.normalizer is not None
        self._pieces: PieceTokenizer | None = None
        if self._lengths is not None and can_be_cut(tokenizer):
            self._pieces = PieceTokenizer(tokenizer, self._lengths)

    def __call__(self, chats: Sequence[RenderedChat]) -> list[Sample]:
        """Tokenises texts.

        Raises:
            ValueError: two BOS tokens, characters of an answer without a token, a span without
                tokens, or an end-of-turn token that the tokenizer does not read as one token.
        """
        given = [chat.sample for chat in chats]
        if any(sample is not None for sample in given):
            made = iter(self([chat for chat in chats if chat.sample is None]))
            return [next(made) if sample is None else sample for sample in given]
        if self._lengths is None:
            return self._by_characters(chats)
        if self._is_nfc:
            chats = [_composed(chat) for chat in chats]
        samples: list[Sample] = []
        for part in _in_portions(chats):
            samples += self._by_bytes(part, self._ids([chat.text for chat in part]), self._lengths)
        return samples

    def _ids(self, texts: Sequence[str]) -> Sequence[npt.NDArray[np.uint32]]:
        """The ids of each text, uint32 [n]."""
        backend = self._tokenizer.backend_tokenizer
        # What an earlier call of the tokenizer may have left behind.
        backend.no_truncation()
        backend.no_padding()
        if self._pieces is not None:
            return self._pieces(texts)
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def _by_bytes(
        self,
        chats: Sequence[RenderedChat],
        ids: Sequence[npt.NDArray[np.uint32]],
        byte_lengths: npt.NDArray[np.uint16],
    ) -> list[Sample]:
        """The samples; chats whose tokens are not the bytes of their text go by characters.

        Args:
            chats: whose texts were tokenised.
            ids: of each chat, uint32 [n].
            byte_lengths: uint16 [vocabulary], bytes of each token.
        """
        if not chats:
            return []
        input_ids = np.concatenate(ids) if len(ids) > 1 else ids[0]
        stops = np.cumsum([len(part) for part in ids])
        # Where tokens begin and end, in 4 bytes: of a long text it takes most of the memory.
        edges = np.zeros(len(input_ids) + 1, dtype=np.int32)
        np.cumsum(byte_lengths[input_ids], dtype=np.int32, out=edges[1:])
        # Where each text ends, by its tokens.
        text_ends = edges[stops].astype(np.int64)
        placed = [_in_bytes(chat) for chat in chats]
        sizes = np.array([size for size, _ in placed])
        is_whole = (np.diff(text_ends, prepend=0) == sizes) & (sizes > 0)
        if not is_whole.all():
            return [
                sample
                for number, chat in enumerate(chats)
                for sample in (
                    self._by_bytes([chat], [ids[number]], byte_lengths)
                    if is_whole[number]
                    else self._by_characters([chat])
                )
            ]
        spans = [spans for _, spans in placed]
        return self._samples(spans, input_ids, stops, text_ends - sizes, edges[:-1], edges[1:])

    def _by_characters(self, chats: Sequence[RenderedChat]) -> list[Sample]:
        if not chats:
            return []
        encoded = self._tokenizer(
            [chat.text for chat in chats],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        samples = []
        for chat, ids, offsets in zip(
            chats, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            self._release_space(chat.text, ids, bounds)
            for span in chat.spans:
                _check_covered(span, chat.text, bounds)
                self._check_known(span, chat.text, ids, bounds)
            # A token without characters of its own belongs to the character at its start.
            ends = np.maximum(bounds[:, 1], bounds[:, 0] + 1)
            input_ids = np.asarray(ids, dtype=np.uint32)
            stops = np.array([len(ids)])
            first = np.zeros(1, dtype=np.int64)
            samples += self._samples([chat.spans], input_ids, stops, first, bounds[:, 0], ends)
        return samples

    def _release_space(self, text: str, ids: Sequence[int], bounds: npt.NDArray[np.int64]) -> None:
        """Gives a special token the place of its name alone, in place.

        With the white space that it swallows, a token of the template would reach into an answer,
        and be trained.
        """
        for place in map(int, np.flatnonzero(np.isin(ids, list(self._swallowing)))):
            name, (start, end) = self._swallowing[ids[place]], bounds[place]
            at = text.find(name, start, end)
            if at >= 0:
                bounds[place] = at, at + len(name)

    def _check_known(
        self, span: Span, text: str, ids: Sequence[int], bounds: npt.NDArray[np.int64]
    ) -> None:
        """Raises ValueError where characters of a span are an unknown token."""
        unknown = self._tokenizer.unk_token_id
        if unknown is None:
            return
        inside = (bounds[:, 0] < span.end) & (bounds[:, 1] > span.start)
        for place in np.flatnonzero(inside & (np.asarray(ids) == unknown)):
            start, end = bounds[place]
            if text[start:end].strip() != self._tokenizer.unk_token:
                raise ValueError(
                    f"the tokenizer has no token for {text[start:end]!r} of an answer, so the "
                    f"model would learn to write {self._tokenizer.unk_token!r}; remove the "
                    "record, or take a tokenizer that falls back on bytes"
                )

    def _samples(
        self,
        spans: Sequence[Sequence[Span]],
        input_ids: npt.NDArray[np.uint32],
        stops: npt.NDArray[np.int64],
        text_starts: npt.NDArray[np.int64],
        starts: npt.NDArray[np.integer],
        ends: npt.NDArray[np.integer],
    ) -> list[Sample]:
        """Cuts the tokens of texts, one behind another, into samples, and marks those of the spans.

        Places are in one unit, bytes or characters, and counted through all texts.

        Args:
            spans: of each text; places in it.
            input_ids: uint32 [n].
            stops: int64 [texts], where the tokens of each text have ended.
            text_starts: int64 [texts], where each text begins.
            starts: integers [n], where each token begins.
            ends: integers [n], where it has ended.
        """
        every = [span for some in spans for span in some]
        offsets = np.repeat(text_starts, [len(some) for some in spans])
        span_starts = (offsets + [span.start for span in every]).astype(starts.dtype)
        span_ends = (offsets + [span.end for span in every]).astype(starts.dtype)
        # Places ascend, so the tokens of a span are one run.
        firsts = np.searchsorted(ends, span_starts, side="right")
        afters = np.searchsorted(starts, span_ends, side="left")
        self._check_ends(every, input_ids, firsts, afters)
        insides = np.minimum(np.searchsorted(starts, span_starts, side="left"), afters)
        boundary_tokens = np.maximum(insides - firsts, 0).tolist()
        supervised = np.zeros(len(input_ids), dtype=np.bool_)
        runs = list(zip(firsts.tolist(), afters.tolist(), strict=True))
        for first, after in runs:
            supervised[first:after] = True
        bos = self._tokenizer.bos_token_id
        samples, start, number = [], 0, 0
        for some, stop in zip(spans, stops.tolist(), strict=True):
            if bos is not None and input_ids[start : min(start + 2, stop)].tolist() == [bos, bos]:
                raise ValueError(
                    "the text starts with two BOS tokens; remove one from the template"
                )
            behind = number + len(some)
            weights = None
            if any(span.weight != 1 for span in some):
                weights = np.zeros(stop - start, dtype=np.float16)
                for span, (first, after) in zip(some, runs[number:behind], strict=True):
                    weights[first - start : after - start] = span.weight
            shared = sum(boundary_tokens[number:behind])
            samples.append(Sample(input_ids[start:stop], supervised[start:stop], shared, weights))
            start, number = stop, behind
        return samples

    def _check_ends(
        self,
        spans: Sequence[Span],
        input_ids: npt.NDArray[np.uint32],
        firsts: npt.NDArray[np.int64],
        afters: npt.NDArray[np.int64],
    ) -> None:
        """Raises ValueError where a span has no token, or the last one does not end its turn.

        Args:
            spans: all of them.
            input_ids: uint32 [n].
            firsts: int64 [spans], the first token of each.
            afters: int64 [spans], the token behind each.
        """
        if (firsts >= afters).any():
            raise ValueError("the tokenizer gives an answer no tokens at all")
        for span, found in zip(spans, input_ids[afters - 1].tolist(), strict=True):
            if span.end_of_turn is not None and found != self._special[span.end_of_turn]:
                expected = self._special[span.end_of_turn]
                raise ValueError(
                    f"the end-of-turn token {span.end_of_turn!r} has the id {expected}, but the "
                    f"tokenizer reads the end of an answer as the id {found}"
                )


def _in_portions(chats: Sequence[RenderedChat]) -> Iterator[Sequence[RenderedChat]]:
    """Cuts chats into parts of about CHARACTERS_AT_ONCE: what is computed of them takes memory."""
    first, size = 0, 0
    for number, chat in enumerate(chats):
        if size >= CHARACTERS_AT_ONCE:
            yield chats[first:number]
            first, size = number, 0
        size += len(chat.text)
    if first < len(chats):
        yield chats[first:]


def _byte_lengths(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.uint16] | None:
    """uint16 [ids], bytes of each token; None for a tokenizer whose tokens are no bytes.

    With a normaliser to NFC they are the bytes of texts that are in that form.
    """
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel

    backend = tokenizer.backend_tokenizer
    steps = "" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__().decode()
    is_plain = backend.normalizer is None or isinstance(backend.normalizer, NFC)
    if not is_plain or '"add_prefix_space":true' in steps or '"ByteLevel"' not in steps:
        return None
    alphabet = set(ByteLevel.alphabet())
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max([*vocabulary.values(), *added], default=-1) + 1, dtype=np.uint16)
    for token, number in vocabulary.items():
        # One character stands for one byte; a token with another one is never produced.
        lengths[number] = min(len(token), MOST_BYTES) if alphabet.issuperset(token) else 0
    for number, content in added.items():
        # A longer one does not count as its bytes, so that its texts go by characters.
        lengths[number] = min(len(content.encode()), MOST_BYTES)
    return lengths


def _composed(chat: RenderedChat) -> RenderedChat:
    """The same chat in NFC, as a tokenizer that normalises would read it."""
    if is_normalized("NFC", chat.text):
        return chat
    text, spans, characters = "", [], 0
    for span in chat.spans:
        text += normalize("NFC", chat.text[characters : span.start])
        start = len(text)
        text += normalize("NFC", chat.text[span.start : span.end])
        characters = span.end
        spans.append(replace(span, start=start, end=len(text)))
    text += normalize("NFC", chat.text[characters:])
    return replace(chat, text=text, spans=tuple(spans))


def _in_bytes(chat: RenderedChat) -> tuple[int, tuple[Span, ...]]:
    """The length of the text in UTF-8, and its spans, with their places in bytes."""
    if chat.text.isascii():
        return len(chat.text), chat.spans
    spans, characters, place = [], 0, 0
    for span in chat.spans:
        start = place + len(chat.text[characters : span.start].encode())
        characters, place = span.end, start + len(chat.text[span.start : span.end].encode())
        spans.append(replace(span, start=start, end=place))
    return place + len(chat.text[characters:].encode()), tuple(spans)


def _check_covered(span: Span, text: str, bounds: npt.NDArray[np.int64]) -> None:
    """Raises ValueError where characters of a span have no token; spaces may be left out.

    Args:
        span: in characters.
        text: of the chat.
        bounds: int64 [n, 2], where each token begins and has ended.
    """
    inside = bounds[(bounds[:, 0] < span.end) & (bounds[:, 1] > span.start)]
    gap_starts = np.concatenate([[span.start], np.maximum.accumulate(inside[:, 1])])
    gap_ends = np.concatenate([inside[:, 0], [span.end]])
    for gap in np.flatnonzero(gap_starts < gap_ends):
        lost = text[gap_starts[gap] : gap_ends[gap]]
        if lost.strip():
            raise ValueError(f"the tokenizer drops {lost!r} of an answer: no token covers it")
