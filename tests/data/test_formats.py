from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.format_registry import formats
from sft_fast.data.formats import (
    ConversationReader,
    detect_format,
    format_names,
    get_format,
    read_conversations,
    register_format,
)
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.source import load_records

USER_HI = {"role": "user", "content": "hi"}
CHATML_TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho\nho<|im_end|>\n"


def turns(name: str, row: dict[str, Any], **fields: str) -> list[tuple[str, str]]:
    conversation = get_format(name).read(row, fields)
    return [(message.role, message.content) for message in conversation.messages]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Formats that a test registers are gone afterwards."""
    monkeypatch.setattr(formats, "entries", dict(formats.entries))
    yield


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "alpaca",
            {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"},
            [("system", "be brief"), ("user", "add\n1 2"), ("assistant", "3")],
        ),
        (
            "alpaca",
            {"prompt": "add", "context": "", "response": "3", "system": None, "id": 7},
            [("user", "add"), ("assistant", "3")],
        ),
        (
            "question_answer",
            {"question": "why", "answer": "so"},
            [("user", "why"), ("assistant", "so")],
        ),
        (
            "prompt_completion",
            {"prompt": "why", "completion": "so"},
            [("user", "why"), ("assistant", "so")],
        ),
        (
            "messages",
            {"messages": [USER_HI, {"role": "assistant", "content": "ho"}, USER_HI]},
            [("user", "hi"), ("assistant", "ho"), ("user", "hi")],
        ),
        (
            "messages",
            {
                "conversations": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
                    {"role": "assistant", "content": "ho"},
                ]
            },
            [("user", "aa"), ("assistant", "ho")],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "ho"},
                    {"from": "observation", "value": ""},
                    {"from": "gpt", "value": "ha"},
                ],
                "system": "s",
            },
            [
                ("system", "s"),
                ("user", "hi"),
                ("assistant", "ho"),
                ("tool", ""),
                ("assistant", "ha"),
            ],
        ),
        (
            "messages",
            {"messages": [{"role": r, "content": c} for r, c in (("Human", "hi"), ("GPT", "ho"))]},
            [("user", "hi"), ("assistant", "ho")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": r, "value": "x"} for r in ("user", "function", "Model")]},
            [("user", "x"), ("tool", "x"), ("assistant", "x")],
        ),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            list(zip(["system", *["user", "assistant"] * 2], "sabcd", strict=True)),
        ),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": '[["a", "b"]]'},
            list(zip(["user", "assistant"] * 2, "abcd", strict=True)),
        ),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": None},
            [("user", "c"), ("assistant", "d")],
        ),
        ("chatml", {"text": CHATML_TEXT}, [("user", "hi"), ("assistant", "ho\nho")]),
    ],
)
def test_format_reads_a_row_and_is_detected(
    name: str, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert turns(name, row) == expected
    assert detect_format(list(row), row) == name


def test_fields_map_our_names_to_columns() -> None:
    row = {"frage": "why", "antwort": "so", "output": "something else"}
    fields = {"instruction": "frage", "response": "antwort"}
    assert turns("alpaca", row, **fields) == [("user", "why"), ("assistant", "so")]
    assert detect_format(list(row), row, fields) == "alpaca"


def test_weight_zero_and_prompt_turns_are_not_trained() -> None:
    answer = {"role": "assistant", "content": "ho"}
    row = {"messages": [USER_HI, {**answer, "weight": 0}, USER_HI, {**answer, "weight": 1}]}
    trained = [message.supervised for message in get_format("openai").read(row).messages]
    assert trained == [False, False, False, True]
    gpt = {"from": "gpt", "value": "ho"}
    row = {"conversations": [{**gpt, "weight": 0}, {**gpt, "train": False}, {**gpt, "weight": 2}]}
    messages = get_format("sharegpt").read(row).messages
    assert [(turn.supervised, turn.weight) for turn in messages] == [
        (False, 0),
        (False, 1),
        (True, 2),
    ]
    row = {"prompt": [USER_HI, answer, USER_HI], "completion": [answer], "tools": [{"name": "f"}]}
    (tool,) = get_format("prompt_completion").read(row).tools
    assert tool == {"type": "function", "function": {"name": "f"}}
    conversation = get_format("prompt_completion").read(row)
    assert [message.supervised for message in conversation.messages] == [False, False, False, True]


def test_tool_calls_keep_name_and_arguments_in_both_formats() -> None:
    arguments = {"city": "Bonn"}
    openai = {
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "messages": [
            USER_HI,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
                ],
            },
            {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "c1"},
        ],
    }
    conversation = get_format("openai").read(openai)
    call = conversation.messages[1].tool_calls[0]
    assert call["function"] == {"name": "weather", "arguments": arguments}
    assert call["id"] == "c1"
    assert conversation.tools[0]["function"]["name"] == "weather"
    assert conversation.messages[2].as_dict() == {
        "role": "tool",
        "content": "rain",
        "name": "weather",
        "tool_call_id": "c1",
    }
    sharegpt = {
        "tools": '[{"name": "weather"}]',
        "conversations": [
            {"from": "human", "value": "hi"},
            {
                "from": "function_call",
                "value": '{"name": "weather", "arguments": {"city": "Bonn"}}',
            },
        ],
    }
    conversation = get_format("sharegpt").read(sharegpt)
    call = conversation.messages[1].tool_calls[0]
    assert call["function"] == {"name": "weather", "arguments": arguments}
    assert conversation.tools == ({"type": "function", "function": {"name": "weather"}},)


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_older_form_of_a_call_and_calls_without_arguments(arguments: Any) -> None:
    call = {"name": "now", "arguments": arguments}
    row = {"messages": [USER_HI, {"role": "assistant", "content": None, "function_call": call}]}
    row["messages"].append({"role": "function", "name": "now", "content": "noon"})
    row["messages"].append({"role": "assistant", "content": "noon", "function_call": None})
    _, calls, result, answer = get_format("messages").read(row).messages
    assert calls.tool_calls == ({"type": "function", "function": {"name": "now", "arguments": {}}},)
    assert (result.role, result.name, answer.tool_calls) == ("tool", "now", ())


MESSAGES_OK = [USER_HI, {"role": "assistant", "content": "ho"}]
CALL = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "input": "b"},
            r"no column for 'response': looked for response, output, answer; the record has "
            r"instruction, input\. Name it with data\.fields: \{response: <column>\}",
        ),
        ("alpaca", {"instruction": "a", "output": ""}, r"'response' \(column 'output'\) is empty"),
        (
            "alpaca",
            {"instruction": "a", "output": " \n"},
            "'response'.* is empty; .*remove the record",
        ),
        ("alpaca", {"instruction": "a", "output": 42}, r"is a number \(42\); expected text"),
        ("alpaca", {"instruction": "a", "output": True}, r"is a boolean \(True\); expected text"),
        ("alpaca", {"instruction": "a", "output": None}, "is null; expected text"),
        ("alpaca", {"instruction": ["a"], "output": "b"}, "'instruction' is a list; expected text"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "answer": "c"},
            "'output' and 'answer' could both be 'response'; choose with data.fields",
        ),
        ("alpaca", {"instruction": "a", "output": "cut \ud83d"}, "surrogate pair at character 5"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["a"]]},
            r"exchange 1 of 'history' is a list; expected a list of exchanges, \[instruction",
        ),
        ("alpaca", {"instruction": "a", "output": "b", "history": {"a": "b"}}, "exchange 1 of 'hi"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a", 2]]}, "is a number"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a", " "]]}, "turn 2 .*empty"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "x", "weight": "1"}]},
            "'weight' of turn 1 is '1'; expected 0, or a number",
        ),
        ("question_answer", {"question": "a"}, "no column for 'answer'"),
        ("prompt_completion", {"prompt": "a", "completion": []}, "no assistant turn"),
        ("messages", {"text": "a"}, "no column for 'messages'"),
        ("messages", {"messages": "hi"}, "'messages' is text; expected a list of turns"),
        ("messages", {"messages": []}, "'messages' has no turns"),
        ("messages", {"messages": [USER_HI]}, "no assistant turn"),
        ("messages", {"messages": [{"role": "system", "content": "s"}]}, "no assistant turn"),
        ("messages", {"messages": ["hi"]}, "turn 1 is text; expected an object"),
        ("messages", {"messages": [{"content": "hi"}]}, "turn 1 has no 'role'; it has content"),
        ("messages", {"messages": [*MESSAGES_OK, {"role": "Robot", "content": ""}]}, "'Robot'"),
        ("messages", {"messages": [{"role": "user"}]}, r"turn 1 \(user\) has no content"),
        (
            "messages",
            {"messages": [USER_HI, {"role": "assistant", "content": ""}]},
            r"turn 2 \(assistant\) is empty",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": " "}, MESSAGES_OK[1]]},
            r"turn 1 \(user\) is empty",
        ),
        (
            "messages",
            {"messages": [USER_HI, {**MESSAGES_OK[1], "weight": 0}]},
            "every assistant turn has weight 0",
        ),
        (
            "messages",
            {"messages": [USER_HI, {**MESSAGES_OK[1], "weight": -0.5}]},
            "'weight' of turn 2 is -0.5; expected 0, or a number from 0.0001 to 100",
        ),
        (
            "messages",
            {"messages": [USER_HI, {**MESSAGES_OK[1], "train": "no"}]},
            "'train' of turn 2 is 'no'; expected true or false",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]},
            "turn 1 has a part of type 'image'; only text is trained",
        ),
        (
            "messages",
            {"messages": [USER_HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "turn 2 has no 'name'",
        ),
        (
            "messages",
            {"messages": MESSAGES_OK, "images": ["a.png"]},
            "the record has 'images'; only text is trained",
        ),
        (
            "sharegpt",
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}]},
            "the record has 'image'; only text is trained",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [CALL], "function_call": CALL}]},
            "turn 1 has tool_calls and function_call; keep one of the two",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"arguments": "[1]"}]}]},
            "'arguments' of the call of 'f' in turn 1 is a list; expected an object",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"arguments": "{a"}]}]},
            "'arguments' of the call of 'f' in turn 1 is not valid JSON",
        ),
        (
            "messages",
            {"messages": [{"role": "system", "content": "s"}, *MESSAGES_OK], "system": "t"},
            "'system' and a system turn: keep one",
        ),
        ("messages", {"messages": MESSAGES_OK, "tools": "{"}, "'tools' is not valid JSON"),
        ("messages", {"messages": MESSAGES_OK, "tools": [1]}, "a tool of 'tools' is a number"),
        ("sharegpt", {"conversations": MESSAGES_OK}, "turn 1 has no 'from'; it has role, content"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "role 'alien'"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "not json"}]},
            r"'value' of turn 1 \(function_call\) is not valid JSON",
        ),
        ("chatml", {"text": "hi"}, "not ChatML at character 1: .*found 'hi'"),
        ("chatml", {"text": CHATML_TEXT + "rest"}, f"character {len(CHATML_TEXT) + 1}: .*'rest'"),
        ("chatml", {"text": MESSAGES_OK}, "is a list of turns; set data.format: messages"),
    ],
)
def test_bad_row_says_what_is_wrong(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_format(name).read(row)


def test_mapped_column_must_exist_and_field_must_be_known() -> None:
    with pytest.raises(ValueError, match="no column 'antwort', which data.fields gives for 'resp"):
        turns("alpaca", {"instruction": "a", "output": "b"}, response="antwort")
    with pytest.raises(ValueError, match="no field 'reply'; its fields are instruction, input, re"):
        ConversationReader("alpaca", {"reply": "output"})


def test_unknown_format_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError) as caught:
        get_format("sharegtp")
    assert all(name in str(caught.value) for name in format_names())
    assert "Did you mean sharegpt?" in str(caught.value)


def test_detection_fails_with_the_columns() -> None:
    with pytest.raises(ValueError, match="cannot tell the format from the columns text, label"):
        detect_format(["text", "label"], {"text": "no markup", "label": "x"})


def test_columns_that_hold_no_media_are_no_obstacle() -> None:
    row = {"instruction": "draw", "output": "no", "image": "a.png", "images": [], "video": None}
    assert turns("alpaca", row) == [("user", "draw"), ("assistant", "no")]
    row = {"image": {"bytes": "x"}, "output": "no"}
    with pytest.raises(ValueError, match="is an object; expected text"):
        turns("alpaca", row, instruction="image")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"content": "hi"}]}, "'messages' has content; turns have role and content"),
        ({"messages": [None]}, "the first entry of 'messages' is null, not an object"),
        ({"data": [{"messages": []}]}, "if 'data' holds the records, write that list alone"),
        ({"chat": [{"role": "user"}], "id": 1}, "'chat' has role; turns have role and content"),
    ],
)
def test_detection_fails_with_what_it_saw(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format(list(row), row)


def test_reader_adds_file_and_line(write_rows: Callable[..., str]) -> None:
    good = {"question": "q", "answer": "a"}
    path = write_rows([good, good, {"question": "q", "answer": ["a"]}])
    with pytest.raises(ValueError) as caught:
        list(read_conversations(load_records(path)))
    assert str(caught.value) == (
        f"{path}:3: 'answer' is a list; expected text, written in double quotes \"...\" "
        "('answer' is a list in line 3 but text in line 1)"
    )


def test_auto_decides_once_per_file() -> None:
    reader = ConversationReader("auto")
    reader(SourceRecord({"question": "q", "answer": "a"}, "a.jsonl", 1))
    reader(SourceRecord({"text": CHATML_TEXT}, "b.jsonl", 1))
    found = {file: known.name for file, known in reader.files.items()}
    assert found == {"a.jsonl": "question_answer", "b.jsonl": "chatml"}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no column for 'question'"):
        reader(SourceRecord({"text": CHATML_TEXT}, "a.jsonl", 2))


def test_own_format_is_used_like_the_built_in_ones(registry: None) -> None:
    @register_format("pairs", detect=lambda row: "pair" in row)
    def pairs(record: Any) -> Conversation:
        question, answer = record["pair"]
        return Conversation((Message("user", question), Message("assistant", answer)))

    row = {"pair": ["q", "a"]}
    assert turns("pairs", row) == [("user", "q"), ("assistant", "a")]
    assert detect_format(["pair"], row) == "pairs"
    assert turns("pairs", {"p": ["q", "a"]}, pair="p") == [("user", "q"), ("assistant", "a")]
    with pytest.raises(ValueError, match="no assistant turn|is empty"):
        get_format("pairs").read({"pair": ["q", ""]})
    with pytest.raises(ValueError, match="'pairs' is taken"):
        register_format("pairs")(lambda record: Conversation(()))


def test_error_inside_an_own_format_keeps_its_type_and_gains_the_place(registry: None) -> None:
    @register_format("broken")
    def broken(record: Any) -> Conversation:
        raise KeyError("missing")

    with pytest.raises(KeyError) as caught:
        ConversationReader("broken")(SourceRecord({}, "a.jsonl", 7))
    assert caught.value.__notes__ == ["while reading a.jsonl:7 as 'broken'"]
