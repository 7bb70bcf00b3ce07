"""Data files as providers, trainers and public data sets have them: read right, or refused.

The made-up rows stand for kinds of files; the folder of shapes beside the checkout, where it is
there, holds more of each kind, with what must be trained.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from masks import marked
from sft_fast.config import Config
from sft_fast.data.convert import messages_record
from sft_fast.data.demo import demo_tokenizer
from sft_fast.data.formats import ConversationReader, get_format
from sft_fast.data.formats.turns import TurnKeys, read_turns
from sft_fast.data.from_config import build_options, find_sources, open_data_store
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.render import ChatRenderer
from sft_fast.data.source import load_records
from template_families import CHANNELS, GPT_OSS

SHAPES = Path(__file__).resolve().parents[2] / ".." / "shared" / "shapes"
EXPECTED = SHAPES / "expected.json"
# Writes every part of a chat, so that nothing is lost by the template.
TEMPLATE = """\
{%- if custom_instructions %}
{{- '<|im_start|>note\\n' + custom_instructions + '<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
{{- '<|im_start|>tools\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>' }}
{%- endif %}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<call>' + call.function | tojson + '</call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Ulm"}}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": SCHEMA}}


def read(row: dict[str, Any], fields: dict[str, str | None] | None = None) -> Any:
    """The conversation of a row that is alone in its file."""
    return ConversationReader("auto", fields)(SourceRecord(row, "rows.jsonl", 1))


def turns(row: dict[str, Any], **fields: str | None) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in read(row, fields).messages]


