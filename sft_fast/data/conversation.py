"""What every format produces: a conversation, checked once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_fast.data.json_records import type_name

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
LOSS_WEIGHTS = "0, or a number from 0.0001 to 100"
"""What `is_loss_weight` accepts."""
OPENING_ROLES = ("system", "developer")
"""Of turns at the start of a conversation that hold for all of it."""
ROLES = (*OPENING_ROLES, "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        content: the text; empty only beside `tool_calls`, or in a system turn or a tool's answer.
        train: whether the loss is taken on this turn; read for the assistant's turns only.
        weight: factor of this turn's loss; read for the assistant's turns only.
        name: the speaker's or the tool's name.
        tool_calls: calls as OpenAI writes them, each with its arguments as an object.
        extra: the other keys of the source's message, handed to the chat template as they are.
    """

    role: str
    content: str
    train: bool = True
    weight: float = 1.0
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def supervised(self) -> bool:
        """Whether the turn has a loss."""
        return self.role == "assistant" and self.train and self.weight > 0

    @property
    def reasoning(self) -> str:
        """What the assistant thought before it answered, where that is a field of its own."""
        found = (self.extra.get(name) for name in REASONING_FIELDS)
        return next((text for text in found if isinstance(text, str)), "")

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template expects it."""
        message: dict[str, Any] = {**self.extra, "role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


@dataclass(frozen=True)
class Segment:
    """A part of a text that goes to the model as it is."""

    text: str
    train: bool


@dataclass(frozen=True)
class GivenTokens:
    """What a record of tokens holds.

    Attributes:
        input_ids: n token ids.
        trained: n flags.
    """

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True)
class Conversation:
    """What one record holds: turns, or a text, or a text in segments, or tokens.

    Attributes:
        messages: the turns in order.
        tools: the tools on offer as JSON schemas.
        text: a text that is trained whole, without a chat template; then there are no turns.
        segments: a text of which parts are trained, without a chat template, BOS or EOS.
        tokens: tokens that are taken as they are.
        template_options: variables of the chat template, e.g. enable_thinking.
        unread: columns of the record that have no effect.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    segments: tuple[Segment, ...] = ()
    tokens: GivenTokens | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def check(self) -> None:
        """Checks what a format may get wrong, whoever wrote it.

        Raises:
            ValueError: an unknown role, a content that is not text or is empty where it must not
                be, or no assistant turn to learn from; turns are counted from 1.
        """
        if self.text is not None:
            assert not self.messages, "a text has no turns"
            if not checked_text(self.text, "the text").strip():
                raise ValueError("the text is empty; give it text or remove the record")
            return
        if self.segments:
            assert not self.messages, "segments have no turns"
            if not any(part.train and part.text for part in self.segments):
                raise ValueError("no segment is trained, so there is nothing to learn from")
            return
        if self.tokens is not None:
            assert not self.messages, "tokens have no turns"
            if not any(self.tokens.trained[1:]):
                raise ValueError("no token behind the first one is trained; remove the record")
            return
        for number, message in enumerate(self.messages, start=1):
            if message.role not in ROLES:
                raise ValueError(
                    f"turn {number} has the role {message.role!r}; expected {', '.join(ROLES)}"
                )
            content = message.content
            if type(content) is str and content.isascii() and not content.isspace() and content:
                continue
            label = f"the content of turn {number} ({message.role})"
            checked_text(content, label)
            may_be_empty = message.role not in ("user", "assistant") or message.tool_calls
            if not content.strip() and not may_be_empty:
                raise ValueError(f"{label} is empty; give it text or remove the record")
        if not any(message.role == "assistant" for message in self.messages):
            raise ValueError("the conversation has no assistant turn, so nothing to learn from")
        if not any(message.supervised for message in self.messages):
            raise ValueError("every assistant turn has weight 0, so there is nothing to learn from")


def is_loss_weight(value: Any) -> bool:
    """Whether a turn's loss can be multiplied by `value`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (value == 0 or 1e-4 <= value <= 100)


def checked_text(value: Any, label: str) -> str:
    """Returns `value`, or raises ValueError where it is not text that can be encoded."""
    if not isinstance(value, str):
        shown = f" ({value})" if isinstance(value, (bool, int, float)) else ""
        raise ValueError(
            f'{label} is {type_name(value)}{shown}; expected text, written in double quotes "..."'
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} has half of a surrogate pair at character {error.start + 1} "
            f"(\\u{ord(value[error.start]):04x}); the text was cut inside a character"
        ) from None
    return value
