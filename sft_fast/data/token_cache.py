r"""Token ids of texts by their pieces, most of which came before.

A tokenizer takes its special tokens out first, and reads what is between them text by text. A
byte-level BPE takes each part that its pre-tokenizer cuts out by itself. With the usual ones a part
never reaches over a space that follows something other than white space: " word" and " 12" start
with their space. Nor does one reach over a single line break, but for a slash behind it. So a text
may be cut at special tokens, in front of every such space, and behind every such line break
(PIECES), and the ids of the whole are those of its pieces. Languages repeat their words: the ids of
a piece are kept, and new pieces are tokenised many at once, as one text, whose ids the lengths of
the tokens part again.

It holds where every part of the pre-tokenizer's pattern is one of PARTS: none of them takes a space
behind other characters or looks back, and `\s+` takes every space that no other part does. Of a
single line break `\s+(?!\S)` and `\s+` make the same, whether something follows or not. Any other
tokenizer is left to itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECES = re.compile(r"\s*+\S++(?:(?!\n[^\s/])[^\S ]\s*+\S*+)*+(?:\n(?=[^\s/]))?|\s+")
"""Runs of white space that begin with a space begin a piece; a single line break ends one, for a
part may hold it behind a full stop; other runs are inside of one."""
SPACE = r"\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PARTS = {
    *(SPACE, r"\s+(?!\S)", r"\s*[\r\n]+", r"\s*[\r\n]"),
    *(_SHORT, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"'(?i:[sdmt]|ll|ve|re)"),
    *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{short}"
        for letters in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
        for short in ("", f"{_SHORT}?")
    ),
    *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
    *(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+", "[一-龥぀-ゟ゠-ヿ]+"),
}
"""Of the pre-tokenizers of GPT-2, Llama 3, Qwen 2 and 3, GPT-4o, Mistral's Tekken, DeepSeek."""
MOST_PIECES = 1 << 17
_PART_ENDS = re.compile(
    r"(?<=[0-9])(?=[!-/:-~])|(?<=[!-/:-~])(?=[0-9])"
    r"|(?<=[A-Za-z])(?=[!-&(-/:-@\[-`{-~])|(?<=[0-9A-Za-z])(?=\n\Z)"
)
"""Where a piece may be cut once more, as no part of PARTS reaches over it: around digits, between a
letter and a sign that is no apostrophe, and in front of the line break that ends it."""
LONGEST_KEPT = 64
"""Characters; a longer piece hardly comes again."""
PIECES_AT_ONCE = 256
WINDOW_CHARACTERS = 1 << 18
"""Of a text that is cut into pieces at once."""


