import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_fast.data.build import BuildOptions, prepare_store
from sft_fast.data.json_records import BadRecord
from sft_fast.data.source import Source, load_records

GOOD = '{"question": "q", "answer": "a"}'


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_rows_keep_file_and_line_over_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"\n{GOOD}\n\n  \n{GOOD}".encode())
    rows = list(load_records(path))
    assert [row.origin for row in rows] == [f"{path}:2", f"{path}:5"]
    assert rows[0].values == {"question": "q", "answer": "a"}


def test_bom_and_crlf_are_tolerated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert [row.values for row in load_records(path)] == [{"a": "x"}, {"a": "y"}]


def test_unusual_line_separators_inside_a_text_do_not_split_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n'.encode())
    assert [row.values for row in load_records(path)] == [{"a": "x\u2028y\u0085z"}]


def test_json_list_gives_the_line_of_each_row(tmp_path: Path) -> None:
    text = '\ufeff[\n {"a": 1,\n  "b": 2},\n\n {"a": 3}, {"a": 4}\n]\n'
    path = write(tmp_path / "a.json", text.encode())
    rows = list(load_records(path))
    assert [(row.line, row.values["a"]) for row in rows] == [(2, 1), (5, 3), (5, 4)]


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (f'{GOOD}\n{{"a" 1}}\n', ":2:6: ", "not valid JSON: Expecting ':' delimiter"),
        (f"{GOOD}\n[1, 2]\n", ":2:1: ", "the record is a list; expected an object"),
        (f"{GOOD}\n{GOOD},\n", f":2:{len(GOOD) + 1}: ", "a comma behind the object"),
        (f"{GOOD}\n{GOOD}{GOOD}\n", f":2:{len(GOOD) + 1}: ", "more text behind the object"),
        (f"{GOOD}\n42\n", ":2:1: ", "the record is a number; expected an object"),
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
        list(load_records(path))
    assert str(caught.value).startswith(path + place)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 400


def test_context_of_a_long_line_is_80_characters_around_the_place(tmp_path: Path) -> None:
    line = '{"a": "' + "x" * 1_000_000 + '" oops, "b": "' + "y" * 1_000_000 + '"}'
    path = write(tmp_path / "a.jsonl", line.encode())
    with pytest.raises(ValueError, match="oops") as caught:
        list(load_records(path))
    context = str(caught.value).split("near ")[1].strip("'")
    assert len(context) == 80


def test_byte_that_is_not_utf8_is_found_at_load_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD.encode() + b'\n{"a": "\xc3\xa9t\xff"}\n')
    with pytest.raises(ValueError, match="byte 0xff is not UTF-8") as caught:
        list(load_records(path))
    assert str(caught.value).startswith(f"{path}:2:10: ")


def test_scan_yields_bad_rows_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"{GOOD}\nnonsense\n\xff\n{GOOD}\n".encode("latin-1"))
    rows = list(load_records(path).scan())
    assert [(type(row) is BadRecord, row.line) for row in rows] == [
        (False, 1),
        (True, 2),
        (True, 3),
        (False, 4),
    ]


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (b'[\n {"a": 1},\n {"a" 2}\n]', ":3:7: ", "Expecting ':' delimiter"),
        (b'[\n {"a": 1}\n {"a": 2}\n]', ":3:2: ", "expected ',' or ']' after a record"),
        (b'[{"a": 1},\n]', ":1:10: ", "a comma behind the last record"),
        (b'{\n "a": 1\n}\n', ":1: ", "one object over several lines; expected one object a line"),
        (b'[{"a": 1}', ":1:10: ", "expected ',' or ']' after a record"),
        (b'[{"a": 1}]\n{"a": 2}', ":2:1: ", "text after the end of the list"),
        (b'[{"a": 1},\n "text"]', ":2:1: ", "the record is text; expected an object"),
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
        list(load_records(path))
    assert str(caught.value).startswith(path + place)
    assert problem in str(caught.value)


def test_missing_file_suggests_near_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD.encode())
    with pytest.raises(ValueError, match=r"trian\.jsonl does not exist.*nearest.*train\.jsonl"):
        load_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match=f"the path is right up to {tmp_path}"):
        load_records(str(tmp_path / "no" / "such" / "train.jsonl"))


