"""From the turns of a chat, in the words of every provider and trainer, to messages.

A turn is an object with a role and a content; what they are called, and what a content is made of,
differs. Parts that are text are joined; calls, results of tools and reasoning become what a chat
template reads. A key that says what is trained works or is refused, it is never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sft_fast.data.conversation import (
    LOSS_WEIGHTS,
    REASONING_FIELDS,
    ROLES,
    Message,
    checked_text,
    is_loss_weight,
)
from sft_fast.data.json_records import check_finite, parse_json, type_name

ROLE_OF = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
"""What others call the roles, in small letters."""
CALLER_ROLES = ("function_call", "tool_call", "tool_calls")
"""Roles of a turn whose content is a call, as JSON."""
TURN_ROLES = ("user", "assistant", "tool")
TURN_NAMES = ("role", "content", *TURN_ROLES)
"""What `data.fields` may rename inside of turns."""
TRAIN_KEYS = ("train", "training", "trainable", "train_on_turn")
LOSS_KEYS = (*TRAIN_KEYS, "loss", "weight", "loss_scale", "loss_weight", "loss_mask")
"""Keys of a turn that say whether it is trained, and how much; all that are there count."""
REFUSED_KEYS = {
    "train_detail": "parts of an answer are trained with the format 'segments'",
    "rejected_content": "pairs of answers are for preference training",
}
UNCLEAR_KEYS = ("mask", "masked")
"""Keys of a turn that mean "trained" to some and "left out" to others, whatever their value."""
ARGUMENT_KEYS = ("arguments", "args", "input", "parameters")
CALL_KEYS = frozenset(("name", "type", "id", "index", "toolUseId", *ARGUMENT_KEYS))
# Of a part: they change nothing that a model reads or learns.
IDLE_PART_KEYS = frozenset(("type", "cache_control", "citations", "annotations", "signature", "id"))


@dataclass(frozen=True)
class TurnKeys:
    """What a format calls the two keys that every turn has; the first one present counts."""

    role: Sequence[str] = ("role",)
    content: Sequence[str] = ("content",)
    roles: Mapping[str, str] = field(default_factory=dict)
    """The source's role, in small letters -> ours; beside ROLE_OF."""

    def renamed(self, names: Mapping[str, str]) -> TurnKeys:
        """The keys of a source that the user names: role, content, and names of roles."""
        return TurnKeys(
            (names["role"],) if "role" in names else self.role,
            (names["content"],) if "content" in names else self.content,
            {names[role].lower(): role for role in TURN_ROLES if role in names},
        )

    def role_of(self, name: str) -> str:
        """Our name of a role; an unknown one as it is, for the message that refuses it."""
        return self.roles.get(name.strip().lower(), role_of(name))


@dataclass
class _Content:
    """What a content holds, in the order of its kinds."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """(keys of the tool's message, its text)."""


def read_turns(turns: Sequence[Any], keys: TurnKeys, first: int = 1) -> list[Message]:
    """The messages of a list of turns.

    Neighbouring turns that are one call each become one message with all of them.

    Args:
        turns: objects.
        keys: what role and content are called.
        first: the number of the first turn, for messages.

    Raises:
        ValueError: a turn is not what it must be; turns are counted from `first`.
    """
    messages: list[Message] = []
    was_call = False
    for number, turn in enumerate(turns, start=first):
        plain = _plain_message(turn, keys)
        if plain is not None:
            messages.append(plain)
            was_call = False
            continue
        is_call = _role(turn, keys, number)[1].strip().lower() in CALLER_ROLES
        new = list(_messages(turn, keys, number))
        if is_call and was_call:
            last = messages[-1]
            messages[-1] = replace(last, tool_calls=(*last.tool_calls, *new[0].tool_calls))
        else:
            messages += new
        was_call = is_call
    return messages


def _plain_message(turn: Any, keys: TurnKeys) -> Message | None:
    """The message of a turn that is a role and an ASCII text, as most are; None for any other."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get(keys.role[0]), turn.get(keys.content[0])
    if type(role) is not str or type(content) is not str or not content.isascii():
        return None
    return None if role.strip().lower() in CALLER_ROLES else Message(keys.role_of(role), content)


def turn_list(turns: Any, label: str) -> list[Any]:
    """The turns of a field: a list, a text that holds one, or a table of columns.

    Raises:
        ValueError: it is none of these, or empty.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, label)
    if isinstance(turns, dict) and turns and all(isinstance(v, list) for v in turns.values()):
        turns = _rows_of(turns, label)
    if not isinstance(turns, list):
        raise ValueError(f"{label} is {type_name(turns)}; expected a list of turns")
    if not turns:
        raise ValueError(f"{label} has no turns; remove the record")
    return turns


