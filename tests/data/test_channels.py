"""Turns of channels become what a chat template reads, and nothing of them is lost or renamed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from masks import marked, sample_of
from sft_fast.data.channels import TurnParts, join_channels
from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_records import SourceRecord
from sft_fast.data.render import ChatRenderer
from template_families import CHANNELS, GPT_OSS, HARMONY_TURNS, channel

MakeTokenizer = Callable[..., Any]
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.KEY %}{{ '<think>' + m.KEY + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = Message("user", "q")
ANALYSIS, FINAL = channel("analysis", "hm"), channel("final", "a")


def test_channels_are_one_turn_for_each_call_and_answer() -> None:
    call = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Ulm"}}}
    assert join_channels(HARMONY_TURNS) == (
        *HARMONY_TURNS[:2],
        Message("assistant", "", tool_calls=(call,), extra={"reasoning_content": "look it up"}),
        Message("tool", "wet", name="rain"),
        Message("assistant", "yes", extra={"reasoning_content": "wet is rain"}),
    )
    assert join_channels(join_channels(HARMONY_TURNS)) == join_channels(HARMONY_TURNS)


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
@pytest.mark.parametrize("given", ["thinking", "reasoning", "reasoning_content"])
def test_reasoning_has_the_name_that_the_template_reads(
    make_tokenizer: MakeTokenizer, key: str, given: str
) -> None:
    tokenizer = make_tokenizer(THINKS.replace("KEY", key))
    expected = (
        "<|im_start|>user\nq<|im_end|><|im_start|>assistant\n[[<think>hm</think>a<|im_end|>]]"
    )
    turns = (QUESTION, Message("assistant", "a", extra={given: "hm"}))
    assert marked(tokenizer, sample_of(tokenizer, Conversation(turns))) == expected
    turns = (QUESTION, ANALYSIS, FINAL)
    assert marked(tokenizer, sample_of(tokenizer, Conversation(turns))) == expected
    assert ChatRenderer(tokenizer).unread_keys(Conversation(turns)) == ()


def test_a_template_that_reads_channels_gets_them_as_they_are(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m['channel'] %}"
        "{{ '|' + m['channel'] }}{% endif %}{{ '\n' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    sample = sample_of(tokenizer, Conversation((QUESTION, ANALYSIS, FINAL)))
    assert marked(tokenizer, sample) == (
        "<|im_start|>user\nq<|im_end|><|im_start|>assistant[[|analysis\nhm<|im_end|>]]"
        "<|im_start|>assistant[[|final\na<|im_end|>]]"
    )


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((QUESTION, FINAL, ANALYSIS), "turn 3 has 'channel': 'analysis', which"),
        ((ANALYSIS, QUESTION, FINAL), "turn 1 has 'channel': 'analysis', which"),
        ((QUESTION, ANALYSIS, ANALYSIS, FINAL), "turn 2 has 'channel': 'analysis', which"),
        ((QUESTION, channel("commentary", "wait"), FINAL), "turn 2 has 'channel': 'commentary'"),
        (
            (QUESTION, channel("commentary", "1", recipient="python"), FINAL),
            "turn 2 has 'channel': 'commentary', which",
        ),
        (
            (QUESTION, replace(ANALYSIS, train=False), FINAL),
            "turn 3 is trained otherwise than the analysis in front of it",
        ),
        ((QUESTION, ANALYSIS, replace(FINAL, weight=0.5)), "turn 3 is trained otherwise"),
        (
            (QUESTION, channel("commentary", "{", recipient="functions.f"), FINAL),
            "the call of 'f' in turn 2 is not valid JSON",
        ),
        (
            (QUESTION, channel("commentary", "[1]", recipient="functions.f"), FINAL),
            "the call of 'f' in turn 2 is a list; expected an object",
        ),
        (
            (QUESTION, channel("commentary", '{"a": 1, "a": 2}', recipient="functions.f")),
            "the call of 'f' in turn 2 is not usable JSON: the key 'a' occurs twice",
        ),
        (
            (QUESTION, ANALYSIS, Message("assistant", "a", extra={"channel": "final", "x": 1})),
            None,
        ),
    ],
)
def test_what_fits_in_no_turn_is_refused(
    make_tokenizer: MakeTokenizer, turns: tuple[Message, ...], message: str | None
) -> None:
    tokenizer = make_tokenizer(THINKS.replace("KEY", "thinking"))
    if message is None:
        assert ChatRenderer(tokenizer).unread_keys(Conversation(turns)) == ("x of turns",)
        return
    with pytest.raises(ValueError, match=message):
        sample_of(tokenizer, Conversation(turns))


def test_channels_without_a_place_for_reasoning_are_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(THINKS.replace("KEY", "other"))
    with pytest.raises(ValueError, match="leaves out the reasoning of an answer, 'hm'"):
        sample_of(tokenizer, Conversation((QUESTION, ANALYSIS, FINAL)))


def test_a_template_that_writes_a_turn_as_it_stands_is_given_it() -> None:
    turns = (QUESTION, ANALYSIS, FINAL)
    assert TurnParts("{% for m in messages %}{{ m | tojson }}{% endfor %}").fit(turns) == turns
    assert TurnParts("a channel, thinking").fit((QUESTION, FINAL)) == (
        QUESTION,
        Message("assistant", "a"),
    )


def test_records_of_harmony_are_read() -> None:
    rows = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "channel": "analysis", "content": "look it up"},
        {
            "role": "assistant",
            "channel": "commentary",
            "recipient": "functions.rain",
            "content_type": "json",
            "content": [{"type": "text", "text": '{"city": "Ulm"}'}],
        },
        {"role": "tool", "name": "functions.rain", "channel": "commentary", "content": "wet"},
        {"role": "assistant", "channel": "analysis", "content": "wet is rain"},
        {"role": "assistant", "channel": "final", "content": "yes"},
    ]
    record = SourceRecord({"messages": rows}, "rows.jsonl", 1)
    assert ConversationReader("auto")(record).messages == HARMONY_TURNS


SYSTEM_PART = {
    "type": "system_content",
    "model_identity": "You are Ida.",
    "reasoning_effort": "High",
    "conversation_start_date": None,
    "knowledge_cutoff": "2024-06",
    "channel_config": {
        "valid_channels": ["analysis", "commentary", "final"],
        "channel_required": True,
    },
    "tools": {"python": {"name": "python", "description": "runs code", "tools": []}},
}
RAIN_TOOL = {"name": "rain", "description": "d", "parameters": None}
DEVELOPER_PART = {
    "type": "developer_content",
    "instructions": "Be brief.",
    "tools": {"functions": {"name": "functions", "description": None, "tools": [RAIN_TOOL]}},
}
ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def harmony_row(
    system: dict[str, Any], developer: dict[str, Any] | None = None, **columns: Any
) -> SourceRecord:
    turns = [{"role": "system", "content": [system]}]
    if developer is not None:
        turns.append({"role": "developer", "content": [developer]})
    return SourceRecord({"messages": [*turns, *ASKED], **columns}, "rows.jsonl", 1)


def test_parts_of_harmony_are_variables_instructions_and_functions(
    make_tokenizer: MakeTokenizer,
) -> None:
    conversation = ConversationReader("auto")(harmony_row(SYSTEM_PART, DEVELOPER_PART))
    assert [(turn.role, turn.content) for turn in conversation.messages] == [
        ("developer", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert conversation.template_options == {
        "model_identity": "You are Ida.",
        "reasoning_effort": "high",
        "builtin_tools": ["python"],
    }
    function = {"name": "rain", "description": "d"}
    assert conversation.tools == ({"type": "function", "function": function},)
    tokenizer = make_tokenizer(GPT_OSS, special=CHANNELS, eos_token="<|return|>")
    text = marked(tokenizer, sample_of(tokenizer, conversation))
    assert "Reasoning: high" in text and "Be brief.\ntype rain" in text
    # What this template does not write is named.
    unread = ChatRenderer(tokenizer).unread_keys(conversation)
    assert unread == ("builtin_tools of the template", "model_identity of the template")


def test_a_part_of_harmony_alone_leaves_no_turn() -> None:
    only_tools = {**DEVELOPER_PART, "instructions": None}
    dated = {"type": "system_content", "conversation_start_date": "2025-06-28"}
    conversation = ConversationReader("auto")(
        harmony_row(dated, only_tools, chat_template_kwargs={"x": 1})
    )
    assert [turn.role for turn in conversation.messages] == ["user", "assistant"]
    assert conversation.template_options == {"conversation_start_date": "2025-06-28", "x": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (harmony_row({**SYSTEM_PART, "mood": "x"}), "turn 1 has the key 'mood', which is not read"),
        (
            harmony_row({**SYSTEM_PART, "tools": {"shop": {"tools": []}}}),
            "turn 1 has the tools 'shop', .* put functions under 'functions'",
        ),
        (harmony_row({**SYSTEM_PART, "reasoning_effort": 3}), "'reasoning_effort' of the system"),
        (harmony_row(SYSTEM_PART, {**DEVELOPER_PART, "tools": {"functions": {}}}), "no list"),
        (harmony_row(SYSTEM_PART, {**DEVELOPER_PART, "tools": [1]}), "'tools' of the developer_"),
        (harmony_row(SYSTEM_PART, DEVELOPER_PART, tools=[RAIN_TOOL]), "keep one of the two"),
        (
            harmony_row(SYSTEM_PART, chat_template_kwargs={"reasoning_effort": "low"}),
            "'reasoning_effort' of a turn and 'chat_template_kwargs' differ",
        ),
    ],
)
def test_what_a_part_of_harmony_may_not_say(record: SourceRecord, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationReader("auto")(record)
