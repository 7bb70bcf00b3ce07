"""Texts cut into pieces have the tokens, and the pre-tokens, that they have whole."""

import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast.data.token_cache import _PART_ENDS, PIECES, PieceTokenizer, can_be_cut
from sft_fast.data.tokens import _byte_lengths

MakeTokenizer = Callable[..., Any]
PUNCTUATION = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# The patterns of public tokenizers, in the order in which they are applied.
PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt2": (),
    "llama3": (LLAMA3,),
    "qwen2": (LLAMA3.replace("{1,3}", ""),),
    "gpt4o": (f"{LETTERS[0]}{SHORT}|{LETTERS[1]}{SHORT}|\\p{{N}}{{1,3}}|{REST}",),
    "tekken": (f"{LETTERS[0]}|{LETTERS[1]}|\\p{{N}}|{REST}",),
    "deepseek": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        rf"[{PUNCTUATION}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "smollm2": ("digits",),
}
NASTY = st.text(
    st.one_of(
        st.sampled_from(
            "ab12'sSt .,/<\n\r\t\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\u200b\ufeff\u180e世é٣🎉"
        ),
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from([*"   \n"]),
    ),
    max_size=40,
)


def pre_tokenizer(patterns: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == "digits"
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in patterns
    ]
    is_regex = patterns in ((), ("digits",))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_regex))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


@pytest.fixture(params=PATTERNS)
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> Any:
    made = make_tokenizer(special=["<|x|>", "|"])
    made.backend_tokenizer.pre_tokenizer = pre_tokenizer(PATTERNS[request.param])
    return made


def pieces_of(tokenizer: Any) -> PieceTokenizer:
    lengths = _byte_lengths(tokenizer)
    assert lengths is not None and can_be_cut(tokenizer)
    return PieceTokenizer(tokenizer, lengths)


def whole(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def check_pre_tokens(tokenizer: Any, text: str) -> None:
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    parts = PIECES.findall(text)
    assert "".join(parts) == text
    whole = [part for part, _ in split(text)]
    assert [part for piece in parts for part, _ in split(piece)] == whole, text
    ends = [end for piece in parts for end in _PART_ENDS.split(piece)]
    assert [part for end in ends for part, _ in split(end)] == whole, text


def test_no_part_reaches_over_a_cut(tokenizer: Any) -> None:
    @settings(max_examples=150, deadline=None)
    @given(NASTY)
    def check(text: str) -> None:
        check_pre_tokens(tokenizer, text)

    check()


def test_every_kind_of_space_and_invisible_character(tokenizer: Any) -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf"):
            check_pre_tokens(tokenizer, f"a{character} b.{character} 1 {character}{character} '")


@pytest.mark.parametrize("window", [5, 1 << 18])
def test_tokens_are_those_of_the_whole_text(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    pieces = pieces_of(tokenizer)
    monkeypatch.setattr("sft_fast.data.token_cache.WINDOW_CHARACTERS", window)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=4))
    def check(pairs: list[tuple[str, str]]) -> None:
        # Neighbours of special tokens, and pieces that a call before has left behind.
        texts = [f"{a}<|x|>{b} hello <s>world, {a}|{b}" for a, b in pairs]
        found = [ids.tolist() for ids in pieces(texts)]
        assert found == [whole(tokenizer, text) for text in texts]

    check()


@pytest.mark.parametrize("window", [1, 6, 1 << 18])
@pytest.mark.parametrize(("most", "longest"), [(0, 64), (3, 4), (1 << 16, 0)])
def test_what_is_kept_does_not_change_the_tokens(
    make_tokenizer: MakeTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    longest: int,
    window: int,
) -> None:
    monkeypatch.setattr("sft_fast.data.token_cache.MOST_PIECES", most)
    monkeypatch.setattr("sft_fast.data.token_cache.LONGEST_KEPT", longest)
    monkeypatch.setattr("sft_fast.data.token_cache.PIECES_AT_ONCE", 2)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(PATTERNS["llama3"])
    pieces = pieces_of(tokenizer)
    monkeypatch.setattr("sft_fast.data.token_cache.WINDOW_CHARACTERS", window)
    for text in ("how are you how are you", "世界 the user and x" * 9, "", " ", "the user", "a \n"):
        assert pieces([text, text])[1].tolist() == whole(tokenizer, text)
        assert len(pieces._known) <= most + len(PIECES.findall(text))
        assert all(len(piece) <= longest for piece in pieces._known)


def test_a_long_text_is_cut_in_memory_of_a_few_times_its_size(
    make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_fast.data.token_cache.WINDOW_CHARACTERS", 1 << 12)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(PATTERNS["llama3"])
    pieces, text = pieces_of(tokenizer), "how are you, the user? " * 20_000
    tracemalloc.start()
    try:
        (ids,) = pieces([text])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A list of all pieces would be about twenty times the text.
    assert peak < 2 * ids.nbytes + 2 * len(text)
    assert ids[:9].tolist() == whole(tokenizer, text[:64])[:9]


def test_characters_without_a_token_do_not_shift_the_others() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1, "b": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a b x b xa ab"
    assert pieces_of(tokenizer)([text])[0].tolist() == whole(tokenizer, text)


@pytest.mark.parametrize("token", ["b|a", "a1", "1.", "x\n", "<|im_start|>"])
@pytest.mark.parametrize("normalized", [True, False])
def test_no_cut_is_inside_of_an_added_token(
    make_tokenizer: MakeTokenizer, token: str, normalized: bool
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(PATTERNS["qwen2"])
    tokenizer.add_tokens([AddedToken(token, normalized=normalized)])
    text = f"a{token} {token}z \n  {token}\n{token}{token} b|a1.2 {token}"
    assert pieces_of(tokenizer)([text])[0].tolist() == whole(tokenizer, text)


@pytest.mark.parametrize(
    "case", ["pattern", "lstrip", "rstrip", "word", "space", "break", "behavior", "dropout"]
)
def test_other_tokenizers_are_left_alone(make_tokenizer: MakeTokenizer, case: str) -> None:
    from tokenizers import AddedToken, Regex, pre_tokenizers

    tokenizer = make_tokenizer()
    assert not can_be_cut(tokenizer), "its pattern is none of those"
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizer(PATTERNS["gpt2"])
    assert can_be_cut(tokenizer)
    if case == "pattern":
        backend.pre_tokenizer = pre_tokenizer((LLAMA3 + r"|\S+ \S+",))
    elif case == "behavior":
        split = pre_tokenizers.Split(Regex(LLAMA3), behavior="merged_with_next")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif case == "dropout":
        backend.model.dropout = 0.1
    else:
        content = {"space": "new york", "break": "\nyork"}.get(case, "<new>")
        options = {"lstrip": case == "lstrip", "rstrip": case == "rstrip"}
        options["single_word"] = case == "word"
        tokenizer.add_tokens([AddedToken(content, **options)])
    assert not can_be_cut(tokenizer)