@pytest.mark.parametrize("source", ["", "a b c", "owner/name/more/parts"])
def test_source_that_is_nothing_we_know(source: str) -> None:
    with pytest.raises(ValueError, match="data source"):
        load_records(source)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    for name in ("a.xlsx", "a.parquet.gz"):
        path = write(tmp_path / name, b"PAR1")
        with pytest.raises(ValueError, match=rf"{name}: cannot read this kind of file"):
            load_records(path)


def test_directory_picks_the_files_of_the_split(tmp_path: Path) -> None:
    for name in ("train-00.jsonl", "train-01.jsonl", "test.jsonl"):
        write(tmp_path / name, json.dumps({"a": name}).encode())
    write(tmp_path / "notes.txt", b"not data")
    folder = str(tmp_path)
    assert [row.values["a"] for row in load_records(folder)] == ["train-00.jsonl", "train-01.jsonl"]
    assert [row.values["a"] for row in load_records(folder, evaluation=True)] == ["test.jsonl"]
    with pytest.raises(ValueError, match="no split 'validation'; its file names give test, train"):
        load_records(folder, "validation")


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        # The word of a file's own name, whatever folder it is in.
        (["dev-tools/train.jsonl", "general/train.jsonl"], [0, 1], None),
        (["dev/train.jsonl", "test-00.jsonl"], [0], [1]),
        (["a/b/train/00.jsonl", "test/x/train/01.jsonl", "test/x/y.jsonl"], [0, 1], [2]),
        (["Train-Data/x.jsonl", "test_set/x.jsonl"], [0], [1]),
        # A folder is a split only by its whole name.
        (["dev-tools/x.jsonl", "latest/y.jsonl"], [0, 1], None),
        (["my_train.jsonl", "gsm8k.test.jsonl"], [0], [1]),
    ],
)
def test_split_of_a_file(
    tmp_path: Path, files: list[str], train: list[int], test: list[int] | None
) -> None:
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, json.dumps({"a": number}).encode())
    records = load_records(str(tmp_path))
    assert [row.values["a"] for row in records] == train and records.left_out == ()
    if test is None:
        with pytest.raises(ValueError, match="has no split 'eval'"):
            load_records(str(tmp_path), evaluation=True)
    else:
        rows = load_records(str(tmp_path), evaluation=True)
        assert [row.values["a"] for row in rows] == test


