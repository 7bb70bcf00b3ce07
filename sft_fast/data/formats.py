"""From a record to a conversation: the formats that come with sft_fast, and their reader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft_fast.data.conversation import ROLES, Conversation, Message, checked_text
from sft_fast.data.format_registry import (
    Record,
    detect_format,
    format_names,
    get_format,
    load_format,
    register_format,
    register_row_function,
)
from sft_fast.data.json_records import SourceRecord, type_name
from sft_fast.data.source import Records, Source

__all__ = [
    "ConversationReader",
    "detect_format",
    "format_names",
    "get_format",
    "read_conversations",
    "load_format",
    "register_format",
    "register_row_function",
]

_CHATML_TURN = re.compile(r"\s*<\|im_start\|>([^\n<]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
# What others call the roles, in small letters.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class FileFormat:
    """What the first record of a file decides.

    Attributes:
        name: the format.
        line: the first record's line.
        types: column -> the type of its value in that record, in words.
    """

    name: str
    line: int
    types: Mapping[str, str]


class ConversationReader:
    """Reads records of one or more files; "auto" is decided by the first record of each file.

    Attributes:
        files: file -> what its first record decided, for the files seen so far.
    """

    def __init__(
        self,
        format_name: str,
        fields: Mapping[str, str] | None = None,
        files: Mapping[str, FileFormat] | None = None,
    ) -> None:
        """`files`: what another reader found out, so that both read the same."""
        self._fields = dict(fields or {})
        self._fixed = None if format_name == "auto" else load_format(format_name)
        if self._fixed is not None:
            self._fixed.check_mapping(self._fields)
        self.files: dict[str, FileFormat] = dict(files or {})

    def __call__(self, record: SourceRecord) -> Conversation:
        """The conversation of a record.

        Raises:
            ValueError: the record is not what the format needs; the message starts with file:line.
        """
        try:
            return get_format(self.look(record).name).read(record.values, self._fields)
        except ValueError as error:
            differs = self._difference(record)
            raise ValueError(f"{record.origin}: {error}{differs}") from error
        # A format of the user's own may raise anything; where it happened goes along.
        except BaseException as error:
            known = self.files.get(record.file)
            error.add_note(f"while reading {record.origin} as {known.name if known else None!r}")
            raise

    def look(self, record: SourceRecord) -> FileFormat:
        """The format of a record's file, found out with this record if it is the first one.

        Raises:
            ValueError: no format recognises the record.
        """
        if record.file not in self.files:
            if self._fixed is not None:
                name = self._fixed.name
            else:
                name = detect_format(list(record.values), record.values, self._fields)
                get_format(name).check_mapping(self._fields)
            types = {column: type_name(value) for column, value in record.values.items()}
            self.files[record.file] = FileFormat(name, record.line, types)
        return self.files[record.file]

    def _difference(self, record: SourceRecord) -> str:
        """Names the columns of a bad record whose type is not that of the file's first record."""
        first = self.files.get(record.file)
        if first is None or first.line == record.line:
            return ""
        texts = [
            f"{column!r} is {type_name(value)} in line {record.line} but {first.types[column]} "
            f"in line {first.line}"
            for column, value in record.values.items()
            if column in first.types and type_name(value) != first.types[column]
        ]
        return f" ({'; '.join(texts)})" if texts else ""


def read_conversations(
    records: Records | Sequence[Source],
    format_name: str = "auto",
    fields: Mapping[str, str] | None = None,
) -> Iterator[tuple[SourceRecord, Conversation]]:
    """Yields every record with its conversation.

    Args:
        records: the records, or sources that know their format and fields themselves.
        format_name: format of `records` that are no sources.
        fields: our field -> the column, of `records` that are no sources.

    Raises:
        ValueError: at the first record that cannot be used; the message starts with file:line.
    """
    sources = (
        [Source(records, format_name, fields or {})] if isinstance(records, Records) else records
    )
    for source in sources:
        reader = ConversationReader(source.format_name, source.fields)
        for record in source.records:
            yield record, reader(record)


def _has_turns(record: Mapping[str, Any], *keys: str) -> bool:
    """Whether `messages` or `conversations` is a list of objects with all these keys."""
    for name in ("messages", "conversations"):
        turns = record.get(name)
        if isinstance(turns, str) and turns.startswith("["):
            turns = _json(turns, name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return all(key in turns[0] for key in keys)
    return False


_TURN_FIELDS = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system",),
    "tools": ("tools",),
}


