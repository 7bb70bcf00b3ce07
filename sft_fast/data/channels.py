"""What a chat template reads of an answer's parts: channels, and where the reasoning stands.

Harmony, the format of gpt-oss, has a turn for each channel: `analysis` is reasoning, `commentary`
to a function is a call, `final` is the answer. Its chat template, and those of other models, read
one turn with reasoning, calls and content. Turns of channels become such turns, unless the template
reads channels itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft_fast.data.conversation import REASONING_FIELDS, Message
from sft_fast.data.json_records import parse_json, type_name
from sft_fast.data.kept import WHOLE_TURN
from sft_fast.data.tokens import Span

ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
FUNCTIONS = "functions."
"""What the name of a function begins with where it is a recipient, or speaks."""
EVERYBODY = ("all", "user", "assistant")
"""Recipients that say no more than the role does."""
REASONING_ENDS = ("</think>", "[/THINK]", "</reasoning>")
_KEYS = ("channel", "recipient", "content_type")


class TurnParts:
    """Brings the turns of a conversation into the form that one chat template reads."""

    def __init__(self, template: str) -> None:
        reads_all = WHOLE_TURN.search(template) is not None
        self._reads_channels = reads_all or _reads(template, "channel")
        read = [name for name in REASONING_FIELDS if reads_all or _reads(template, name)]
        self._reasoning = read[0] if read else None
        self._read = frozenset(read)

    def fit(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns as the template reads them.

        Raises:
            ValueError: a call is no JSON object, or only a part of a turn is to be trained.
        """
        if not any(message.extra for message in messages):
            return messages
        if not self._reads_channels and any("channel" in message.extra for message in messages):
            messages = join_channels(messages)
        return tuple(self._with_reasoning(message) for message in messages)

    def _with_reasoning(self, message: Message) -> Message:
        """The turn with its reasoning under the name that the template reads."""
        given = next((name for name in REASONING_FIELDS if name in message.extra), None)
        if given is None or given in self._read or self._reasoning is None:
            return message
        extra = {key: value for key, value in message.extra.items() if key != given}
        return replace(message, extra={**extra, self._reasoning: message.extra[given]})


def _reads(template: str, key: str) -> bool:
    """Whether the code of a template takes the key of something, or asks for it."""
    return re.search(rf"\.{key}\b(?!\()|(['\"]){key}\1\s*(\]|in\b)", template) is not None


def join_channels(messages: Sequence[Message]) -> tuple[Message, ...]:
    """One turn of each answer, or call, with the reasoning in front of it.

    What has no place in such a turn stays as it is: a commentary for the user, and reasoning that
    nothing follows.

    Raises:
        ValueError: a call is no JSON object, or only a part of a turn is to be trained.
    """
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        turn = _plain_turn(message, number)
        last = joined[-1] if joined else None
        if last is None or last.extra.get("channel") != ANALYSIS or turn.role != "assistant":
            joined.append(turn)
        elif "channel" in turn.extra or turn.reasoning:
            # More reasoning, or a text of a channel of its own.
            joined.append(turn)
        else:
            if (last.train, last.weight) != (turn.train, turn.weight):
                raise ValueError(
                    f"turn {number} is trained otherwise than the analysis in front of it, and the "
                    "chat template writes them as one; data.train_reasoning: false leaves the "
                    "analysis of all turns out of the loss"
                )
            joined[-1] = replace(turn, extra={**turn.extra, "reasoning_content": last.content})
    return tuple(joined)


def _plain_turn(message: Message, number: int) -> Message:
    """A call, an answer or a tool's result without the keys that say which of them it is."""
    channel, recipient = message.extra.get("channel"), message.extra.get("recipient")
    extra = {key: value for key, value in message.extra.items() if key not in _KEYS}
    if message.role == "tool" and recipient in (None, *EVERYBODY):
        name = None if message.name is None else message.name.removeprefix(FUNCTIONS)
        return replace(message, name=name, extra=extra)
    if message.role != "assistant":
        return message
    if channel == COMMENTARY and str(recipient or "").startswith(FUNCTIONS):
        call = {"type": "function", "function": _function(recipient, message.content, number)}
        return replace(message, content="", tool_calls=(call,), extra=extra)
    is_plain = recipient in (None, *EVERYBODY) and (channel == FINAL or message.tool_calls)
    return replace(message, extra=extra) if is_plain else message


def _function(recipient: Any, content: str, number: int) -> Mapping[str, Any]:
    """The name and the arguments of a call."""
    name = str(recipient).removeprefix(FUNCTIONS)
    label = f"the call of {name!r} in turn {number}"
    arguments = parse_json(content, label)
    if not isinstance(arguments, dict):
        raise ValueError(f"{label} is {type_name(arguments)}; expected an object")
    return {"name": name, "arguments": arguments}


def behind_reasoning(span: Span, text: str, message: Message, special: re.Pattern[str]) -> Span:
    """The span behind the reasoning of its answer, or as it is where the answer has none.

    Args:
        span: of the answer.
        text: the rendered chat.
        message: the answer.
        special: matches white space and a special token.
    """
    segment = text[span.start : span.end]
    tag = next((tag for tag in REASONING_ENDS if tag in segment), None)
    reasoning = message.reasoning.strip()
    if tag is None and reasoning:
        place = segment.find(reasoning)
        behind = special.match(segment, place + len(reasoning)) if place >= 0 else None
        if behind is None:
            raise ValueError(
                "cannot find where the reasoning of an answer ends: the chat template writes none "
                f"of {', '.join(REASONING_ENDS)}, and no special token behind it"
            )
        return replace(span, start=span.start + behind.end())
    if tag is None:
        return span
    start = span.start + segment.index(tag) + len(tag)
    while text[start : start + 1].isspace():
        start += 1
    return replace(span, start=start)
