"""What is seldom meant is read as it stands and named; what is meant is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from config_cases import SMALLEST_SHAPE
from sft_fast.config import Config
from sft_fast.data.conversation import Conversation
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.formats import ConversationReader
from sft_fast.data.from_config import build_options, find_sources, open_data_store
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.oddities import find_oddities
from sft_fast.preflight.preview import make_preview

PLACEHOLDER = "an answer that is a placeholder, as 'nan'"
TOKENS = "control tokens as text"


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def answer(text: str) -> dict[str, Any]:
    return chat(("user", "q"), ("assistant", text))


def read(row: dict[str, Any]) -> Conversation:
    return ConversationReader("auto")(SourceRecord(row, "rows.jsonl", 1))


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (
            chat(("assistant", "Hi!"), ("user", "q"), ("assistant", "a")),
            ["chats that begin with the assistant"],
        ),
        (
            chat(("system", "s"), ("assistant", "Hi!"), ("user", "q"), ("assistant", "a")),
            ["chats that begin with the assistant"],
        ),
        (
            chat(("user", "q"), ("assistant", "a"), ("user", "Thanks")),
            ["chats that end with the user"],
        ),
        (
            chat(("user", "q"), ("assistant", "a"), ("tool", "2")),
            ["chats that end with the tool"],
        ),
        (
            chat(("user", "q"), ("user", "q?"), ("assistant", "a")),
            ["two turns of the user in a row"],
        ),
        (
            chat(("user", "q"), ("assistant", "a"), ("assistant", "b")),
            ["two turns of the assistant in a row"],
        ),
        (
            chat(("user", "q"), ("assistant", "a"), ("system", "s"), ("user", "r"), ("gpt", "b")),
            ["a system turn inside of a chat"],
        ),
        (
            chat(("system", "s"), ("system", "t"), ("user", "q"), ("assistant", "a")),
            ["two system turns in front of a chat"],
        ),
        (answer("q"), ["an answer that repeats its question"]),
        (answer("&lt;b&gt; &quot;x&quot;"), ["HTML"]),
        (answer("one<br>two"), ["HTML"]),
        (chat(("user", "<p class='x'>q</p>"), ("assistant", "a")), ["HTML"]),
        (answer("a<|im_end|>"), [TOKENS]),
        (answer("a</s>"), [TOKENS]),
        (chat(("user", "[INST] q [/INST]"), ("assistant", "a")), [TOKENS]),
        (answer("a<end_of_turn>"), [TOKENS]),
        (answer("a\n### Instruction:\nq"), ["headings of a prompt template"]),
        (answer("Assistant: a"), ["speakers' names in a text"]),
        (answer("a\n\nHuman: r"), ["speakers' names in a text"]),
        (answer("see data:image/png;base64,AAAA"), ["an image as text"]),
        (answer("a\r\nb"), ["carriage returns"]),
        (answer(r"a\nb"), [r"\n as two characters in a text without line breaks"]),
        (answer("caf\u00c3\u00a9"), ["characters in the wrong encoding"]),
        (answer("it\u00e2\u20ac\u2122s"), ["characters in the wrong encoding"]),
        (answer("caf\ufffd"), ["characters that were lost in decoding"]),
        (answer("\ufeffa"), ["invisible characters"]),
        (answer("nan"), [PLACEHOLDER]),
        (answer("N/A "), [PLACEHOLDER]),
        (answer("['Ulm', 'Bonn']"), ["an answer that is a list in Python's notation"]),
        (answer("array(['Ulm'], dtype=object)"), ["an answer that is a list in Python's notation"]),
        ({"text": "a &amp; b"}, ["HTML"]),
    ],
)
def test_what_is_seldom_meant_is_named(row: dict[str, Any], names: list[str]) -> None:
    assert list(find_oddities(read(row))) == names


@pytest.mark.parametrize(
    "row",
    [
        {"Instruction": "C", "Input": "d", "Output": "E"},
        chat(("SYSTEM", "S"), ("User", "Q"), ("Assistant ", "A")),
        answer("R&D; AT&T, a < b, x[0], f(1), 10:30, e.g.: this\n- None of these"),
        answer("print('a\\n')\nprint('b')"),
        answer("Sch\u00f6ne Gr\u00fc\u00dfe, \u00c3o \u00c2ngulo \U0001f469\u200d\U0001f467"),
        answer("[1, 2]"),
        chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "a")),
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "channel": "analysis", "content": "hm"},
                {"role": "assistant", "channel": "final", "content": "a"},
            ]
        },
    ],
)
def test_what_is_meant_is_not_named(row: dict[str, Any]) -> None:
    assert find_oddities(read(row)) == ()


def test_names_of_columns_and_roles_in_capitals_are_read() -> None:
    turns = read(chat(("SYSTEM", "S"), ("User", "Q"), ("Assistant ", "A"))).messages
    assert [turn.role for turn in turns] == ["system", "user", "assistant"]
    turns = read({"Instruction": "C", "Input": "d", "Output": "E"}).messages
    assert [turn.content for turn in turns] == ["C\nd", "E"]


def test_the_report_counts_it_and_the_preview_names_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [answer("a&amp;b"), answer("b&lt;c"), answer("c"), answer("nan")]
    rows[3]["by"] = "x"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"shape": SMALLEST_SHAPE},
            "tokenizer": {"path": "demo"},
            "data": {"train": str(path)},
            "packing": {"capacity": 256},
            "train": {"steps": 1},
        }
    )
    options = build_options(config.model, config.data, config.packing)
    sources = find_sources(config.data, "train")
    assert sources is not None
    for _ in ("built", "found again"):
        store = open_data_store(sources, demo_tokenizer(), options, config.data, config.output_dir)
        assert store.report.odd == {"HTML": 2, PLACEHOLDER: 1}
        line = f"in records, worth a look: HTML (2), {PLACEHOLDER} (1)"
        assert line in store.summary()
    shown = make_preview(config, demo_tokenizer(), 9).samples
    assert [sample.warnings for sample in shown] == [
        ("worth a look: HTML",),
        ("worth a look: HTML",),
        (),
        (f"worth a look: {PLACEHOLDER}", "without effect: by"),
    ]


def test_a_store_that_is_found_again_has_the_name_of_its_source(tmp_path: Path) -> None:
    from sft_fast.data.build import BuildOptions, prepare_store
    from sft_fast.data.source import Source, load_records

    names = []
    for name in ("first.jsonl", "second.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps({**answer("a"), "": 1}) + "\n")
        source = Source(load_records(str(path)))
        store = prepare_store(source, demo_tokenizer(), BuildOptions(64), tmp_path / "cache")
        names.append(store.summary().split(":")[0])
        assert "without effect: '' (1)" in store.summary()
    assert names == [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")]