@register_format("messages", fields=_TURN_FIELDS, detect=lambda record: _has_turns(record, "role"))
@register_format("openai", fields=_TURN_FIELDS)
def messages(record: Record) -> Conversation:
    """OpenAI's chat records: a list of {role, content[, name, tool_calls, weight, train]}, `tools`.

    A content may be a list of text parts, and the list of turns a text that holds JSON, as in CSV
    files. `function_call`, the older form of a call, is read as one. `weight` 0 or `train` false
    take an assistant turn out of the loss, another `weight` is the factor of its loss.
    `reasoning_content` and other keys reach the chat template as they are.
    """
    turns = [
        _openai_message(turn, number)
        for number, turn in enumerate(_turn_list(record, "messages"), start=1)
    ]
    return _conversation(record, turns)


@register_format(
    "sharegpt", fields=_TURN_FIELDS, detect=lambda record: _has_turns(record, "from", "value")
)
def sharegpt(record: Record) -> Conversation:
    """ShareGPT's records: a list of {from, value}; `function_call` values are JSON with a call.

    `weight` and `train` as in the format `messages`.
    """
    turns = []
    for number, turn in enumerate(_turn_list(record, "messages"), start=1):
        speaker = checked_text(_key(turn, "from", number), f"'from' of turn {number}")
        value = checked_text(_key(turn, "value", number), f"'value' of turn {number}")
        train, weight = _loss(turn.get("train"), turn.get("weight"), number)
        if speaker == "function_call":
            calls = _json(value, f"'value' of turn {number} (function_call)")
            calls = calls if isinstance(calls, list) else [calls]
            tool_calls = tuple(_tool_call(call, number) for call in calls)
            turns.append(Message("assistant", "", train, weight, tool_calls=tool_calls))
        else:
            turns.append(Message(_role(speaker), value, train, weight))
    return _conversation(record, turns)