QA = [("user", "q"), ("assistant", "a")]
SQA = [("system", "s"), *QA]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "gemini",
            {
                "systemInstruction": {"parts": [{"text": "s"}]},
                "contents": [
                    {"role": "user", "parts": [{"text": "q"}]},
                    {"role": "model", "parts": [{"text": "a"}]},
                ],
            },
            SQA,
        ),
        (
            "messages",  # Bedrock
            {
                "schemaVersion": "bedrock-conversation-2024",
                "system": [{"text": "s"}],
                "messages": [
                    {"role": "user", "content": [{"text": "q"}]},
                    {"role": "assistant", "content": [{"text": "a"}]},
                ],
            },
            SQA,
        ),
        (
            "messages",  # Cohere
            {"messages": [{"role": "User", "content": "q"}, {"role": "Chatbot", "content": "a"}]},
            QA,
        ),
        (
            "messages",  # LLaMA-Factory
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "value": "q"}],
                        "loss_weight": 0.0,
                    },
                    {"role": "assistant", "content": [{"type": "text", "value": "a"}]},
                ]
            },
            QA,
        ),
        ("messages", {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, QA),
        (
            "messages",
            {"messages": "[{'role': 'user', 'content': 'q'}, {'role': 'gpt', 'content': 'a'}]"},
            QA,
        ),
        (
            "messages",
            {"conversations": [{"role": "human", "value": "q"}, {"role": "bot", "value": "a"}]},
            QA,
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": None, "refusal": "a"},
                ]
            },
            QA,
        ),
        (
            "sharegpt",
            {
                "mask": "User",
                "conversations": [{"from": "User", "value": "q"}, {"from": "Bing", "value": "a"}],
            },
            QA,
        ),
        ("exchanges", {"conversation": [{"system": "s", "input": "q", "output": "a"}]}, SQA),
        ("exchanges", {"system": "s", "conversation": [{"human": "q", "assistant": "a"}]}, SQA),
        ("alternating", {"conversations": ["q", "a"], "source": "made"}, QA),
        ("alpaca", {"query": "q", "response": "a", "system": "s", "history": []}, SQA),
        ("alpaca", {"Instruction": "q", "Output": "a"}, QA),
        ("alpaca", {"system_prompt": "s", "question": "q", "response": "a"}, SQA),
        (
            "question_answer",
            {"question": "q1", "context": "c", "answer": "a"},
            [("user", "q1\nc"), ("assistant", "a")],
        ),
        ("input_output", {"input": "q", "output": "a"}, QA),
        ("input_output", {"inputs": "q", "targets": "a", "language": "nl"}, QA),
        ("input_output", {"problem": "q", "solution": "a"}, QA),
        (
            "squad",
            {
                "id": "1",
                "title": "t",
                "context": "c",
                "question": "q",
                "answers": {"text": ["a", "b"], "answer_start": [0, 1]},
            },
            [("user", "c\n\nq"), ("assistant", "a")],
        ),
        (
            "message_tree",
            {
                "prompt": {
                    "role": "prompter",
                    "text": "q",
                    "replies": [
                        {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
                        {"role": "assistant", "text": "a", "rank": 0, "replies": []},
                        {"role": "assistant", "text": "unrated", "rank": None, "replies": []},
                    ],
                }
            },
            QA,
        ),
    ],
)
def test_a_shape_is_recognised_and_read(
    name: str, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert turns(row) == expected
    reader = ConversationReader("auto")
    reader(SourceRecord(row, "rows.jsonl", 1))
    assert reader.files["rows.jsonl"].name == name


@pytest.mark.parametrize(
    "row",
    [
        {  # Anthropic
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "x"},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "t1", "name": "rain", "input": {"city": "Ulm"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t1",
                            "content": [{"type": "text", "text": "2"}],
                        }
                    ],
                },
                {"role": "assistant", "content": "2 mm"},
            ],
            "tools": [{"name": "rain", "input_schema": SCHEMA}],
        },
        {  # Bedrock
            "messages": [
                {"role": "user", "content": [{"text": "q"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"reasoningContent": {"reasoningText": {"text": "hm"}}},
                        {"text": "I look."},
                        {"toolUse": {"toolUseId": "t1", "name": "rain", "input": {"city": "Ulm"}}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"toolResult": {"toolUseId": "t1", "content": [{"text": "2"}]}}],
                },
                {"role": "assistant", "content": [{"text": "2 mm"}]},
            ],
            "tools": {"tools": [{"toolSpec": {"name": "rain", "inputSchema": {"json": SCHEMA}}}]},
        },
        {  # Gemini
            "contents": [
                {"role": "user", "parts": [{"text": "q"}]},
                {
                    "role": "model",
                    "parts": [
                        {"text": "hm", "thought": True},
                        {"text": "I look."},
                        {"functionCall": {"name": "rain", "args": {"city": "Ulm"}}},
                    ],
                },
                {
                    "role": "user",
                    "parts": [{"functionResponse": {"name": "rain", "response": "2"}}],
                },
                {"role": "model", "parts": [{"text": "2 mm"}]},
            ],
            "tools": [{"functionDeclarations": [{"name": "rain", "parameters": SCHEMA}]}],
        },
        {  # OpenAI, its older form, everything in text
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": "I look.",
                    "reasoning_content": "hm",
                    "function_call": {"name": "rain", "arguments": '{"city": "Ulm"}'},
                },
                {"role": "function", "name": "rain", "content": "2"},
                {"role": "assistant", "content": "2 mm"},
            ],
            "functions": json.dumps([{"name": "rain", "parameters": json.dumps(SCHEMA)}]),
        },
    ],
)
def test_calls_results_and_reasoning_of_every_provider(row: dict[str, Any]) -> None:
    conversation = read(row)
    assert [turn.role for turn in conversation.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    _, answer, result, last = conversation.messages
    assert (answer.content, answer.reasoning, result.content, last.content) == (
        "I look.",
        "hm",
        "2",
        "2 mm",
    )
    (call,) = answer.tool_calls
    assert {key: value for key, value in call.items() if key != "id"} == CALL
    assert conversation.tools == (TOOL,)


@pytest.mark.parametrize("text, at", [([], 1), ([{"type": "text", "text": "and?"}], 2)])
def test_keys_beside_results_reach_the_template(text: list[dict[str, str]], at: int) -> None:
    results = [{"type": "tool_result", "tool_use_id": "t1", "content": "2"}]
    asked = {"role": "user", "content": "q"}
    called = {"role": "assistant", "tool_calls": [{"id": "t1", **CALL}]}
    turn = {"role": "user", "name": "me", "channel": "web", "content": results + text}
    row = {"messages": [asked, called, turn, {"role": "assistant", "content": "2 mm"}]}
    messages = [message.as_dict() for message in read(row).messages]
    assert messages[2]["tool_call_id"] == "t1"
    assert (messages[1 + at]["name"], messages[1 + at]["channel"]) == ("me", "web")


@pytest.mark.parametrize("is_error", [True, False])
def test_a_template_is_told_that_a_call_failed(is_error: bool) -> None:
    status = "error" if is_error else "success"
    parts = {
        "is_error": {
            "type": "tool_result",
            "tool_use_id": "t1",
            "content": "?",
            "is_error": is_error,
        },
        "status": {"toolResult": {"toolUseId": "t1", "content": [{"text": "?"}], "status": status}},
    }
    asked = {"role": "user", "content": "q"}
    called = {"role": "assistant", "tool_calls": [{"id": "t1", **CALL}]}
    for key, part in parts.items():
        turn = {"role": "user", "content": [part]}
        row = {"messages": [asked, called, turn, {"role": "assistant", "content": "2 mm"}]}
        result = read(row).messages[2].as_dict()
        expected = {"is_error": {"is_error": True}, "status": {"status": "error"}}[key]
        assert {name: result[name] for name in expected if name in result} == (
            expected if is_error else {}
        )


def test_neighbouring_turns_of_one_call_each_are_one_turn() -> None:
    call = json.dumps({"name": "rain", "arguments": {"city": "Ulm"}})
    rows = [
        ("user", "q"),
        ("tool_call", call),
        ("tool_call", call),
        ("tool_response", "2"),
        ("assistant", "a"),
    ]
    conversation = read({"messages": [{"role": role, "content": text} for role, text in rows]})
    assert [turn.role for turn in conversation.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[1].tool_calls == (CALL, CALL)


@pytest.mark.parametrize("role", ["user", "Human", " assistant ", "GPT", "tool_call", "nobody", ""])
@pytest.mark.parametrize("text", ["q", "", " a\n", '{"name": "f"}', "é", "\ud800", None, 3])
def test_a_plain_turn_is_read_as_one_with_more_keys(role: str, text: Any) -> None:
    def messages(**more: Any) -> Any:
        try:
            return read_turns([{"role": role, "content": text, **more}], TurnKeys())
        except ValueError as error:
            return str(error)

    assert messages() == messages(name=None)


def test_calls_that_answer_a_query() -> None:
    answers = json.dumps([{"name": "rain", "arguments": {"city": "Ulm"}}])
    row = {
        "id": 1,
        "query": "q",
        "answers": answers,
        "tools": json.dumps([{"name": "rain", "parameters": SCHEMA}]),
    }
    conversation = read(row)
    assert conversation.messages[1].tool_calls == (CALL,) and conversation.tools == (TOOL,)


def test_glaive_text_with_functions_and_a_call() -> None:
    row = {
        "system": "SYSTEM: You have access to the following functions. "
        '{"name": "rain", "parameters": {}}',
        "chat": "USER: q\n\nASSISTANT: <functioncall> "
        '{"name": "rain", "arguments": \'{"city": "Ulm"}\'}'
        " <|endoftext|>\n\nFUNCTION RESPONSE: 2\n\nASSISTANT: 2 mm <|endoftext|>",
    }
    conversation = read(row)
    assert [turn.role for turn in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2].tool_calls == (CALL,)
    assert conversation.messages[-1].content == "2 mm"
    assert [tool["function"]["name"] for tool in conversation.tools] == ["rain"]


@pytest.mark.parametrize(
    ("turn", "trains", "weight"),
    [
        ({"loss": False}, False, 1),
        ({"train": False}, False, 1),
        ({"weight": 0}, False, 0),
        ({"loss_scale": 0.5}, True, 0.5),
        ({"loss": 2.0}, True, 2),
        ({"loss_weight": 0.0}, False, 0),
        ({"training": False}, False, 1),
        ({"trainable": True, "loss_mask": True}, True, 1),
        ({"train_on_turn": False}, False, 1),
        ({"loss_mask": 0}, False, 0),
        ({"loss": True, "weight": None}, True, 1),
    ],
)
def test_what_a_turn_says_of_its_loss(turn: dict[str, Any], trains: bool, weight: float) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **turn}]
    chat += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    answer = read({"messages": chat}).messages[1]
    assert answer.supervised == trains
    assert not trains or answer.weight == weight
    assert not set(turn) & set(answer.extra)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_row_options_reach_weight_and_template() -> None:
    row = {
        "messages": CHAT,
        "weight": 2.0,
        "chat_template_kwargs": {"enable_thinking": False, "x": None},
    }
    conversation = read(row)
    assert conversation.messages[1].weight == 2
    assert conversation.template_options == {"enable_thinking": False}
    with pytest.raises(ValueError, match="nothing to learn"):
        read({"messages": CHAT, "weight": 0.0})
    assert read({"messages": CHAT, "weight": "heavy"}, {"weight": None}).messages[1].weight == 1


