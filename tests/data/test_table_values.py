"""Values of typed tables: what the data holds, and no more."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pytest

from sft_fast.data.convert import convert
from sft_fast.data.source import Source, load_records


def rows_of(path: Path, arrays: dict[str, Any]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
    return [record.values for record in load_records(str(path))]


def test_a_null_of_padding_goes_and_a_null_of_the_data_stays(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets.features import Json

    written = [
        {"calls": [{"city": "Ulm"}], "free": {"a": None, "b": [None]}, "note": None},
        {"calls": [{"day": "today"}, None], "free": {"c": {"d": None}}, "note": "x"},
    ]
    padded = [{**row, "calls": [c and {"z": None, **c} for c in row["calls"]]} for row in written]
    features = Features(
        {
            "calls": List({"z": Value("null"), "city": Value("string"), "day": Value("string")}),
            "free": Json(),
            "note": Value("string"),
        }
    )
    table = Dataset.from_list(padded, features=features)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert [record.values for record in load_records(str(path))] == padded


def test_types_that_json_does_not_have_become_texts_and_numbers(tmp_path: Path) -> None:
    import pyarrow

    time = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    (row,) = rows_of(
        tmp_path / "rows.parquet",
        {
            "time": pyarrow.array([time], pyarrow.timestamp("s", tz="UTC")),
            "naive": pyarrow.array([time.replace(tzinfo=None)], pyarrow.timestamp("ms")),
            "date": pyarrow.array([time.date()], pyarrow.date32()),
            "price": pyarrow.array([decimal.Decimal("1.50")], pyarrow.decimal128(5, 2)),
            "inside": [[{"at": time.date(), "n": 2**62}]],
            "short": pyarrow.array([0.1], pyarrow.float32()),
            "shorts": pyarrow.array([[0.1, None]], pyarrow.list_(pyarrow.float32())),
            "kind": pyarrow.array(["a"]).dictionary_encode(),
            "void": pyarrow.array([None], pyarrow.timestamp("s")),
        },
    )
    assert row == {
        "time": "2024-01-02T03:04:05+00:00",
        "naive": "2024-01-02T03:04:05",
        "date": "2024-01-02",
        "price": "1.50",
        "inside": [{"at": "2024-01-02", "n": 2**62}],
        "short": 0.1,
        "shorts": [0.1, None],
        "kind": "a",
        "void": None,
    }
    assert json.loads(json.dumps(row)) == row


def test_turns_of_categories_and_of_columns_are_read(tmp_path: Path) -> None:
    import pyarrow

    roles = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1], pyarrow.int8()), pyarrow.array(["user", "assistant"])
    )
    turns = pyarrow.StructArray.from_arrays([roles, pyarrow.array(["q", "a"])], ["role", "content"])
    messages = pyarrow.LargeListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int64()), turns)
    (row,) = rows_of(tmp_path / "rows.parquet", {"messages": messages})
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert row["messages"] == chat
    by_column = {"role": ["user", "assistant"], "content": ["q", "a"]}
    (row,) = rows_of(tmp_path / "columns.parquet", {"messages": [by_column]})
    output = tmp_path / "out.jsonl"
    convert(Source(load_records(str(tmp_path / "columns.parquet"))), output)
    assert json.loads(output.read_text()) == {"messages": chat}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"limit": float("nan")}, "'limit' in 'arguments' of the call of 'f' in turn 2 is nan"),
        ({"raw": b"\x00"}, "rows.parquet:1: bytes has no form in JSON"),
    ],
)
def test_what_has_no_form_in_json_is_named_with_its_line(
    tmp_path: Path, value: dict[str, Any], message: str
) -> None:
    call = [{"function": {"name": "f", "arguments": value}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": call}]
    rows_of(tmp_path / "rows.parquet", {"messages": [turns]})
    with pytest.raises(ValueError, match=message):
        convert(Source(load_records(str(tmp_path / "rows.parquet"))), tmp_path / "out.jsonl")


def test_a_type_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    import pyarrow

    mapping = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    with pytest.raises(ValueError, match=r"rows.parquet: .*map<.*write that column as JSON text"):
        rows_of(tmp_path / "rows.parquet", {"x": mapping})