def test_files_that_are_in_no_split_are_named(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("data/train-00.jsonl", "data/extra.jsonl", "data/dev-tools/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, b'{"question": "q", "answer": "a"}')
    source = Source(load_records(str(tmp_path / "data")))
    left_out = [str(tmp_path / "data" / name) for name in ("dev-tools/x.jsonl", "extra.jsonl")]
    for _ in range(2):
        store = prepare_store(source, make_tokenizer(), BuildOptions(64), tmp_path / "cache")
        assert store.report.left_out == left_out
        assert f"not read: {', '.join(left_out)}, in whose name is no split" in (
            store.report.summary()
        )
    with pytest.raises(ValueError, match=r"give train, and dev-tools/x.jsonl, extra.jsonl have"):
        load_records(str(tmp_path / "data"), evaluation=True)


def test_directory_without_split_names_is_all_train(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json"):
        write(tmp_path / name, b'[{"a": 1}]')
    assert len(list(load_records(str(tmp_path)))) == 2
    with pytest.raises(ValueError, match="no split 'eval'"):
        load_records(str(tmp_path), evaluation=True)


def test_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, json.dumps({"a": name}).encode())
    rows = load_records(str(tmp_path / "*.jsonl"))
    assert [row.values["a"] for row in rows] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match="no file matches"):
        load_records(str(tmp_path / "*.json"))


def test_slices_split_a_file_without_overlap(write_rows: Callable[..., str]) -> None:
    path = write_rows([{"a": number} for number in range(10)])
    first = [row.values["a"] for row in load_records(path, "train[:80%]")]
    rest = [row.values["a"] for row in load_records(path, "train[80%:]")]
    assert first + rest == list(range(10))
    assert len(rest) == 2
    assert load_records(path, "train[:80%]").digest != load_records(path, "train[80%:]").digest
    with pytest.raises(ValueError, match="empty"):
        list(load_records(path, "train[20:]"))
    with pytest.raises(ValueError, match="slice"):
        list(load_records(path, "train[a:]"))
    with pytest.raises(ValueError, match="has the one split 'train', not 'test'"):
        load_records(path, "test")
    with pytest.raises(ValueError, match="cannot read the split 'train:10'"):
        load_records(path, "train:10")


def test_digest_is_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", GOOD.encode())
    same = write(tmp_path / "b.jsonl", GOOD.encode())
    other = write(tmp_path / "c.jsonl", GOOD.encode() + b"\n")
    assert load_records(first).digest == load_records(same).digest
    assert load_records(first).digest != load_records(other).digest


def test_demo_source_has_train_and_eval() -> None:
    assert load_records("demo").files == (
        "demo/train-alpaca.jsonl",
        "demo/train-messages.jsonl",
        "demo/train-chatml.jsonl",
    )
    assert load_records("demo", "train").digest == load_records("demo").digest
    assert load_records("demo", evaluation=True).files == ("demo/eval.jsonl",)
    assert len(list(load_records("demo", "eval[:10]"))) == 10
    with pytest.raises(ValueError, match="no split 'test'; it has train and eval"):
        load_records("demo", "test")


class FakeHub:
    """Stands in for the hub: remembers what was asked."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[Any] = []
        self.hash = "revision"
        self.config = SimpleNamespace(name="default")

    def load_dataset_builder(self, *arguments: Any, **options: Any) -> Any:
        self.asked.append((arguments, options))
        return self

    def download_and_prepare(self) -> None:
        self.asked.append("download")

    def as_dataset(self, split: str) -> Any:
        from datasets import Dataset

        self.asked.append(split)
        return Dataset.from_list(self.rows)

    def as_streaming_dataset(self, split: str) -> Any:
        return self.as_dataset(split).to_iterable_dataset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    datasets = pytest.importorskip("datasets")
    hub = FakeHub([{"question": "q"}, {"question": "r"}, {"question": "s"}])
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    return hub


def test_hub_is_asked_on_first_use_only(hub: FakeHub) -> None:
    rows = load_records("owner/name:main@v1", "train[:3]")
    assert hub.asked == []
    assert [row.values["question"] for row in rows] == ["q", "r", "s"]
    assert [row.origin for row in rows][1] == "owner/name:main@v1[train[:3]]:2"
    asked = (("owner/name", "main"), {"revision": "v1"})
    assert hub.asked == [asked, "download", "train[:3]"]


def test_hub_is_streamed_by_row_numbers(hub: FakeHub) -> None:
    rows = load_records("owner/name", "train[1:2]", streaming=True)
    assert [(row.values["question"], row.line) for row in rows] == [("r", 2)]
    assert "download" not in hub.asked
    assert len(list(load_records("owner/name", streaming=True))) == 3
    with pytest.raises(ValueError, match="there are no records"):
        list(load_records("owner/name", "train[9:]", streaming=True))
    with pytest.raises(ValueError, match=r"cannot stream the slice '\[:1%\]': only record numbers"):
        load_records("owner/name", "train[:1%]", streaming=True)


def test_hub_digest_is_of_revision_and_split(hub: FakeHub) -> None:
    def digest(split: str) -> str:
        return load_records("owner/name", split).digest

    first = digest("train")
    assert digest("test") != first == digest("train")
    hub.hash = "other revision"
    assert digest("train") != first


def test_hub_evaluation_split_is_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["train", "test", "validation"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: names)
    assert load_records("owner/name", evaluation=True).name == "owner/name[validation]"
    names[:] = ["train"]
    with pytest.raises(ValueError, match=r"data\.eval_split"):
        load_records("owner/name", evaluation=True)


def test_hub_error_names_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(ValueError, match="'owner/name' is no local file.*cannot reach the hub"):
        list(load_records("owner/name"))


ROWS = [{"question": f"q{number}, é\n2", "answer": "42" if number else "NA"} for number in range(3)]


def write_table(path: Path) -> str:
    """Writes ROWS in the kind that the name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    text = io.StringIO(newline="")
    if plain.endswith((".csv", ".tsv")):
        delimiter = "\t" if plain.endswith(".tsv") else ","
        table = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)
    elif plain.endswith(".jsonl"):
        text.writelines(json.dumps(row) + "\n" for row in ROWS)
    elif plain.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return str(path)
    else:
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        return str(path)
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=compression) as stream:
        stream.write(text.getvalue().encode())
    return str(path)


TABLES = ("csv", "tsv", "csv.gz", "csv.zst", "jsonl.gz", "jsonl.zst", "parquet", "arrow")