GLAIVE = {"chat": "USER: q ASSISTANT: a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a", "options": {"A": "x"}}, "column 'options' is not read"),
        ({"prompt": "q", "completion": "a", "label": False}, "column 'label' is not read"),
        ({"question": "q", "answer": "a", "response": "b"}, "column 'response' is not read"),
        ({"messages": CHAT, "rejected_response": "b"}, "column 'rejected_response' is not read"),
        ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, r"turn 1 \(user\) has 'train': True"),
        ({"messages": [CHAT[0], {**CHAT[1], "train_detail": [1]}]}, "turn 2 has 'train_detail'"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": -1}]}, "'weight' of turn 2 is -1"),
        ({"messages": [CHAT[0], {**CHAT[1], "trainable": 0.5}]}, "is 0.5; expected true or false"),
        ({"messages": [CHAT[0], {**CHAT[1], "mask": 0}]}, "'mask': 0, which may mean"),
        ({"messages": [CHAT[0], {**CHAT[1], "masked": True}]}, "write 'train': true or false"),
        ({"messages": [{**CHAT[0], "trainable": True}, CHAT[1]]}, "only the assistant's turns"),
        ({"messages": CHAT, "loss_mask": [0, 1]}, "column 'loss_mask' is not read"),
        ({"text": "t", "summary": "s"}, "column 'summary' is not read"),
        ({"text": "t", "target": "s"}, "column 'target' is not read"),
        ({"question": "q", "thinking": "hm", "answer": "a"}, "column 'thinking' is not read"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"name": "f", "argument": {}}]}]},
            "has the key 'argument'",
        ),
        (
            {
                "messages": [
                    CHAT[0],
                    {**CHAT[1], "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]},
                ]
            },
            "NaN is no JSON",
        ),
        (
            {
                "messages": [
                    CHAT[0],
                    {**CHAT[1], "tool_calls": [{"name": "f", "arguments": '{"a": 1e999}'}]},
                ]
            },
            "1e999 is too large",
        ),
        (
            {
                "messages": [
                    CHAT[0],
                    {**CHAT[1], "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]},
                ]
            },
            "'a' occurs twice",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q", "train": True}]},
                    CHAT[1],
                ]
            },
            "the key 'train', which is not read",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]},
            "a part of type .image.",
        ),
        ({"messages": CHAT, "chat_template_kwargs": {"messages": []}}, "sets 'messages'"),
        (
            {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"},
            "cannot tell the format",
        ),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "label 1 is 3, but the token there is 2"),
        ({"input_ids": [1, 2], "labels": [-100]}, "input_ids has 2 entries, labels 1"),
        ({"segments": [{"text": "a", "label": 1}]}, "'label' of segment 1 is 1"),
        ({"segments": [{"text": "a", "label": False}]}, "no segment is trained"),
        ({"messages": "[{'role': 'user'} {'role': 'assistant'}]"}, "Python's or numpy's notation"),
        ({"messages": "[{'role': 'user', 'role': 'user'}]"}, "'role' occurs twice in one object"),
        ({"messages": "[{'role': 'user', 'n': 1e999}]"}, "is inf, which JSON does not have"),
        ({"messages": "[{'role': 'user', 'content': b'q'}]"}, "Python's or numpy's notation"),
        ({"messages": "[{'role': 'user', 1: 2}]"}, "Python's or numpy's notation"),
        (
            {"system": 'access to the following functions. {"name": "f", "name": "g"}', **GLAIVE},
            "a function in 'system' is not usable JSON: the key 'name' occurs twice",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            r"for preference training; .* data.fields: \{completion: chosen, rejected: null\}",
        ),
        ({"parent_id": None, "text": "q", "role": "user"}, "each path .* as one record of mess"),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_renderer().render(read(row))


