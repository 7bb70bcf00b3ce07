import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data.json_rows import BadRow
from sft_fast.data.source import load_rows

GOOD = '{"question": "q", "answer": "a"}'


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_rows_keep_file_and_line_over_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"\n{GOOD}\n\n  \n{GOOD}".encode())
    rows = list(load_rows(path))
    assert [row.origin for row in rows] == [f"{path}:2", f"{path}:5"]
    assert rows[0].values == {"question": "q", "answer": "a"}


def test_bom_and_crlf_are_tolerated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert [row.values for row in load_rows(path)] == [{"a": "x"}, {"a": "y"}]


def test_unusual_line_separators_inside_a_text_do_not_split_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n'.encode())
    assert [row.values for row in load_rows(path)] == [{"a": "x\u2028y\u0085z"}]


def test_json_list_gives_the_line_of_each_row(tmp_path: Path) -> None:
    text = '\ufeff[\n {"a": 1,\n  "b": 2},\n\n {"a": 3}, {"a": 4}\n]\n'
    path = write(tmp_path / "a.json", text.encode())
    rows = list(load_rows(path))
    assert [(row.line, row.values["a"]) for row in rows] == [(2, 1), (5, 3), (5, 4)]


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (f'{GOOD}\n{{"a" 1}}\n', ":2:6: ", "not valid JSON: Expecting ':' delimiter"),
        (f"{GOOD}\n[1, 2]\n", ":2:1: ", "the row is a list; expected an object"),
        (f"{GOOD}\n42\n", ":2:1: ", "the row is a number; expected an object"),
        (f'{GOOD}\n{{"a": "cut', ":2:7: ", "Unterminated string"),
        (f"{GOOD}\n" + '{"a":' * 100_000 + "\n", ":2:1: ", "recursion"),
        (f'{GOOD}\n{{"a": {"9" * 5000}}}\n', ":2:1: ", "digits"),
    ],
)
def test_bad_line_is_named_with_its_column(
    tmp_path: Path, content: str, place: str, problem: str
) -> None:
    path = write(tmp_path / "bad.jsonl", content.encode())
    with pytest.raises(ValueError) as caught:
        list(load_rows(path))
    assert str(caught.value).startswith(path + place)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 400


def test_context_of_a_long_line_is_80_characters_around_the_place(tmp_path: Path) -> None:
    line = '{"a": "' + "x" * 1_000_000 + '" oops, "b": "' + "y" * 1_000_000 + '"}'
    path = write(tmp_path / "a.jsonl", line.encode())
    with pytest.raises(ValueError, match="oops") as caught:
        list(load_rows(path))
    context = str(caught.value).split("near ")[1].strip("'")
    assert len(context) == 80


def test_byte_that_is_not_utf8_is_found_at_load_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD.encode() + b'\n{"a": "\xc3\xa9t\xff"}\n')
    with pytest.raises(ValueError, match="byte 0xff is not UTF-8") as caught:
        list(load_rows(path))
    assert str(caught.value).startswith(f"{path}:2:10: ")


def test_scan_yields_bad_rows_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"{GOOD}\nnonsense\n\xff\n{GOOD}\n".encode("latin-1"))
    rows = list(load_rows(path).scan())
    assert [(type(row) is BadRow, row.line) for row in rows] == [
        (False, 1),
        (True, 2),
        (True, 3),
        (False, 4),
    ]


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (b'[\n {"a": 1},\n {"a" 2}\n]', ":3:7: ", "Expecting ':' delimiter"),
        (b'[\n {"a": 1}\n {"a": 2}\n]', ":3:2: ", "expected ',' or ']' after a row"),
        (b'[{"a": 1},\n]', ":2:1: ", "Expecting value"),
        (b'[{"a": 1}', ":1:10: ", "expected ',' or ']' after a row"),
        (b'[{"a": 1}]\n{"a": 2}', ":2:1: ", "text after the end of the list"),
        (b'[{"a": 1},\n "text"]', ":2:1: ", "the row is text; expected an object"),
        (b'[{"a": 1},\n {"a": "\xff"}]', ":2:9: ", "byte 0xff is not UTF-8"),
        (b"[ ]", ": ", "the list is empty"),
        (b"", ": ", "the file is empty"),
        (b"\xef\xbb\xbf \r\n\n", ": ", "the file is empty"),
        ('{"a": 1}'.encode("utf-16"), ":1:1: ", "the file is UTF-16"),
    ],
)
def test_bad_json_list_and_empty_file(
    tmp_path: Path, content: bytes, place: str, problem: str
) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError) as caught:
        list(load_rows(path))
    assert str(caught.value).startswith(path + place)
    assert problem in str(caught.value)


