"""The system and developer parts of openai-harmony's records, which hold no text of a turn.

`system_content` says what the model is and how much it thinks, which are variables of the chat
template; `developer_content` holds the instructions and the functions on offer.

Source: github.com/openai/harmony, `SystemContent` and `DeveloperContent`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_fast.data.conversation import checked_text
from sft_fast.data.formats.tools import read_tools
from sft_fast.data.json_records import type_name

SYSTEM_PART, DEVELOPER_PART = "system_content", "developer_content"
BUILTIN_TOOLS = ("browser", "python")
"""Namespaces of tools that gpt-oss knows, and its template describes."""
FUNCTIONS = "functions"
# What the library fills in is what the chat template writes anyway.
_FILLED_IN = {
    "knowledge_cutoff": "2024-06",
    "channel_config": {
        "valid_channels": ["analysis", "commentary", "final"],
        "channel_required": True,
    },
}
_SYSTEM_TEXTS = (
    "model_identity",
    "reasoning_effort",
    "conversation_start_date",
    "knowledge_cutoff",
)


@dataclass
class HarmonyParts:
    """What the parts of a record say.

    Attributes:
        turns: the turns, with the instructions as text in the place of their parts.
        options: variables of the chat template.
        tools: the functions on offer, as JSON schemas.
    """

    turns: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


def take_parts(turns: Sequence[Any]) -> HarmonyParts | None:
    """The turns without openai-harmony's parts, and what these say; None where there are none.

    Raises:
        ValueError: a part holds what is not read.
    """
    if not any(_kinds(turn) & {SYSTEM_PART, DEVELOPER_PART} for turn in turns):
        return None
    found = HarmonyParts([])
    for number, turn in enumerate(turns, start=1):
        if not _kinds(turn):
            found.turns.append(turn)
            continue
        content = [_text_part(part, number, found) for part in turn["content"]]
        found.turns.append({**turn, "content": content})
    return found


def _kinds(turn: Any) -> set[Any]:
    """The types of a turn's parts."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list):
        return set()
    return {str(part.get("type")) for part in content if isinstance(part, dict)}


def _text_part(part: Any, number: int, found: HarmonyParts) -> Any:
    """A part as text; what else it says is added to `found`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in (SYSTEM_PART, DEVELOPER_PART):
        return part
    label = f"the {kind} of turn {number}"
    given = {key: value for key, value in part.items() if key != "type" and value is not None}
    tools = given.pop("tools", None) or {}
    if not isinstance(tools, dict):
        raise ValueError(f"'tools' of {label} is {type_name(tools)}; expected namespaces of tools")
    known = BUILTIN_TOOLS if kind == SYSTEM_PART else (FUNCTIONS,)
    if other := [name for name in tools if name not in known]:
        raise ValueError(
            f"{label} has the tools {other[0]!r}, which no chat template writes; expected "
            f"{', '.join(known)}: put functions under {FUNCTIONS!r} of a {DEVELOPER_PART}"
        )
    text = ""
    if kind == SYSTEM_PART:
        options = {key: value for key, value in given.items() if value != _FILLED_IN.get(key)}
        for key in _SYSTEM_TEXTS:
            if key in options:
                checked_text(options[key], f"{key!r} of {label}")
        if "reasoning_effort" in options:
            options["reasoning_effort"] = options["reasoning_effort"].lower()
        if tools:
            options["builtin_tools"] = list(tools)
        _check_known(given, (*_SYSTEM_TEXTS, "channel_config"), label)
        found.options |= options
    else:
        _check_known(given, ("instructions",), label)
        text = checked_text(given.get("instructions", ""), f"'instructions' of {label}")
        for space in tools.values():
            found.tools += _functions(space, label)
    return {"type": "text", "text": text}


def _functions(space: Any, label: str) -> tuple[Mapping[str, Any], ...]:
    """The tools of a namespace, without the keys that the library leaves empty."""
    tools = space.get("tools") if isinstance(space, dict) else None
    if not isinstance(tools, list):
        raise ValueError(f"{FUNCTIONS!r} of {label} has no list 'tools'")
    filled = [
        {key: value for key, value in tool.items() if value is not None}
        if isinstance(tool, dict)
        else tool
        for tool in tools
    ]
    return read_tools(filled, f"'tools' of {label}")


def _check_known(given: Mapping[str, Any], known: Sequence[str], label: str) -> None:
    if unread := [key for key in given if key not in known]:
        raise ValueError(f"{label} has the key {unread[0]!r}, which is not read; remove it")
