"""Every kind of source becomes the same file of messages."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_fast.data.convert import convert
from sft_fast.data.source import Source, load_records


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "rain", "arguments": arguments}}


def chat(question: str, **arguments: Any) -> dict[str, Any]:
    """No two chats have calls with the same arguments, which the columns of a table must."""
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call(**arguments)], "weight": 0.5},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "It is dry.\n"},
    ]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in arguments}}
    function = {"name": "rain", "description": "Tells.", "parameters": schema}
    return {"messages": turns, "tools": [{"type": "function", "function": function}]}


CHATS = [chat("Bonn?", city="Bonn"), chat("Tomorrow, où?", day="tomorrow", place="où")]


def write(path: Path) -> str:
    """Writes CHATS in the kind that the name says."""
    import datasets

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(CHATS, indent=2))
    elif path.suffix == ".csv":
        texts = [{name: json.dumps(value) for name, value in row.items()} for row in CHATS]
        datasets.Dataset.from_list(texts).to_csv(str(path))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(CHATS).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(CHATS).save_to_disk(str(path.parent / "saved"))
        return str(path.parent / "saved")
    return str(path)


def converted(source: Source, folder: Path) -> list[Any]:
    output = folder / "messages.jsonl"
    assert convert(source, output) == (len(CHATS), 0)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}")
    assert converted(Source(load_records(path)), tmp_path) == CHATS


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    builder = SimpleNamespace(
        download_and_prepare=lambda: None,
        as_dataset=lambda split: datasets.Dataset.from_list(CHATS),
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    assert converted(Source(load_records("owner/name")), tmp_path) == CHATS
