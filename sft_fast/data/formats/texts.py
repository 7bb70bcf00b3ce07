"""Formats whose record is a text: plain, in segments, or a chat written as one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_fast.constants import IGNORE_INDEX
from sft_fast.data.conversation import (
    Conversation,
    GivenTokens,
    Message,
    Segment,
    checked_text,
)
from sft_fast.data.format_registry import Record, register_format
from sft_fast.data.formats.fields import TOOLS, with_system_and_tools
from sft_fast.data.formats.tools import read_tools
from sft_fast.data.formats.turns import read_call, role_of
from sft_fast.data.json_records import parse_json_prefix, type_name

# Columns beside a text of which each is one turn, or has a class.
_MARKED = frozenset(("role", "label", "labels"))
_GLAIVE_TURN = re.compile(r"(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = re.compile(
    r"\{\s*\"name\":\s*\"([^\"]+)\",\s*\"arguments\":\s*'(.*)'\s*\}", re.DOTALL
)
_CHATML_TURN = re.compile(r"\s*<\|im_start\|>([^\n<]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


@register_format(
    "chatml",
    fields={"text": ("text",), "tools": TOOLS},
    detect=lambda values: isinstance(values.get("text"), str) and "<|im_start|>" in values["text"],
)
def chatml(record: Record) -> Conversation:
    """A text with <|im_start|>role ... <|im_end|> turns, parsed back into messages.

    The markup is not trained as it stands: the turns go through the tokenizer's own template. A
    list of messages is the format `messages`.
    """
    if isinstance(record.get("text"), list):
        raise ValueError(f"{record.label('text')} is a list of turns; set data.format: messages")
    text = record.text("text")
    turns, position = [], 0
    while position < len(text):
        match = _CHATML_TURN.match(text, position)
        if not match:
            raise ValueError(
                f"{record.label('text')} is not ChatML at character {position + 1}: expected "
                f"'<|im_start|>role', text, '<|im_end|>', found {text[position : position + 40]!r}"
            )
        turns.append(Message(role_of(match[1]), match[2]))
        position = match.end()
    return with_system_and_tools(record, turns)


@register_format(
    "segments",
    fields={"segments": ("segments",)},
    detect=lambda values: _is_segments(values.get("segments")),
)
def segments(record: Record) -> Conversation:
    """Axolotl's `input_output` records: a list of {text, label}; what has label true is trained.

    The texts are joined as they are, without a chat template, BOS or EOS: they hold their own.
    """
    parts = []
    for number, part in enumerate(record.require("segments"), start=1):
        if not isinstance(part, dict) or set(part) != {"label", "text"}:
            raise ValueError(f"segment {number} is {type_name(part)}; expected text and label")
        if not isinstance(part["label"], bool):
            raise ValueError(
                f"'label' of segment {number} is {part['label']!r}; expected true or false"
            )
        parts.append(Segment(checked_text(part["text"], f"segment {number}"), part["label"]))
    return Conversation((), segments=tuple(parts))


def _is_segments(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


@register_format(
    "tokens",
    fields={
        "input_ids": ("input_ids",),
        "labels": ("labels",),
        "attention_mask": ("attention_mask",),
    },
    detect=lambda values: isinstance(values.get("input_ids"), list) and "labels" in values,
)
def tokens(record: Record) -> Conversation:
    """Records that were tokenised before: `input_ids`, `labels` (-100 where nothing is learnt).

    `attention_mask` is 0 on padding, which is left out. Labels are not shifted, as transformers
    has them: a label is the token of its own place.
    """
    ids, labels = record.require("input_ids"), record.require("labels")
    mask = record.get("attention_mask")
    mask = [1] * len(ids) if mask is None else mask
    if not len(ids) == len(labels) == len(mask):
        raise ValueError(
            f"input_ids has {len(ids)} entries, labels {len(labels)}, attention_mask {len(mask)}"
        )
    kept = [(int(i), int(label)) for i, label, m in zip(ids, labels, mask, strict=True) if m]
    for place, (token, label) in enumerate(kept):
        if label not in (IGNORE_INDEX, token):
            raise ValueError(
                f"label {place} is {label}, but the token there is {token}; expected the token "
                "itself (not shifted), or -100"
            )
    trained = tuple(label != IGNORE_INDEX for _, label in kept)
    return Conversation((), tokens=GivenTokens(tuple(token for token, _ in kept), trained))


@register_format(
    "glaive",
    fields={"system": ("system",), "chat": ("chat",)},
    detect=lambda values: isinstance(values.get("chat"), str) and "USER:" in values["chat"],
)
def glaive(record: Record) -> Conversation:
    """Glaive's function calling, version 2: `system` with the functions, `chat` as one text.

    The functions after "access to the following functions" become tools, `<functioncall>` a call
    and FUNCTION RESPONSE its result.
    """
    system, tools = _glaive_system(record)
    turns = [Message("system", system)] if system else []
    parts = _GLAIVE_TURN.split(record.text("chat"))
    if parts[0].strip():
        raise ValueError(f"{record.label('chat')} begins with {parts[0][:40]!r}; expected USER:")
    for number, (name, body) in enumerate(zip(parts[1::2], parts[2::2], strict=True), start=1):
        body = body.replace("<|endoftext|>", "").strip()
        before, call, arguments = body.partition("<functioncall>")
        if name == "ASSISTANT" and call:
            calls = (read_call(_glaive_call(arguments, number), number),)
            turns.append(Message("assistant", before.strip(), tool_calls=calls))
        else:
            turns.append(Message(_GLAIVE_ROLES[name], body))
    return Conversation(tuple(turns), tools)


def _glaive_system(record: Record) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    text = (record.optional_text("system") or "").removeprefix("SYSTEM:").strip()
    before, mark, functions = text.partition("access to the following functions.")
    if not mark:
        return text, ()
    place, tools = 0, []
    while functions[place:].strip().startswith("{"):
        place += len(functions[place:]) - len(functions[place:].lstrip())
        label = f"a function in {record.label('system')}"
        tool, place = parse_json_prefix(functions, place, label)
        tools.append(tool)
        place += len(functions[place:]) - len(functions[place:].lstrip(" \n-,"))
    rest = functions[place:].strip().strip("-").strip()
    if rest:
        raise ValueError(f"{record.label('system')} has text behind the functions: {rest[:40]!r}")
    return f"{before}{mark}".strip(), read_tools(tools, record.label("system"))


def _glaive_call(text: str, number: int) -> dict[str, Any]:
    """{"name": ..., "arguments": '...'}: the arguments stand in single quotes, as they are."""
    match = _GLAIVE_CALL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"the call of turn {number} is not {{name, arguments}}: {text[:60]!r}")
    return {"name": match[1], "arguments": match[2]}


@register_format(
    "text",
    fields={"text": ("text",)},
    detect=lambda values: isinstance(values.get("text"), str) and not _MARKED.intersection(values),
)
def text(record: Record) -> Conversation:
    """A text that is trained whole, from its first token to EOS, without a chat template."""
    return Conversation((), text=record.text("text"))