@pytest.mark.parametrize("suffix", TABLES)
def test_every_kind_of_file_gives_the_same_text(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"rows.{suffix}")
    rows = list(load_records(path))
    assert [row.values for row in rows] == ROWS
    # The questions hold a line break, so a row of a CSV file takes two lines.
    is_csv = suffix.startswith(("csv", "tsv"))
    assert [row.line for row in rows] == ([2, 4, 6] if is_csv else [1, 2, 3])
    assert load_records(path).digest == load_records(path).digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv: the file is empty"),
        (b"a,b\n", r"a\.csv: there are column names but no records"),
        (b"a;b\n1;2\n", r"a\.csv:1: the column names are separated by ';'; expected ','"),
        (b"a,a\n1,2\n", r"a\.csv:1: a column name occurs twice"),
        (b"a,b\n1,2\n3\n", r"a\.csv:3: the record has 1 fields; expected 2 \(a, b\)"),
        (b'a,b\n1,"2\n', r"a\.csv:2: not valid CSV: unexpected end of data"),
        (b"a,b\n1,2\n3,\xff\n", r"a\.csv:3:3: byte 0xff is not UTF-8"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(load_records(write(tmp_path / "a.csv", content)))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz"])
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = Path(write_table(tmp_path / name))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 40])
    with pytest.raises(ValueError, match=f"{name}: "):
        list(load_records(str(path)))


def test_directories_are_searched_and_what_belongs_to_datasets_is_no_data(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    assert [row.values for row in load_records(folder)] == ROWS
    assert [row.values for row in load_records(folder, evaluation=True)] == ROWS[:1]


def test_same_rows_in_two_kinds_of_file_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "train.parquet"):
        write_table(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"train\.csv and train\.parquet: the same records twice\?"
    ):
        load_records(str(tmp_path))


def test_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f'{GOOD}\n{{"a": [{{"b": 1, "b": 2}}]}}\n'.encode())
    with pytest.raises(ValueError, match=r"a\.jsonl:2:1: .*the key 'b' occurs twice"):
        list(load_records(path))


def test_held_out_rows_are_not_among_the_others_even_where_rows_are_equal(
    write_rows: Callable[..., str],
) -> None:
    path = write_rows([{"a": number % 300} for number in range(600)] + ["nonsense"])
    kept, held_out = load_records(path).hold_out(0.2)
    bad = [row for row in kept.scan() if isinstance(row, BadRecord)]
    assert [row.line for row in bad] == [601]
    kept_values = [row.values["a"] for row in kept.scan() if not isinstance(row, BadRecord)]
    held_values = [row.values["a"] for row in held_out]
    assert not set(kept_values) & set(held_values)
    assert len(kept_values) + len(held_values) == 600
    assert 80 < len(held_values) < 160
    assert len({kept.digest, held_out.digest, load_records(path).digest}) == 3


def test_a_share_that_holds_out_nothing_is_named(write_rows: Callable[..., str]) -> None:
    records = load_records(write_rows([{"a": number} for number in range(9)]))
    kept, held_out = records.hold_out(1e-6)
    assert len(list(kept)) == 9
    with pytest.raises(ValueError, match="data.eval_fraction holds out none of the 9 records"):
        list(held_out)
    with pytest.raises(ValueError, match="data.eval_fraction leaves none of the 9 records"):
        list(records.hold_out(1 - 1e-6)[0])


def test_rows_are_counted_without_being_parsed(tmp_path: Path) -> None:
    content = f"{GOOD}\n" * 9 + "{not JSON at all"
    lines = load_records(write(tmp_path / "a.jsonl", content.encode()))
    assert lines.count() == 10
    kept, held_out = lines.hold_out(0.2)
    assert (kept.count(), held_out.count()) == (8, 2)
    assert load_records(write_table(tmp_path / "t.parquet")).count() == 3
    assert load_records(write_table(tmp_path / "t.csv.gz")).count() == 6, "a row has two lines"
    # Not without reading it, or not at all.
    assert load_records(write(tmp_path / "a.json", f"[{GOOD}]".encode())).count() is None
    assert load_records(str(tmp_path / "a.jsonl"), "train[:50%]").count() is None


def test_rows_of_the_hub_are_counted(hub: FakeHub) -> None:
    assert load_records("owner/name").count() == 3
    assert load_records("owner/name", "train[:9]", streaming=True).count() is None