def test_missing_file_suggests_near_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD.encode())
    with pytest.raises(ValueError, match=r"trian\.jsonl does not exist.*nearest.*train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match=f"the path is right up to {tmp_path}"):
        load_rows(str(tmp_path / "no" / "such" / "train.jsonl"))


@pytest.mark.parametrize("source", ["", "a b c", "owner/name/more/parts"])
def test_source_that_is_nothing_we_know(source: str) -> None:
    with pytest.raises(ValueError, match="data source"):
        load_rows(source)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot read this kind of file"):
        load_rows(path)


def test_directory_picks_the_files_of_the_split(tmp_path: Path) -> None:
    for name in ("train-00.jsonl", "train-01.jsonl", "test.jsonl"):
        write(tmp_path / name, json.dumps({"a": name}).encode())
    write(tmp_path / "notes.txt", b"not data")
    folder = str(tmp_path)
    assert [row.values["a"] for row in load_rows(folder)] == ["train-00.jsonl", "train-01.jsonl"]
    assert [row.values["a"] for row in load_rows(folder, evaluation=True)] == ["test.jsonl"]
    with pytest.raises(ValueError, match="no split 'validation'; its file names give test, train"):
        load_rows(folder, "validation")


def test_directory_without_split_names_is_all_train(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json"):
        write(tmp_path / name, b'[{"a": 1}]')
    assert len(list(load_rows(str(tmp_path)))) == 2
    with pytest.raises(ValueError, match="no split 'eval'"):
        load_rows(str(tmp_path), evaluation=True)


def test_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, json.dumps({"a": name}).encode())
    rows = load_rows(str(tmp_path / "*.jsonl"))
    assert [row.values["a"] for row in rows] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match="no file matches"):
        load_rows(str(tmp_path / "*.json"))


def test_slices_split_a_file_without_overlap(write_rows: Callable[..., str]) -> None:
    path = write_rows([{"a": number} for number in range(10)])
    first = [row.values["a"] for row in load_rows(path, "train[:80%]")]
    rest = [row.values["a"] for row in load_rows(path, "train[80%:]")]
    assert first + rest == list(range(10))
    assert len(rest) == 2
    assert load_rows(path, "train[:80%]").digest != load_rows(path, "train[80%:]").digest
    with pytest.raises(ValueError, match="empty"):
        list(load_rows(path, "train[20:]"))
    with pytest.raises(ValueError, match="slice"):
        list(load_rows(path, "train[a:]"))
    with pytest.raises(ValueError, match="has the one split 'train', not 'test'"):
        load_rows(path, "test")
    with pytest.raises(ValueError, match="cannot read the split 'train:10'"):
        load_rows(path, "train:10")


def test_digest_is_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", GOOD.encode())
    same = write(tmp_path / "b.jsonl", GOOD.encode())
    other = write(tmp_path / "c.jsonl", GOOD.encode() + b"\n")
    assert load_rows(first).digest == load_rows(same).digest
    assert load_rows(first).digest != load_rows(other).digest


def test_demo_source_has_train_and_eval() -> None:
    assert load_rows("demo").files == (
        "demo/train-alpaca.jsonl",
        "demo/train-messages.jsonl",
        "demo/train-chatml.jsonl",
    )
    assert load_rows("demo", "train").digest == load_rows("demo").digest
    assert load_rows("demo", evaluation=True).files == ("demo/eval.jsonl",)
    assert len(list(load_rows("demo", "eval[:10]"))) == 10
    with pytest.raises(ValueError, match="no split 'test'; it has train and eval"):
        load_rows("demo", "test")


class FakeHub:
    """Stands in for the hub: remembers what was asked."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[Any] = []

    def load_dataset(self, *arguments: Any, **options: Any) -> Any:
        from datasets import Dataset

        self.asked.append((arguments, options))
        return Dataset.from_list(self.rows)


def test_hub_is_asked_on_first_use_only(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    hub = FakeHub([{"question": "q"}, {"question": "r"}])
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    rows = load_rows("owner/name:main@v1", "train[:2]")
    assert hub.asked == []
    assert [row.values["question"] for row in rows] == ["q", "r"]
    assert [row.origin for row in rows] == [
        "owner/name:main@v1[train[:2]]:1",
        "owner/name:main@v1[train[:2]]:2",
    ]
    assert hub.asked == [(("owner/name", "main"), {"split": "train[:2]", "revision": "v1"})]


def test_hub_evaluation_split_is_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["train", "test", "validation"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: names)
    assert load_rows("owner/name", evaluation=True).name == "owner/name[validation]"
    names[:] = ["train"]
    with pytest.raises(ValueError, match=r"data\.eval_split"):
        load_rows("owner/name", evaluation=True)


def test_hub_error_names_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="'owner/name' is no local file.*cannot reach the hub"):
        list(load_rows("owner/name"))
