"""Masks of ten public template families, written by hand: not one token may be wrong."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

import template_families as families
from masks import marked, sample_of, samples_of
from sft_fast.data.templates import chat_template
from sft_fast.data.token_cache import can_be_cut

MakeTokenizer = Callable[..., Any]


def tokenizer_of(family: Any, make_tokenizer: MakeTokenizer, in_pieces: bool = False) -> Any:
    tokenizer = make_tokenizer(
        family.template, special=family.special, bos_token=family.bos, eos_token=family.eos
    )
    if in_pieces:
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert can_be_cut(tokenizer) == in_pieces
    return tokenizer


CASES = [(family, case) for family in families.FAMILIES for case in family.cases]


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in_pieces"])
@pytest.mark.parametrize(("family", "case"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_mask_is_the_one_written_by_hand(
    make_tokenizer: MakeTokenizer, family: Any, case: Any, in_pieces: bool
) -> None:
    tokenizer = tokenizer_of(family, make_tokenizer, in_pieces)
    expected = (case.expected,) if isinstance(case.expected, str) else case.expected
    samples = samples_of(tokenizer, case.conversation, **case.options)
    assert tuple(marked(tokenizer, sample) for sample in samples) == expected
    if len(expected) > 1:
        with pytest.raises(ValueError, match="renders the same turns differently when more follow"):
            samples_of(tokenizer, case.conversation)
        last = sample_of(tokenizer, case.conversation, train_on="last_turn")
        assert marked(tokenizer, last) == expected[-1]


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f.ours], ids=lambda f: f.name)
def test_our_template_gives_the_same(make_tokenizer: MakeTokenizer, family: Any) -> None:
    tokenizer = tokenizer_of(family, make_tokenizer)
    tokenizer.chat_template = chat_template(family.ours, tokenizer)
    for case in family.cases:
        assert marked(tokenizer, sample_of(tokenizer, case.conversation)) == case.expected


def test_there_are_ten_families() -> None:
    assert len({family.name.split("_")[0] for family in families.FAMILIES}) >= 10
