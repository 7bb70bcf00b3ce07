"""Formats whose record is a chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sft_fast.data.conversation import Conversation, Message, checked_text
from sft_fast.data.format_registry import Record, register_format
from sft_fast.data.formats.fields import SYSTEM, TOOLS, with_system_and_tools
from sft_fast.data.formats.harmony import HarmonyParts, take_parts
from sft_fast.data.formats.turns import TURN_NAMES, TurnKeys, read_turns, role_of, turn_list
from sft_fast.data.json_records import parse_json, type_name

_COLUMNS = ("messages", "conversations", "conversation")
_FIELDS = {"messages": _COLUMNS, "system": SYSTEM, "tools": TOOLS}
_MESSAGES = TurnKeys(("role",), ("content", "value", "parts"))
_SHAREGPT = TurnKeys(("from",), ("value",))
_GEMINI = TurnKeys(("role",), ("parts",))
_EXCHANGE_KEYS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))


def _first_turn(values: Mapping[str, Any], columns: tuple[str, ...] = _COLUMNS) -> Any:
    """The first turn in a column that may hold turns, or None."""
    for name in columns:
        turns = values.get(name)
        if isinstance(turns, str) and turns.startswith("["):
            turns = parse_json(turns, name)
        if isinstance(turns, dict) and "role" in turns:
            return {key: values for key, values in turns.items() if isinstance(values, list)}
        if isinstance(turns, list) and turns:
            return turns[0]
    return None


def _has(values: Mapping[str, Any], *keys: str) -> bool:
    turn = _first_turn(values)
    return isinstance(turn, dict) and all(key in turn for key in keys)


@register_format(
    "messages", fields=_FIELDS, detect=lambda values: _has(values, "role"), names=TURN_NAMES
)
@register_format("openai", fields=_FIELDS, names=TURN_NAMES)
def messages(record: Record) -> Conversation:
    """Chat records: a list of {role, content[, name, tool_calls, weight, train, loss]}, `tools`.

    A content is a text or a list of parts, as OpenAI, Anthropic (tool_use, tool_result, thinking)
    and Bedrock write them, and the list of turns may be a text that holds JSON, as in CSV files.
    `function_call`, the older form of a call, is read as one, and so are turns of the roles
    tool_call and function_call. `weight` 0, `train` or `loss` false take an assistant turn out of
    the loss, another `weight`, `loss_scale` or `loss_weight` is its factor. `reasoning_content` and
    other keys reach the chat template as they are. openai-harmony's `system_content` is variables
    of the template, its `developer_content` the instructions and the functions. `data.fields` may
    also name the keys `role` and `content` of a turn, and what the source calls the roles user,
    assistant and tool.
    """
    turns = turn_list(record.require("messages"), record.label("messages"))
    keys = _MESSAGES.renamed(record.names)
    parts = take_parts(turns)
    if parts is not None:
        return _of_harmony(record, parts, keys)
    return with_system_and_tools(record, read_turns(turns, keys))


def _of_harmony(record: Record, parts: HarmonyParts, keys: TurnKeys) -> Conversation:
    """The conversation of turns whose parts were openai-harmony's."""
    # A part that says nothing but variables, or functions, leaves no turn.
    turns = [turn for turn in read_turns(parts.turns, keys) if turn.content or turn.tool_calls]
    made = with_system_and_tools(record, turns)
    if made.tools and parts.tools:
        raise ValueError(f"{record.label('tools')} and tools of a turn: keep one of the two")
    return replace(made, tools=made.tools or parts.tools, template_options=parts.options)


@register_format(
    "sharegpt",
    fields={**_FIELDS, "mask": ("mask",)},
    detect=lambda values: _has(values, "from", "value"),
    names=TURN_NAMES,
)
def sharegpt(record: Record) -> Conversation:
    """ShareGPT's records: a list of {from, value}; `function_call` values are JSON with a call.

    `weight`, `train` and `loss` as in the format `messages`. `mask`, which NeMo has, names the
    speaker that is not trained: the user.
    """
    mask = record.optional_text("mask")
    if mask is not None and role_of(mask) != "user":
        raise ValueError(f"{record.label('mask')} is {mask!r}; expected the user")
    turns = turn_list(record.require("messages"), record.label("messages"))
    return with_system_and_tools(record, read_turns(turns, _SHAREGPT.renamed(record.names)))