def _rows_of(columns: Mapping[str, list[Any]], label: str) -> list[dict[str, Any]]:
    """Turns out of {role: [...], content: [...]}, as some libraries write a list of objects."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{label} has columns of different lengths: {lengths}")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def role_of(name: str) -> str:
    """Our name of a role; an unknown one as it is, for the message that refuses it."""
    lower = name.strip().lower()
    lower = ROLE_OF.get(lower, lower)
    return lower if lower in ROLES else name


def _role(turn: Any, keys: TurnKeys, number: int) -> tuple[str, str]:
    """(key of the role, what the turn says there)."""
    held = [key for key in keys.role if key in turn] if isinstance(turn, dict) else []
    key = held[0] if held else keys.role[0]
    return key, checked_text(_key(turn, key, number), f"{key!r} of turn {number}")


def _key(turn: Any, key: str, number: int) -> Any:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {type_name(turn)}; expected an object")
    if key not in turn:
        raise ValueError(f"turn {number} has no {key!r}; it has {', '.join(turn) or 'no keys'}")
    return turn[key]


def _messages(turn: Any, keys: TurnKeys, number: int) -> Iterator[Message]:
    """The messages of one turn: results of tools first, for they answer the turn before."""
    role_key, role = _role(turn, keys, number)
    left = {key: value for key, value in turn.items() if key != role_key}
    content_key = next((key for key in keys.content if key in left), keys.content[0])
    raw = left.pop(content_key, None)
    for key, advice in REFUSED_KEYS.items():
        if left.get(key):
            raise ValueError(f"turn {number} has {key!r}, which is not read: {advice}")
    for key in UNCLEAR_KEYS:
        if left.get(key) is not None:
            raise ValueError(
                f"turn {number} has {key!r}: {left[key]!r}, which may mean that it is trained or "
                "that it is left out; write 'train': true or false instead"
            )
    if role.strip().lower() in CALLER_ROLES:
        calls = parse_json(
            checked_text(raw, f"{content_key!r} of turn {number}"),
            f"{content_key!r} of turn {number} ({role})",
        )
        content = _Content(
            calls=[read_call(c, number) for c in (calls if isinstance(calls, list) else [calls])]
        )
        role = "assistant"
    else:
        role = keys.role_of(role)
        content = _read_content(raw, number, content_key)
    content.calls += _calls_beside(left, number)
    if refusal := left.pop("refusal", None):
        content.texts.append(checked_text(refusal, f"'refusal' of turn {number}"))
    if raw is None and not content.texts and not content.calls:
        raise ValueError(f"turn {number} ({role}) has no {content_key} and no tool_calls")
    train, weight = _loss(left, role, number)
    name = left.pop("name", None)
    if name is not None:
        checked_text(name, f"'name' of turn {number}")
    extra = {key: value for key, value in left.items() if value is not None}
    if content.reasoning:
        if any(field in extra for field in REASONING_FIELDS):
            raise ValueError(f"turn {number} has reasoning in its content and in a key of its own")
        extra["reasoning_content"] = "\n".join(content.reasoning)
    has_results_only = content.results and not content.texts and not content.calls
    beside = extra if name is None else {**extra, "name": name}
    for result_keys, text in content.results:
        keys_of_turn = beside if has_results_only else {}
        yield Message("tool", text, extra={**keys_of_turn, **result_keys})
    if has_results_only:
        return
    yield Message(
        role,
        "".join(content.texts),
        train=train,
        weight=weight,
        name=name,
        tool_calls=tuple(content.calls),
        extra=extra,
    )


def _calls_beside(left: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Calls in keys of their own, which are taken out of `left`."""
    calls = left.pop("tool_calls", None) or []
    if older := left.pop("function_call", None):
        if calls:
            raise ValueError(f"turn {number} has tool_calls and function_call; keep one of the two")
        calls = [older]
    if isinstance(calls, str):
        calls = parse_json(calls, f"'tool_calls' of turn {number}")
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' of turn {number} is {type_name(calls)}; expected a list")
    return [read_call(call, number) for call in calls]