def test_a_column_that_repeats_a_turn_or_is_left_out_is_no_loss() -> None:
    assert turns({"prompt": "q", "messages": CHAT}) == QA
    assert turns({"question": "q", "answer": "a", "options": ["x"]}, options=None) == QA


def test_keys_and_roles_of_turns_can_be_named() -> None:
    row = {"dialogue": [{"speaker": "customer", "text": "q"}, {"speaker": "agent", "text": "a"}]}
    fields = {
        "messages": "dialogue",
        "role": "speaker",
        "content": "text",
        "user": "Customer",
        "assistant": "agent",
    }
    conversation = get_format("messages").read(row, fields)
    assert [(turn.role, turn.content) for turn in conversation.messages] == QA


def test_a_row_of_another_kind_names_the_line_that_decided() -> None:
    reader = ConversationReader("auto")
    reader(SourceRecord({"instruction": "q", "output": "a"}, "rows.jsonl", 1))
    own = r"my_format.py.*line 1 decided that the file is alpaca; this record is messages: put each"
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{own}"):
        reader(SourceRecord({"messages": CHAT}, "rows.jsonl", 2))


def test_advice_for_pairs_of_answers_reads_the_chosen_ones() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    conversation = get_format("prompt_completion").read(
        row, {"completion": "chosen", "rejected": None}
    )
    assert [(turn.role, turn.content) for turn in conversation.messages] == QA


