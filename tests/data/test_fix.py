"""What makes data read right: lines of YAML with which they are, or a file that is written anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_fast.cli import main
from sft_fast.data.fix import find_fix
from sft_fast.data.formats import read_conversations
from sft_fast.data.source import Source, load_records

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
QA = [("user", "q"), ("assistant", "a")]
RENAMED = [
    {"who": "sys", "text": "s", "at": "1"},
    {"who": "kunde", "text": "q", "at": "2"},
    {"who": "agent", "text": "a", "at": "3"},
]


def run(tmp_path: Path, content: bytes, name: str, capsys: Any) -> tuple[int, str, Path]:
    """Exit status and output of `data-report --fix` on a file, run in the file's folder."""
    path = tmp_path / name
    path.write_bytes(content)
    sizes = ("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads")
    config = {
        "output_dir": str(tmp_path / "out"),
        "model": {"shape": {**dict.fromkeys(sizes, 2), "hidden_size": 8, "ffn_hidden_size": 4}},
        "tokenizer": {"path": "demo"},
        "data": {"train": str(path)},
        "train": {"steps": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    status = main(["data-report", str(tmp_path / "run.yaml"), "--fix"])
    return status, capsys.readouterr().out, path


def read(data: dict[str, Any]) -> list[list[tuple[str, str]]]:
    source = Source(load_records(data["train"]), data.get("format", "auto"), data.get("fields", {}))
    conversations = [conversation for _, conversation in read_conversations([source])]
    assert find_fix(source) is None
    return [[(turn.role, turn.content) for turn in chat.messages] for chat in conversations]


def lines(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


ONE_BAD = lines({"messages": CHAT}, {"messages": CHAT[:1]})


@pytest.mark.parametrize(
    ("name", "content", "expected", "is_written"),
    [
        ("rows.jsonl", lines({"dialogue": RENAMED[1:]}), [QA], False),
        (
            "rows.jsonl",
            lines({"turns": [{"speaker": "user", "said": "q"}, {"speaker": "x", "said": "a"}]}),
            [QA],
            False,
        ),
        ("rows.jsonl", lines({"prompt": "q", "chosen": "a", "rejected": "b"}), [QA], False),
        (
            "rows.jsonl",
            lines({"prompt": "q", "chosen": CHAT, "rejected": [*CHAT[:1], CHAT[1]]}),
            [QA],
            False,
        ),
        ("rows.jsonl", lines({"id": "1", "frage": "q", "antwort": "a", "n": 3}), [QA], False),
        # Of several kinds, each as what it is.
        (
            "rows.jsonl",
            lines({"messages": CHAT}, {"instruction": "q", "output": "a"}),
            [QA, QA],
            True,
        ),
        ("rows.jsonl", lines({"messages": CHAT}) + b"\n{broken\n", [QA], True),
        ("rows.jsonl", ONE_BAD, [QA], True),
        # Files that are no list of records.
        ("rows.json", json.dumps({"data": [{"messages": CHAT}]}, indent=1).encode(), [QA], True),
        ("rows.json", lines({"data": [{"messages": CHAT}], "version": 1}), [QA], True),
        ("rows.json", lines({"data": [{"instruction": "q", "output": "a"}] * 2}), [QA] * 2, True),
        ("rows.json", json.dumps({"question": "q", "answer": "a"}, indent=1).encode(), [QA], True),
        ("rows.jsonl", (json.dumps({"messages": CHAT}, indent=1) * 2).encode(), [QA, QA], True),
        ("rows.json", lines({"question": {"0": "q"}, "answer": {"0": "a"}}), [QA], True),
        ("rows.json", lines({"question": ["q"], "answer": ["a"]}), [QA], True),
        ("rows.json", lines({"columns": ["question", "answer"], "data": [["q", "a"]]}), [QA], True),
        ("rows.csv", b"question;answer\nq;a\n", [QA], True),
        ("rows.jsonl", json.dumps({"messages": CHAT}).encode("utf-16"), [QA], True),
    ],
)
def test_lines_or_a_file_that_make_the_data_read_right(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    expected: Any,
    is_written: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, _ = run(tmp_path, content, name, capsys)
    assert status == 0, output
    assert (tmp_path / "rows.fixed.jsonl").exists() == is_written
    assert read(yaml.safe_load(output)["data"]) == expected
    left_out = (tmp_path / "rows.fixed.jsonl.rejected").exists()
    assert left_out == ("left out" in output) == (b"{broken" in content or content == ONE_BAD)


@pytest.mark.parametrize(
    "content",
    [
        lines({"prompt": "q", "completion": "a", "label": False}),
        lines({"question": "q", "answer": "a", "options": ["x"]}),
        lines({"instruction": "q", "response": "a", "output": "b"}),
        lines({"dialogue": RENAMED}),
        lines({"a": 1}),
    ],
)
def test_what_only_the_user_can_decide_is_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, path = run(tmp_path, content, "rows.jsonl", capsys)
    assert status == 1 and output.startswith(f"# data.train: nothing was found for: {path}:1: ")
    assert yaml.safe_load(output) is None and not list(tmp_path.glob("*.fixed*"))


def test_a_column_that_occurs_twice_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = b"question,answer,answer\nq,a,b\n"
    assert run(tmp_path, content, "rows.csv", capsys)[0] == 1


def test_data_that_are_read_and_files_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, _ = run(tmp_path, lines({"messages": CHAT}), "rows.jsonl", capsys)
    assert (status, output) == (0, "# data.train: all is read\n")
    (tmp_path / "rows.fixed.jsonl").write_text("mine")
    broken = json.dumps({"data": [{"messages": CHAT}]}, indent=1).encode()
    assert run(tmp_path, broken, "rows.json", capsys)[0] == 2
    assert (tmp_path / "rows.fixed.jsonl").read_text() == "mine"
