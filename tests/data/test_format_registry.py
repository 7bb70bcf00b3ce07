"""Formats and row functions that users bring along."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data.build import BuildOptions, build_store, store_fingerprint
from sft_fast.data.formats import load_format, read_conversations
from sft_fast.data.source import Source, load_records
from sft_fast.registry import forget

FORMATS = """
import random
from dataclasses import replace
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.formats import register_format, register_row_function

def shout(text):
    return text.upper()

@register_format("pairs_%(tag)s", detect=lambda row: "pair" in row)
def pairs(record):
    question, answer = record["pair"]
    return Conversation((Message("user", question), Message("assistant", shout(answer))))

@register_row_function("system_%(tag)s")
def system(conversation, rng):
    text = rng.choice(["Be brief.", "Be kind."]) + str(rng.random())
    return replace(conversation, messages=(Message("system", text), *conversation.messages))

@register_row_function("cheat_%(tag)s")
def cheat(conversation, rng):
    return replace(conversation, messages=conversation.messages[:-1] + (Message("assistant", "x"),))
"""
MakeTokenizer = Callable[..., Any]


@pytest.fixture
def own_file(tmp_path: Path) -> Iterator[Path]:
    """A file with a format and two row functions; the registries forget them afterwards."""
    path = tmp_path / "own.py"
    path.write_text(FORMATS % {"tag": "a"})
    yield path
    forget(str(path))


def pairs(path: Path, count: int = 3) -> str:
    rows = path.with_name("rows.jsonl")
    rows.write_text("".join(json.dumps({"pair": [f"q{i}", f"a{i}"]}) + "\n" for i in range(count)))
    return str(rows)


def test_format_out_of_a_file_named_in_the_config(own_file: Path) -> None:
    rows = load_records(pairs(own_file))
    for reference in (str(own_file), f"{own_file}:pairs_a", "pairs_a", "auto"):
        found = [chat.messages[1].content for _, chat in read_conversations(rows, reference)]
        assert found == ["A0", "A1", "A2"], reference


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{folder}/none.py", "data.format: .*none.py does not exist; expected a Python file"),
        ("{folder}/own.py:pears", r"own\.py:pears does not name one format; .* registers pairs_a"),
        ("{folder}/empty.py", r"empty\.py does not name one format; .* registers nothing"),
    ],
)
def test_file_without_the_format(own_file: Path, reference: str, message: str) -> None:
    own_file.with_name("empty.py").write_text("")
    with pytest.raises(ValueError, match=message):
        load_format(reference.format(folder=own_file.parent))


def test_fingerprint_covers_the_whole_file(own_file: Path, make_tokenizer: MakeTokenizer) -> None:
    rows = load_records(pairs(own_file))
    other = own_file.with_name("other.py")
    other.write_text((FORMATS % {"tag": "a"}).replace("upper", "lower"))
    fingerprints = []
    for path in (own_file, other):
        options = BuildOptions(64, row_functions=(f"{path}:system_a",))
        source = Source(rows, f"{path}:pairs_a")
        fingerprints.append(store_fingerprint(source, make_tokenizer(), options)[0])
        forget(str(path))
    assert fingerprints[0] != fingerprints[1]


def test_row_function_changes_what_is_read_the_same_way_every_time(
    own_file: Path, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    source = Source(load_records(pairs(own_file, 20)), str(own_file))
    options = BuildOptions(128, row_functions=(f"{own_file}:system_a",))
    stores = [
        build_store(source, tokenizer, options, tmp_path / str(processes), processes=processes)
        for processes in (1, 2)
    ]
    texts = [tokenizer.decode(stores[0].sample(number)[0].tolist()) for number in range(20)]
    assert all(text.startswith("<|im_start|>system\nBe ") for text in texts)
    assert len(set(texts)) == 20
    assert stores[0].tokens.tolist() == stores[1].tokens.tolist()


def test_row_function_may_not_change_what_is_learnt(
    own_file: Path, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    source = Source(load_records(pairs(own_file)), str(own_file))
    options = BuildOptions(128, row_functions=(f"{own_file}:cheat_a",))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: the row function 'cheat_a' changed an as"
    ):
        build_store(source, make_tokenizer(), options, tmp_path / "store")
    options = BuildOptions(128, row_functions=("none",))
    with pytest.raises(ValueError, match=r"data\.row_functions: no row function 'none'"):
        build_store(source, make_tokenizer(), options, tmp_path / "store")
