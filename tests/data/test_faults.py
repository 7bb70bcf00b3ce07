"""Faults F13 to F17: bad rows, odd bytes, nothing to learn, mixed types, unprovable templates.

For each the whole message, or the part that lets a user act, is asserted.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data.build import BuildOptions, build_store
from sft_fast.data.source import Source, load_records
from sft_fast.data.store import REJECTED_FILE, TokenStore

GOOD = b'{"question": "hello", "answer": "world"}\n'
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Build = Callable[..., TokenStore]


@pytest.fixture
def build(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Build:
    def run(content: bytes, capacity: int = 64, template: str = "", **options: Any) -> TokenStore:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        tokenizer = make_tokenizer(template) if template else make_tokenizer()
        source = Source(load_records(str(path)))
        return build_store(source, tokenizer, BuildOptions(capacity, **options), tmp_path / "store")

    return run


def rejected(store: TokenStore) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.path / REJECTED_FILE).read_text().splitlines()]


@pytest.mark.fault("F13")
def test_f13_malformed_line_names_file_line_column_and_context(build: Build) -> None:
    with pytest.raises(ValueError) as caught:
        build(GOOD * 499 + b'{"question": "why", "answer" "so"}\n' + GOOD)
    first, second = str(caught.value).split("\n")
    assert first.startswith("1 of 501 records of ") and first.endswith("; mend or remove them:")
    assert second.endswith(
        "rows.jsonl:500:30: not valid JSON: Expecting ':' delimiter, "
        """near '{"question": "why", "answer" "so"}'"""
    )


@pytest.mark.fault("F13")
def test_f13_malformed_line_can_be_skipped_counted_and_listed(build: Build) -> None:
    store = build(GOOD * 199 + b"{\n", on_bad_row="skip")
    assert store.report.rejected == {"unreadable": 1}
    (entry,) = rejected(store)
    assert (entry["line"], entry["reason"]) == (200, "unreadable")
    assert "rows.jsonl:200:2: not valid JSON" in entry["message"]


@pytest.mark.fault("F13")
def test_f13_empty_file(build: Build) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: the file is empty; expected one record"):
        build(b"")


@pytest.mark.fault("F13")
def test_f13_bom_and_windows_line_ends_are_read(build: Build) -> None:
    store = build(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)
    assert [store.line(number) for number in range(2)] == [1, 2]


@pytest.mark.fault("F13")
@pytest.mark.slow
def test_f13_line_of_200_megabytes(build: Build) -> None:
    content = GOOD + b'{"question": "' + b"x" * 200_000_000 + b'", "answer" 1}\n'
    with pytest.raises(ValueError, match=r"rows\.jsonl:2:200000027: not valid JSON") as caught:
        build(content)
    assert len(str(caught.value)) < 1000


@pytest.mark.fault("F14")
def test_f14_byte_that_is_not_utf8_stops_before_training(build: Build) -> None:
    with pytest.raises(ValueError) as caught:
        build(GOOD + b'{"question": "caf\xe9", "answer": "so"}\n')
    assert (
        "rows.jsonl:2:18: byte 0xe9 is not UTF-8; save the file as UTF-8, "
        """near '{"question": "caf\\\\xe9", "answer": "so"}'""" in str(caught.value)
    )


@pytest.mark.fault("F15")
@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"question": "q", "answer": ""}, "not in the format", "'answer' is empty; give it text"),
        (
            {"messages": [{"role": "system", "content": "s"}]},
            "not in the format",
            "the conversation has no assistant turn, so nothing to learn from",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "weight": 0},
                ]
            },
            "not in the format",
            "every assistant turn has weight 0, so there is nothing to learn from",
        ),
        (
            {"question": "hello " * 200, "answer": "a"},
            "nothing to learn",
            "no supervised token is left",
        ),
    ],
)
def test_f15_rows_with_nothing_to_learn_are_counted_up_to_a_limit(
    build: Build, row: dict[str, Any], reason: str, message: str
) -> None:
    good = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    filler = good if "messages" in row else {"question": "q", "answer": "a"}
    content = (json.dumps(filler) + "\n").encode() * 99 + json.dumps(row).encode()
    options = {"on_bad_row": "skip", "over_length": "truncate_right"}
    store = build(content, **options)
    assert store.report.rejected == {reason: 1}
    assert store.num_supervised.min() > 0
    assert message in rejected(store)[-1]["message"]
    shutil.rmtree(store.path)
    with pytest.raises(ValueError, match=rf"1 of 100 records .* \(1\.0%: 1 {reason}\), more than"):
        build(content, **options, max_rejected=0.001)


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    ("value", "kind"), [(["a"], "a list"), (None, "null"), (3, "a number"), ({"a": 1}, "an object")]
)
def test_f16_mixed_types_name_both_rows(build: Build, value: Any, kind: str) -> None:
    bad = json.dumps({"question": "q", "answer": value}).encode()
    with pytest.raises(ValueError) as caught:
        build(GOOD * 2 + bad)
    assert f"rows.jsonl:3: 'answer' is {kind}" in str(caught.value)
    assert f"('answer' is {kind} in line 3 but text in line 1)" in str(caught.value)


@pytest.mark.fault("F17")
def test_f17_mask_needs_no_generation_marks_and_is_refused_where_it_cannot_be_proven(
    build: Build,
) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
    content = json.dumps({"messages": turns}).encode()
    with pytest.raises(ValueError) as caught:
        build(content, template=FORGETFUL)
    message = str(caught.value)
    assert "rows.jsonl:1: the chat template renders the same turns differently when more" in message
    assert "turns 1 to 2 give ...'" in message and "turn 1<|im_end|>" in message
    assert "...<|im_end|>" in message
    for fix in ("data.changing_history: expand", "data.train_on: last_turn", "{% generation %}"):
        assert fix in message


@pytest.mark.fault("F17")
def test_f17_one_sample_per_answer_where_the_history_changes(build: Build) -> None:
    from sft_fast.data.render import MaskOptions

    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
    content = json.dumps({"messages": turns}).encode()
    mask = MaskOptions(changing_history="expand")
    store = build(content, template=FORGETFUL, mask=mask)
    assert store.num_samples == 2
    assert 0 < store.num_supervised.sum() < len(store.tokens) / 2
    assert store.report.split == 1