def chat_renderer() -> ChatRenderer:
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return ChatRenderer(tokenizer)


def test_segments_are_trained_as_they_are() -> None:
    renderer, tokenizer = chat_renderer(), demo_tokenizer()
    parts = [("<b>Hi\n", False), ("yo", True), (" and", True), (" bye", False)]
    row = {"segments": [{"text": text, "label": label} for text, label in parts]}
    (sample,) = renderer.tokenize([renderer.render(read(row))])
    assert marked(tokenizer, sample) == "<b>Hi\n[[yo and]] bye"


def test_tokens_are_taken_as_they_are_without_padding() -> None:
    renderer = chat_renderer()
    row = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    chat = renderer.render(read({"messages": CHAT}))
    tokens, other = renderer.tokenize([renderer.render(read(row)), chat])
    assert tokens.input_ids.tolist() == [5, 6, 7]
    assert tokens.supervised.tolist() == [False, True, True]
    assert len(other.input_ids) > 3
    with pytest.raises(ValueError, match="input_ids holds 99999"):
        renderer.render(read({"input_ids": [1, 99999], "labels": [-100, 99999]}))


def test_options_of_a_row_reach_its_template_alone() -> None:
    renderer, tokenizer = chat_renderer(), demo_tokenizer()
    options = {"custom_instructions": "Rhyme.", "enable_thinking": False}
    rows = [{"messages": CHAT, "chat_template_kwargs": options}, {"messages": CHAT}]
    first, second = (
        marked(tokenizer, s) for s in renderer.tokenize([renderer.render(read(r)) for r in rows])
    )
    assert "Rhyme." in first and "Rhyme." not in second
    assert second == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]"


