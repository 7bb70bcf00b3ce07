"""Fields that several formats share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_fast.data.conversation import Conversation, Message, checked_text
from sft_fast.data.format_registry import Record
from sft_fast.data.formats.tools import read_tools
from sft_fast.data.json_records import type_name

SYSTEM = ("system", "system_prompt")
"""Columns that hold the system turn."""
TOOLS = ("tools", "functions")
"""Columns that hold the tools on offer."""


def with_system_and_tools(record: Record, turns: Sequence[Message]) -> Conversation:
    """The conversation of `turns` with the `system` and `tools` fields of the record.

    Raises:
        ValueError: there is a system turn too, or one of the fields is not what it must be.
    """
    system = _system_text(record)
    if system is not None:
        if any(turn.role == "system" for turn in turns):
            raise ValueError(f"{record.label('system')} and a system turn: keep one of the two")
        turns = [Message("system", system), *turns]
    return Conversation(tuple(turns), read_tools(record.get("tools"), record.label("tools")))


def _system_text(record: Record) -> str | None:
    """The system text: as it is, or out of a list of text parts, or Gemini's {parts: [...]}."""
    value: Any = record.get("system")
    label = record.label("system")
    if isinstance(value, dict):
        value = value.get("parts", value)
    if isinstance(value, list):
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise ValueError(f"{label} has a part that is {type_name(text)}; expected text")
            texts.append(text)
        value = "".join(texts)
    if value is None or not checked_text(value, label).strip():
        return None
    return str(value)