@register_format(
    "gemini",
    fields={
        "contents": ("contents",),
        "system": ("systemInstruction", "system_instruction", *SYSTEM),
        "tools": TOOLS,
    },
    detect=lambda values: isinstance(_first_turn(values, ("contents",)), dict),
)
def gemini(record: Record) -> Conversation:
    """Gemini's records: `contents`, a list of {role, parts}, `systemInstruction`, `tools`."""
    turns = turn_list(record.require("contents"), record.label("contents"))
    return with_system_and_tools(record, read_turns(turns, _GEMINI))


@register_format(
    "exchanges",
    fields=_FIELDS,
    detect=lambda values: any(_has(values, *keys) for keys in _EXCHANGE_KEYS),
)
def exchanges(record: Record) -> Conversation:
    """A list of exchanges: {input, output}, as Capybara and XTuner, or {human, assistant}.

    A `system` in the first exchange is the system turn.
    """
    label, turns = record.label("messages"), []
    for number, exchange in enumerate(turn_list(record.require("messages"), label), start=1):
        keys = next(
            (k for k in _EXCHANGE_KEYS if isinstance(exchange, dict) and set(k) <= set(exchange)),
            None,
        )
        if keys is None:
            raise ValueError(
                f"exchange {number} of {label} is {type_name(exchange)}; expected input and "
                "output, or human and assistant"
            )
        left = {key: value for key, value in exchange.items() if key not in keys}
        system = left.pop("system", None)
        if left:
            raise ValueError(
                f"exchange {number} of {label} has the key {next(iter(left))!r}, which is not read"
            )
        if system:
            if number > 1:
                raise ValueError(
                    f"exchange {number} of {label} has a system text; only the first may"
                )
            turns.append(Message("system", checked_text(system, f"'system' of {label}")))
        for role, key in zip(("user", "assistant"), keys, strict=True):
            text = checked_text(exchange[key], f"{key!r} of exchange {number}")
            turns.append(Message(role, text))
    return with_system_and_tools(record, turns)


@register_format(
    "alternating",
    fields=_FIELDS,
    detect=lambda values: isinstance(_first_turn(values), str),
)
def alternating(record: Record) -> Conversation:
    """LIMA's records: a list of texts, of the user and the assistant in turn."""
    label = record.label("messages")
    texts = turn_list(record.require("messages"), label)
    if len(texts) % 2:
        raise ValueError(f"{label} has {len(texts)} texts; expected a question and an answer each")
    turns = [
        Message("assistant" if number % 2 else "user", checked_text(text, f"text {number + 1}"))
        for number, text in enumerate(texts)
    ]
    return with_system_and_tools(record, turns)


@register_format(
    "message_tree",
    fields={"prompt": ("prompt",), "system": SYSTEM},
    detect=lambda values: isinstance(values.get("prompt"), dict) and "replies" in values["prompt"],
)
def message_tree(record: Record) -> Conversation:
    """OpenAssistant's trees: `prompt` with `replies`, theirs with replies of their own.

    The path of the best-ranked replies is read; the others are alternatives to it.
    """
    turns = list(_best_path(record.require("prompt")))
    if turns[-1].role != "assistant":
        turns = turns[:-1]
    return with_system_and_tools(record, turns)


def _best_path(node: Mapping[str, Any]) -> Iterator[Message]:
    number = 1
    while True:
        yield from read_turns(
            [{"role": node.get("role"), "text": node.get("text")}],
            TurnKeys(content=("text",)),
            number,
        )
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        if not replies:
            return
        # A reply without a rank was rated by nobody.
        node = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
        number += 1