def test_a_column_of_the_reasoning_effort_is_a_variable_of_the_template() -> None:
    row = {"messages": CHAT, "reasoning_effort": "high"}
    assert read(row).template_options == {"reasoning_effort": "high"}
    assert read({**row, "reasoning_effort": None}).template_options == {}
    assert read(row, {"reasoning_effort": None}).template_options == {}
    both = {**row, "chat_template_kwargs": {"reasoning_effort": "low", "x": 1}}
    with pytest.raises(ValueError, match="'reasoning_effort' and 'chat_template_kwargs' differ"):
        read(both)
    with pytest.raises(ValueError, match="'reasoning_effort' is a number"):
        read({**row, "reasoning_effort": 3})
    unread = chat_renderer().unread_keys(read(row))
    assert unread == ("reasoning_effort of the template",)
    options = {"enable_thinking": False, "enable_thinkin": True}
    unread = chat_renderer().unread_keys(read({"messages": CHAT, "chat_template_kwargs": options}))
    assert unread == ("enable_thinkin of the template",)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
        {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ],
)
def test_converted_records_are_the_same(row: dict[str, Any]) -> None:
    assert messages_record(read(row)) == row
    assert read(messages_record(read(row))) == read(row)


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": "a", "id": 7}, {"question": "q", "answer": "b", "by": "x"}]
    path.write_text("".join(json.dumps({**row, "at": 1}) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": "none"},
            "tokenizer": {"path": "none"},
            "data": {"train": str(path)},
            "train": {"epochs": 1},
        }
    )
    sources = find_sources(config.data, "train")
    assert sources is not None
    store = open_data_store(
        sources,
        demo_tokenizer(),
        build_options(config.model, config.data, config.packing),
        config.data,
        config.output_dir,
    )
    assert "question_answer (columns question, answer)" in store.summary()
    assert store.report.unread == {"at": 2, "by": 1, "id": 1}
    assert "in records, without effect: at (2), by (1), id (1)" in store.summary()


# Read since the shapes were written down.
NEWLY_READ = {"oasst1_tree", "glaive_v2"}
# Rendered with a template like that of their model.
OF_HARMONY = {"gptoss_thinking"}
MAY_BE_REFUSED = {"s1k", "medqa", "ax_train_detail", "ax_user_train", "ax_renamed"}


def shape_names() -> list[str]:
    return sorted(json.loads(EXPECTED.read_text(encoding="utf-8"))) if EXPECTED.is_file() else []


@pytest.mark.skipif(not EXPECTED.is_file(), reason="no folder of shapes beside the checkout")
@pytest.mark.parametrize("name", shape_names())
def test_a_public_shape_is_read_right(name: str) -> None:
    shape = json.loads(EXPECTED.read_text(encoding="utf-8"))[name]
    renderer, tokenizer, reader = chat_renderer(), demo_tokenizer(), ConversationReader("auto")
    if name in OF_HARMONY:
        tokenizer.add_special_tokens({"additional_special_tokens": list(CHANNELS)})
        tokenizer.chat_template, tokenizer.eos_token = GPT_OSS, "<|return|>"
        renderer = ChatRenderer(tokenizer)
    results: list[Any] = []
    for row in load_records(str(SHAPES / shape["path"])):
        try:
            conversation = reader(row)
            samples = renderer.tokenize(renderer.render_samples(conversation))
            results.append((conversation, "".join(marked(tokenizer, sample) for sample in samples)))
        except ValueError as error:
            results.append(error)
    if name in NEWLY_READ:
        assert not any(isinstance(result, ValueError) for result in results)
        return
    expected = shape["expect"]
    if expected == "refuse" or name in MAY_BE_REFUSED:
        assert any(isinstance(result, ValueError) for result in results)
        return
    for result, row in zip(results, expected, strict=True):
        if row == "drop":
            assert isinstance(result, ValueError)
            continue
        assert not isinstance(result, ValueError), result
        check_row(*result, row)


def check_row(conversation: Any, text: str, expected: dict[str, Any]) -> None:
    """Compares a sample with what must be trained, must be there, and must not."""
    spans = re.findall(r"\[\[(.*?)\]\](?!\])", text, re.DOTALL)
    whole = text.replace("[[", "").replace("]]", "")
    assert len(spans) == len(expected["sup"]), text
    for span, answer in zip(spans, expected["sup"], strict=True):
        content = answer if isinstance(answer, str) else answer["text"]
        assert content.strip() in span
        calls = [] if isinstance(answer, str) else answer["calls"]
        written = re.findall(r"<call>(.*?)</call>", span, re.DOTALL)
        found = [json.loads(call) for call in written]
        assert found == [{"name": call["name"], "arguments": call["args"]} for call in calls]
    for part in expected["ctx"]:
        assert part in whole
    for part in expected["nctx"]:
        assert part not in whole
    if expected["w"]:
        assert [turn.weight for turn in conversation.messages if turn.supervised] == expected["w"]