class PieceTokenizer:
    """Tokenises texts that share their words.

    Keeps at most about MOST_PIECES pieces and their ids: some 30 MB.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, byte_lengths: npt.NDArray[np.uint16]
    ) -> None:
        """`tokenizer`: for which `can_be_cut`; `byte_lengths` [ids]: bytes of each token."""
        self._backend = tokenizer.backend_tokenizer
        self._byte_lengths = byte_lengths
        self._known: dict[str, bytes] = {}
        names = _taken_out(tokenizer)
        self._special_names = frozenset(names)
        # The longest of those that begin at the same place.
        any_name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self._special = re.compile(f"({any_name})") if names else None
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._has_parts = not any(
            _PART_ENDS.search(token) for token in added if token not in self._special_names
        )

    def __call__(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text, uint32 [n], read-only."""
        if all(len(text) <= WINDOW_CHARACTERS for text in texts):
            return [np.frombuffer(ids, np.uint32) for ids in self._ids(map(self._pieces, texts))]
        found = []
        for text in texts:
            ids = bytearray()
            for window in self._windows(text):
                ids += self._ids([window])[0]
            found.append(np.frombuffer(ids, np.uint32))
        return found

    def _ids(self, texts: Iterable[list[str]]) -> list[bytes]:
        """The ids of each text, which is given in pieces."""
        parts = list(texts)
        if len(self._known) > MOST_PIECES:
            self._known.clear()
        new = list(set().union(*parts).difference(self._known))
        self._learn(new)
        find = self._known.__getitem__
        ids = [b"".join(map(find, pieces)) for pieces in parts]
        for piece in new:
            if len(piece) > LONGEST_KEPT:
                del self._known[piece]
        return ids

    def _windows(self, text: str) -> Iterator[list[str]]:
        """The pieces of a long text, some at a time: they take many times its memory."""
        start = 0
        tokens = iter(()) if self._special is None else self._special.finditer(text)
        for token in chain(tokens, (None,)):
            stop, size = len(text) if token is None else token.start(), WINDOW_CHARACTERS
            while start < stop:
                end = min(start + size, stop)
                pieces = PIECES.findall(text, start, end)
                if end < stop:
                    # The last one goes on, perhaps.
                    pieces.pop()
                if not pieces:
                    size *= 2
                    continue
                yield pieces
                start, size = start + sum(map(len, pieces)), WINDOW_CHARACTERS
            if token is not None:
                yield [token[0]]
                start = token.end()

    def _pieces(self, text: str) -> list[str]:
        """What a text is cut into."""
        if self._special is None:
            return PIECES.findall(text)
        pieces: list[str] = []
        between = self._special.split(text)
        pieces += PIECES.findall(between[0])
        for token, following in zip(between[1::2], between[2::2], strict=True):
            pieces.append(token)
            pieces += PIECES.findall(following)
        return pieces

    def _learn(self, pieces: Sequence[str]) -> None:
        """Adds the ids of pieces: those of their parts, which other pieces may have too."""
        whole: list[str] = []
        composed: list[tuple[str, list[str]]] = []
        for piece in pieces:
            is_short = self._has_parts and len(piece) <= LONGEST_KEPT
            if is_short and piece not in self._special_names:
                parts = _PART_ENDS.split(piece)
                if len(parts) > 1:
                    composed.append((piece, parts))
                    continue
            whole.append(piece)
        new = set().union(*(parts for _, parts in composed)).difference(self._known, whole)
        self._learn_whole([*whole, *new])
        known = self._known
        for piece, parts in composed:
            known[piece] = b"".join([known[part] for part in parts])

    def _learn_whole(self, pieces: Sequence[str]) -> None:
        # Behind one another, pieces are the pieces of one text only if they begin with a space.
        inner = [piece for piece in pieces if piece[0] == " " and not piece[-1].isspace()]
        alone = [piece for piece in pieces if piece[0] != " " or piece[-1].isspace()]
        groups = [inner[n : n + PIECES_AT_ONCE] for n in range(0, len(inner), PIECES_AT_ONCE)]
        for group, ids in zip(
            groups, self._encode(["".join(group) for group in groups]), strict=True
        ):
            stops = np.cumsum([len(piece.encode()) for piece in group])
            ends = np.cumsum(self._byte_lengths[ids], dtype=np.int64)
            counts = np.searchsorted(ends, stops) + 1
            if counts[-1] > len(ids) or (ends[counts - 1] != stops).any():
                # Characters without a token: each text tells for itself.
                alone += group
                continue
            self._known.update(zip(group, _cut(ids, counts), strict=True))
        for piece, ids in zip(alone, self._encode(alone), strict=True):
            self._known[piece] = ids.tobytes()

    def _encode(self, texts: Sequence[str]) -> Iterator[npt.NDArray[np.uint32]]:
        """The ids of each text, [n]."""
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.uint32)


def _cut(ids: npt.NDArray[np.uint32], counts: npt.NDArray[np.int64]) -> Iterator[bytes]:
    """The ids [n] as bytes, cut behind each of the ascending counts [pieces]."""
    raw, start = ids.tobytes(), 0
    for stop in (4 * counts).tolist():
        yield raw[start:stop]
        start = stop


def _taken_out(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are taken out of a text before all else."""
    if tokenizer.backend_tokenizer.encode_special_tokens:
        return []
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if not token.normalized]


def can_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of a text are those of its PIECES; for a byte-level tokenizer."""
    from tokenizers.models import BPE

    backend: Any = tokenizer.backend_tokenizer
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        takes_more = token.lstrip or token.rstrip or token.single_word
        if takes_more or re.search(r"\S |\n[^\s/]", token.content):
            return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    found = [_step_parts(step) for step in steps]
    return all(parts <= PARTS for parts in found) and any(SPACE in parts for parts in found)


def _step_parts(step: dict[str, Any]) -> set[str]:
    """The alternatives of a pre-tokenizer's pattern; {""} for one that is not known."""
    kind = step["type"]
    if kind == "ByteLevel":
        return {SPACE} if step["use_regex"] else set()
    if kind == "Digits":
        return set()
    pattern = step.get("pattern", {}).get("Regex")
    if kind != "Split" or pattern is None or step["behavior"] != "Isolated" or step["invert"]:
        return {""}
    return set(_alternatives(pattern))


def _alternatives(pattern: str) -> Iterator[str]:
    """Cuts a regular expression at the bars that are in no brackets."""
    start, depth, in_class, position = 0, 0, False, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character in "[]":
            in_class = character == "["
        elif character in "()" and not in_class:
            depth += 1 if character == "(" else -1
        elif character == "|" and not in_class and depth == 0:
            yield pattern[start:position]
            start = position + 1
        position += 1
    yield pattern[start:]