def _loss(left: dict[str, Any], role: str, number: int) -> tuple[bool, float]:
    """(whether the turn is trained, factor of its loss); the keys are taken out of `left`."""
    given = {key: left.pop(key) for key in LOSS_KEYS if left.get(key) is not None}
    for key in LOSS_KEYS:
        left.pop(key, None)
    train, weight = True, 1.0
    for key, value in given.items():
        if isinstance(value, bool) and key in (*TRAIN_KEYS, "loss", "loss_mask"):
            train = train and value
        elif key not in TRAIN_KEYS and is_loss_weight(value):
            train, weight = train and value != 0, weight * float(value)
        else:
            expected = "true or false" if key in TRAIN_KEYS else LOSS_WEIGHTS
            raise ValueError(f"{key!r} of turn {number} is {value!r}; expected {expected}")
    if role != "assistant" and given and train:
        key, value = next(iter(given.items()))
        raise ValueError(
            f"turn {number} ({role}) has {key!r}: {value!r}, but only the assistant's turns are "
            "trained; set it to false or 0, or remove it"
        )
    return train, weight


def _read_content(content: Any, number: int, key: str) -> _Content:
    found = _Content()
    if content is None:
        return found
    if not isinstance(content, list):
        found.texts.append(checked_text(content, f"{key!r} of turn {number}"))
        return found
    for part in content:
        if isinstance(part, str):
            found.texts.append(checked_text(part, f"a text part of turn {number}"))
        elif not isinstance(part, dict):
            raise ValueError(f"a part of turn {number} is {type_name(part)}; expected an object")
        else:
            _read_part(part, number, found)
    return found


