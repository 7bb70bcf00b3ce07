"""Formats whose record is a question and its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sft_fast.data.conversation import Conversation, Message, checked_text
from sft_fast.data.format_registry import Record, register_format
from sft_fast.data.formats.fields import SYSTEM, TOOLS, with_system_and_tools
from sft_fast.data.formats.turns import TurnKeys, read_call, read_turns
from sft_fast.data.json_records import parse_json, type_name

_QUESTIONS = ("instruction", "prompt", "question", "query")
_ANSWERS = ("response", "output", "answer")
_INPUTS_AND_OUTPUTS = (
    ("input", "output"),
    ("input", "target"),
    ("inputs", "targets"),
    ("problem", "solution"),
)


@register_format(
    "prompt_completion",
    fields={"prompt": ("prompt",), "completion": ("completion",), "system": SYSTEM, "tools": TOOLS},
    detect=lambda values: "prompt" in values and "completion" in values,
)
def prompt_completion(record: Record) -> Conversation:
    """`prompt` and `completion`: each a text, or a list of messages; the completion is trained."""
    prompt, completion = record.require("prompt"), record.require("completion")
    turns = (
        read_turns(prompt, TurnKeys())
        if isinstance(prompt, list)
        else [Message("user", record.text("prompt"))]
    )
    turns = [replace(turn, train=False) for turn in turns]
    if isinstance(completion, list):
        turns += read_turns(completion, TurnKeys(), len(turns) + 1)
    else:
        turns.append(Message("assistant", record.text("completion")))
    return with_system_and_tools(record, turns)


@register_format(
    "squad",
    fields={
        "context": ("context",),
        "question": ("question",),
        "answers": ("answers",),
        "system": SYSTEM,
    },
    detect=lambda values: "question" in values and isinstance(values.get("answers"), dict),
)
def squad(record: Record) -> Conversation:
    """SQuAD's records: `context`, `question` and `answers`, {text: [...], answer_start: [...]}.

    The first answer is trained, which is the one that the annotator of the question gave.
    """
    answers = record.require("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{record.label('answers')} holds no text; remove the record")
    parts = [record.optional_text("context"), record.text("question")]
    turns = [
        Message("user", "\n\n".join(part for part in parts if part is not None)),
        Message("assistant", checked_text(texts[0], f"the first of {record.label('answers')}")),
    ]
    return with_system_and_tools(record, turns)


@register_format(
    "tool_calls",
    fields={"query": ("query",), "answers": ("answers",), "system": SYSTEM, "tools": TOOLS},
    detect=lambda values: {"query", "answers", "tools"} <= set(values),
)
def tool_calls(record: Record) -> Conversation:
    """xLAM's records: a `query`, and `answers`, the calls of `tools` that answer it."""
    calls = record.require("answers")
    if isinstance(calls, str):
        calls = parse_json(calls, record.label("answers"))
    if not isinstance(calls, list) or not calls:
        raise ValueError(
            f"{record.label('answers')} is {type_name(calls)}; expected a list of calls"
        )
    answer = Message("assistant", "", tool_calls=tuple(read_call(call, 2) for call in calls))
    return with_system_and_tools(record, [Message("user", record.text("query")), answer])


@register_format(
    "question_answer",
    fields={
        "question": ("question",),
        "answer": ("answer",),
        "input": ("input", "context"),
        "system": SYSTEM,
    },
    detect=lambda values: "question" in values and "answer" in values,
)
def question_answer(record: Record) -> Conversation:
    """`question` and `answer`, and what the question is about in `input` or `context`."""
    return with_system_and_tools(record, [_question(record, "question"), _answer(record, "answer")])


@register_format(
    "alpaca",
    fields={
        "instruction": _QUESTIONS,
        "input": ("input", "context"),
        "response": _ANSWERS,
        "system": SYSTEM,
        "history": ("history",),
    },
    detect=lambda values: (
        any(n in values for n in _QUESTIONS) and any(n in values for n in _ANSWERS)
    ),
)
def alpaca(record: Record) -> Conversation:
    """An instruction, an optional input (put on the next line), a response, an optional system.

    `history` has the exchanges before, a list of [instruction, response]; their responses are
    trained too.
    """
    turns = [*_history(record), _question(record, "instruction"), _answer(record, "response")]
    return with_system_and_tools(record, turns)


@register_format(
    "input_output",
    fields={
        "input": ("input", "inputs", "problem"),
        "output": ("output", "target", "targets", "solution"),
        "system": SYSTEM,
        "tools": TOOLS,
    },
    detect=lambda values: any(q in values and a in values for q, a in _INPUTS_AND_OUTPUTS),
)
def input_output(record: Record) -> Conversation:
    """`input` and `output`, each a text; also input and target, inputs and targets, problem and
    solution."""
    turns = [Message("user", record.text("input")), _answer(record, "output")]
    return with_system_and_tools(record, turns)


def _question(record: Record, field: str) -> Message:
    parts = [record.text(field), record.optional_text("input")]
    return Message("user", "\n".join(part for part in parts if part is not None))


def _answer(record: Record, field: str) -> Message:
    return Message("assistant", record.text(field))


def _history(record: Record) -> Iterator[Message]:
    """The turns of the exchanges in `history`."""
    history: Any = record.get("history") or []
    label = record.label("history")
    if isinstance(history, str):
        history = parse_json(history, label) or []
    for number, pair in enumerate(history if isinstance(history, list) else [None], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"exchange {number} of {label} is {type_name(pair)}; expected a list of exchanges, "
                "[instruction, response] each"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, checked_text(text, f"the {role}'s text of exchange {number}"))