@register_format(
    "chatml",
    fields={"text": ("text",), "tools": ("tools",)},
    detect=lambda record: isinstance(record.get("text"), str) and "<|im_start|>" in record["text"],
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
        turns.append(Message(match[1].strip(), match[2]))
        position = match.end()
    return _conversation(record, turns)


@register_format(
    "prompt_completion",
    fields={
        "prompt": ("prompt",),
        "completion": ("completion",),
        "system": ("system",),
        "tools": ("tools",),
    },
    detect=lambda record: "prompt" in record and "completion" in record,
)
def prompt_completion(record: Record) -> Conversation:
    """`prompt` and `completion`: each a text, or a list of messages; the completion is trained."""
    prompt, completion = record.require("prompt"), record.require("completion")
    turns = (
        [_openai_message(turn, number) for number, turn in enumerate(prompt, start=1)]
        if isinstance(prompt, list)
        else [Message("user", record.text("prompt"))]
    )
    turns = [replace(turn, train=False) for turn in turns]
    if isinstance(completion, list):
        first = len(turns) + 1
        turns += [_openai_message(turn, number) for number, turn in enumerate(completion, first)]
    else:
        turns.append(Message("assistant", record.text("completion")))
    return _conversation(record, turns)


@register_format(
    "question_answer",
    fields={"question": ("question",), "answer": ("answer",), "system": ("system",)},
    detect=lambda record: "question" in record and "answer" in record,
)
def question_answer(record: Record) -> Conversation:
    """`question` and `answer`."""
    turns = [Message("user", record.text("question")), Message("assistant", record.text("answer"))]
    return _conversation(record, turns)


@register_format(
    "alpaca",
    fields={
        "instruction": ("instruction", "prompt", "question"),
        "input": ("input", "context"),
        "response": ("response", "output", "answer"),
        "system": ("system",),
        "history": ("history",),
    },
    detect=lambda record: (
        any(name in record for name in ("instruction", "prompt", "question"))
        and any(name in record for name in ("response", "output", "answer"))
    ),
)
def alpaca(record: Record) -> Conversation:
    """An instruction, an optional input (put on the next line), a response, an optional system.

    `history` has the exchanges before, a list of [instruction, response]; their responses are
    trained too.
    """
    parts = [record.text("instruction"), record.optional_text("input")]
    turns = [
        *_history(record),
        Message("user", "\n".join(part for part in parts if part is not None)),
        Message("assistant", record.text("response")),
    ]
    return _conversation(record, turns)


@register_format(
    "text",
    fields={"text": ("text",)},
    detect=lambda record: list(record) == ["text"] and isinstance(record["text"], str),
)
def text(record: Record) -> Conversation:
    """A text that is trained whole, from its first token to EOS, without a chat template."""
    return Conversation((), text=record.text("text"))


def _conversation(record: Record, turns: Sequence[Message]) -> Conversation:
    """Adds what several formats share: the `system` and `tools` columns."""
    system = record.optional_text("system")
    if system is not None:
        if any(turn.role == "system" for turn in turns):
            raise ValueError(f"{record.label('system')} and a system turn: keep one of the two")
        turns = [Message("system", system), *turns]
    tools = record.get("tools") or []
    if isinstance(tools, str):
        tools = _json(tools, record.label("tools")) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{record.label('tools')} must be a list of JSON schemas")
    return Conversation(tuple(turns), tuple(tools))


def _history(record: Record) -> Iterator[Message]:
    """The turns of the exchanges in `history`."""
    history, label = record.get("history") or [], record.label("history")
    if isinstance(history, str):
        history = _json(history, label) or []
    for number, pair in enumerate(history if isinstance(history, list) else [None], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"exchange {number} of {label} is {type_name(pair)}; expected a list of exchanges, "
                "[instruction, response] each"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, checked_text(text, f"the {role}'s text of exchange {number}"))


def _turn_list(record: Record, field: str) -> list[Any]:
    turns = record.require(field)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _json(turns, record.label(field))
    if not isinstance(turns, list):
        raise ValueError(f"{record.label(field)} is {type_name(turns)}; expected a list of turns")
    if not turns:
        raise ValueError(f"{record.label(field)} has no turns; remove the record")
    return turns


def _role(name: str) -> str:
    """Our name of a role; an unknown one as it is, for the message that refuses it."""
    lower = name.lower()
    lower = _ROLES.get(lower, lower)
    return lower if lower in ROLES else name


def _key(turn: Any, key: str, number: int) -> Any:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {type_name(turn)}; expected an object")
    if key not in turn:
        raise ValueError(f"turn {number} has no {key!r}; it has {', '.join(turn) or 'no keys'}")
    return turn[key]


def _openai_message(turn: Any, number: int) -> Message:
    role = checked_text(_key(turn, "role", number), f"'role' of turn {number}")
    keys = dict(turn)
    del keys["role"]
    content = keys.pop("content", None)
    calls = keys.pop("tool_calls", None) or []
    if older := keys.pop("function_call", None):
        if calls:
            raise ValueError(f"turn {number} has tool_calls and function_call; keep one of the two")
        calls = [older]
    if content is None and not calls:
        raise ValueError(f"turn {number} ({role}) has no content and no tool_calls")
    train, weight = _loss(keys.pop("train", None), keys.pop("weight", None), number)
    name = keys.pop("name", None)
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' of turn {number} is {type_name(calls)}; expected a list")
    return Message(
        _role(role),
        _content_text(content, number),
        train=train,
        weight=weight,
        name=None if name is None else checked_text(name, f"'name' of turn {number}"),
        tool_calls=tuple(_tool_call(call, number) for call in calls),
        extra={key: value for key, value in keys.items() if value is not None},
    )


def _loss(train: Any, weight: Any, number: int) -> tuple[bool, float]:
    """`train` and `weight` of a turn, either of which may be absent (None)."""
    weight = 1 if weight is None else weight
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or 1e-4 <= weight <= 100):
        raise ValueError(
            f"'weight' of turn {number} is {weight!r}; expected 0, or a number from 0.0001 to 100"
        )
    if train not in (None, True, False):
        raise ValueError(f"'train' of turn {number} is {train!r}; expected true or false")
    return train is not False and weight != 0, float(weight)


def _content_text(content: Any, number: int) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        return checked_text(content, f"'content' of turn {number}")
    texts = []
    for part in content:
        kind = _key(part, "type", number)
        if kind != "text":
            raise ValueError(
                f"turn {number} has a part of type {kind!r}; only text is trained: remove "
                "the record"
            )
        texts.append(checked_text(_key(part, "text", number), f"a text part of turn {number}"))
    return "".join(texts)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """OpenAI's shape of a call, with the arguments as an object, as chat templates expect them."""
    if not isinstance(call, dict):
        raise ValueError(f"a tool call of turn {number} is {type_name(call)}; expected an object")
    function = call.get("function", call)
    name = _key(function, "name", number)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _json(arguments, f"'arguments' of the call of {name!r} in turn {number}")
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(
            f"'arguments' of the call of {name!r} in turn {number} is {type_name(arguments)}; "
            "expected an object"
        )
    call_id = {"id": call["id"]} if "id" in call else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _json(text: str, label: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{label} is not valid JSON: {error}") from None