def _read_part(part: Mapping[str, Any], number: int, found: _Content) -> None:
    """Adds one part, whose kind is its `type` or, without one, its only key."""
    kind = part.get("type")
    label = f"a text part of turn {number}"
    known: tuple[str, ...] = ()
    if kind in ("text", "input_text", "output_text") or (kind is None and "text" in part):
        known = ("text", "value", "thought")
        name = "value" if "value" in part and "text" not in part else "text"
        target = found.reasoning if part.get("thought") is True else found.texts
        target.append(checked_text(_key(part, name, number), label))
    elif kind == "refusal":
        known = ("refusal",)
        found.texts.append(checked_text(_key(part, "refusal", number), label))
    elif kind == "thinking":
        known = ("thinking",)
        found.reasoning.append(checked_text(_key(part, "thinking", number), label))
    elif kind == "tool_use":
        known = tuple(CALL_KEYS)
        found.calls.append(read_call(part, number))
    elif kind == "tool_result":
        known = ("tool_use_id", "content", "is_error")
        keys = {"tool_call_id": part["tool_use_id"]} if "tool_use_id" in part else {}
        # A template may tell failed calls apart; where it does not, the report counts the key.
        keys |= {"is_error": True} if part.get("is_error") else {}
        found.results.append((keys, _result_text(part.get("content"), number)))
    elif kind is None and "toolUse" in part:
        known = ("toolUse",)
        found.calls.append(read_call(part["toolUse"], number))
    elif kind is None and "toolResult" in part:
        known = ("toolResult",)
        result = part["toolResult"]
        keys = {"tool_call_id": _key(result, "toolUseId", number)}
        keys |= {"status": "error"} if result.get("status") == "error" else {}
        found.results.append((keys, _result_text(result.get("content"), number)))
    elif kind is None and "functionCall" in part:
        known = ("functionCall", "thoughtSignature")
        found.calls.append(read_call(part["functionCall"], number))
    elif kind is None and "functionResponse" in part:
        known = ("functionResponse",)
        response = part["functionResponse"]
        keys = {"name": _key(response, "name", number)}
        found.results.append((keys, _result_text(response.get("response"), number)))
    elif kind is None and "reasoningContent" in part:
        known = ("reasoningContent",)
        text = _key(_key(part["reasoningContent"], "reasoningText", number), "text", number)
        found.reasoning.append(checked_text(text, label))
    else:
        shown = f"of type {kind!r}" if kind is not None else f"with {', '.join(part) or 'no keys'}"
        raise ValueError(
            f"turn {number} has a part {shown}; only text is trained: remove the record"
        )
    unread = [key for key in part if key not in known and key not in IDLE_PART_KEYS]
    unread = [key for key in unread if part[key] is not None]
    if unread:
        raise ValueError(
            f"a part of turn {number} has the key {unread[0]!r}, which is not read; remove it"
        )


def _result_text(content: Any, number: int) -> str:
    """The text of a tool's result: as it is, or as JSON where it is an object."""
    if content is None:
        return ""
    if isinstance(content, str):
        return checked_text(content, f"a tool's result in turn {number}")
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, dict) and set(part) <= {"type", "text"} and "text" in part:
                texts.append(checked_text(part["text"], f"a tool's result in turn {number}"))
            elif isinstance(part, dict) and set(part) == {"json"}:
                texts.append(json.dumps(part["json"], ensure_ascii=False))
            else:
                raise ValueError(
                    f"a tool's result in turn {number} is not text; only text is read: remove the "
                    "record"
                )
        return "".join(texts)
    return json.dumps(content, ensure_ascii=False)


def read_call(call: Any, number: int) -> dict[str, Any]:
    """OpenAI's shape of a call, with the arguments as an object, as chat templates expect them.

    Args:
        call: {name, arguments}, or OpenAI's object around it; the arguments may be JSON text.
        number: of the turn.

    Raises:
        ValueError: it has no name, arguments under two names, or a key that is not read.
    """
    if isinstance(call, str):
        call = parse_json(call, f"a tool call of turn {number}")
    if not isinstance(call, dict):
        raise ValueError(f"a tool call of turn {number} is {type_name(call)}; expected an object")
    function = call.get("function", call)
    name = _key(function, "name", number)
    label = f"the call of {name!r} in turn {number}"
    unread = [key for key in function if key not in CALL_KEYS and function[key] is not None]
    if unread:
        raise ValueError(
            f"{label} has the key {unread[0]!r}, which is not read; arguments are called "
            f"{', '.join(ARGUMENT_KEYS)}"
        )
    given = [key for key in ARGUMENT_KEYS if function.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{label} has {given[0]!r} and {given[1]!r}; keep one of the two")
    arguments = _arguments(function[given[0]], f"{given[0]!r} of {label}") if given else {}
    call_id = call.get("id", call.get("toolUseId"))
    identity = {} if call_id is None else {"id": call_id}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: Any, label: str) -> dict[str, Any]:
    # Text inside text is what a dump of a dump gives.
    for _ in range(2):
        if isinstance(arguments, str):
            arguments = parse_json(arguments, label) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{label} is {type_name(arguments)}; expected an object")
    check_finite(arguments, label)
    return arguments
