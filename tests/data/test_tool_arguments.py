"""Arguments of tool calls: an object, as text or not, with what was written and at every row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from masks import marked
from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.render import ChatRenderer, MaskOptions
from sft_fast.data.source import load_records

MakeTokenizer = Callable[..., Any]


def template(arguments: str) -> str:
    """A template that writes the arguments of a call as `arguments` says."""
    return (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
        "{%- for call in m.tool_calls or [] %}{%- set call = call.function %}"
        "{{- '<call>' + call.name }}" + arguments + "{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
    )


JSON_ARGUMENTS = '{"city": "Ulm", "days": [1, null], "exact": true}'
STYLES = {
    # Qwen 2.5: text is quoted once more.
    "as JSON": (template("{{- ' ' + call.arguments | tojson }}"), " " + JSON_ARGUMENTS),
    # Qwen 3: text is printed as it is, in its own spelling.
    "as JSON, text as it is": (
        template(
            "{%- if call.arguments is string %}{{- ' ' + call.arguments }}"
            "{%- else %}{{- ' ' + call.arguments | tojson }}{%- endif %}"
        ),
        " " + JSON_ARGUMENTS,
    ),
    # Qwen 3.5 and 3.6: text has no items.
    "one by one": (
        template(
            "{%- for name, value in call.arguments | items %}"
            "{{- '<' + name + '>' + (value if value is string else value | tojson) }}{%- endfor %}"
        ),
        "<city>Ulm<days>[1, null]<exact>true",
    ),
}
SPELLINGS = {
    "object": json.loads(JSON_ARGUMENTS),
    "text": JSON_ARGUMENTS,
    "compact text": JSON_ARGUMENTS.replace(" ", ""),
    "text with lines": json.dumps(json.loads(JSON_ARGUMENTS), indent=2),
}


def calling(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "q"}, answer]}


def trained_text(tokenizer: Any, values: dict[str, Any]) -> str:
    renderer = ChatRenderer(tokenizer, MaskOptions())
    conversation = ConversationReader("auto")(SourceRecord(values, "rows.jsonl", 1))
    (sample,) = renderer.tokenize(renderer.render_samples(conversation))
    return marked(tokenizer, sample).split("[[")[1].split("]]")[0]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("style", STYLES)
def test_a_template_gets_arguments_as_it_wants_them(
    make_tokenizer: MakeTokenizer, style: str, spelling: str
) -> None:
    chat_template, expected = STYLES[style]
    text = trained_text(make_tokenizer(chat_template), calling(SPELLINGS[spelling]))
    assert text == f"<call>rain{expected}<|im_end|>"


@pytest.mark.parametrize("save", ["parquet", "disk"])
def test_a_null_that_a_table_invented_is_not_trained(
    make_tokenizer: MakeTokenizer, tmp_path: Path, save: str
) -> None:
    """Dataset.from_list gives every call the arguments of all calls; templates print the nulls."""
    from datasets import Dataset

    written = [{"city": "Ulm"}, {"n": 3}, {"deep": {"a": 1}}, {"deep": {"b": [2]}}]
    features = table_of(written).features
    table = Dataset.from_list([calling(arguments) for arguments in written], features=features)
    (call,) = table[0]["messages"][1]["tool_calls"]
    assert call["function"]["arguments"]["n"] is None
    path = tmp_path / ("rows.parquet" if save == "parquet" else "saved")
    table.to_parquet(str(path)) if save == "parquet" else table.save_to_disk(str(path))
    tokenizer = make_tokenizer(STYLES["as JSON"][0])
    texts = [trained_text(tokenizer, record.values) for record in load_records(str(path))]
    assert texts == [f"<call>rain {json.dumps(arguments)}<|im_end|>" for arguments in written]


def table_of(written: list[dict[str, Any]]) -> Any:
    """The same rows with one struct for all arguments, as Arrow infers them."""
    import pyarrow
    from datasets import Dataset

    rows = [calling(arguments) for arguments in written]
    return Dataset(pyarrow.Table.from_pylist(rows))


FIRST_ROWS = 12_000
PAD = "x" * 1500


@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_value_of_another_type_far_down_a_file_is_what_was_written(
    tmp_path: Path, form: str
) -> None:
    """`datasets` takes the types of a column from the first 10 MB of a file."""
    row = json.dumps({"value": "a", "pad": PAD})
    late: list[dict[str, Any]] = [
        {"value": ["a", 1], "pad": ""},
        {"value": {"key": [None]}, "pad": "", "new": "b"},
        {"value": 2**60 + 1},
        {"value": "2024-01-02"},
        {"value": "007"},
    ]
    lines = [row] * FIRST_ROWS + [json.dumps(values) for values in late]
    path = tmp_path / "rows.json"
    text = "\n".join(lines) if form == "lines" else "[" + ",\n".join(lines) + "]"
    path.write_text(text)
    assert path.stat().st_size > 18_000_000
    records = list(load_records(str(path)))
    assert len(records) == FIRST_ROWS + len(late)
    assert records[FIRST_ROWS].line == FIRST_ROWS + 1
    assert [record.values for record in records[FIRST_ROWS:]] == late
