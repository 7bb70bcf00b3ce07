"""Whether a rendered chat holds all of a conversation: chat templates leave parts out in silence.

Of a turn that is trained every character counts, but for white space at the ends of its texts: the
content, the reasoning, and each call with its name and its arguments. Of the other turns the
content counts, of the assistant's none: templates drop the reasoning of earlier answers on purpose.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft_fast.data.conversation import Message
from sft_fast.data.tokens import Span

SHOWN_CHARACTERS = 60
_WORD = re.compile(r"\w+")
WHOLE_TURN = re.compile(r"\b(m|msg|messages?)\s*\|\s*(tojson|string)|\.items\(")
"""In a template that writes a turn as it stands, and so reads all of its keys."""
# Of a turn: an answer that is not for the user, so that it is none if the template does not say so.
_TELLING_KEYS = {"channel": ("final",), "recipient": ("all", "user")}
_REASONING_TAGS = re.compile(r"</?think>|\[/?THINK\]|</?reasoning>")


def check_kept(
    messages: Sequence[Message],
    answers: Sequence[int],
    tools: Sequence[Mapping[str, Any]],
    spans: Sequence[Span],
    text: str,
) -> None:
    """Checks that nothing is lost.

    Args:
        messages: the turns.
        answers: numbers of the turns that are trained.
        tools: the tools on offer.
        spans: place of each of the answers.
        text: the rendered chat.

    Raises:
        ValueError: the template left out a turn, a tool, or a part of an answer.
    """
    for number, message in enumerate(messages, start=1):
        if message.role != "assistant" and not _holds(text, message.content.strip()):
            raise ValueError(f"the chat template leaves out turn {number} ({message.role})")
    for name in (tool.get("function", tool).get("name", "") for tool in tools):
        if str(name) not in text:
            raise ValueError(f"the chat template leaves out the tool {name!r}; use one with tools")
    for span, number in zip(spans, answers, strict=True):
        answer = text[span.start : span.end].removesuffix(span.end_of_turn or "")
        try:
            check_answer(messages[number], answer)
        except ValueError as error:
            raise ValueError(f"turn {number + 1}: {error}") from None


class TemplateKeys:
    """Which keys of turns a chat template reads, by the words that it holds."""

    def __init__(self, template: str) -> None:
        self._words = frozenset(_WORD.findall(template))
        self._reads_all = WHOLE_TURN.search(template) is not None

    def unread(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """Keys of turns that have no effect, sorted."""
        if self._reads_all or not any(message.extra for message in messages):
            return ()
        keys = {key for message in messages for key in message.extra}
        return tuple(sorted(keys - self._words))

    def names(self, variable: str) -> bool:
        """Whether the template has a word that a variable is called."""
        return variable in self._words

    def check(self, messages: Sequence[Message], answers: Sequence[int]) -> None:
        """Raises ValueError where an answer has an unread key that says that it is another text."""
        for number in answers:
            for key in self.unread(messages[number : number + 1]):
                value = messages[number].extra[key]
                if value not in _TELLING_KEYS.get(key, (value,)):
                    raise ValueError(
                        f"turn {number + 1} has {key!r}: {value!r}, which the chat template does "
                        "not read, so it would be trained as an answer to the user; take the turn "
                        "out of the loss (train: false), or name a template that reads it "
                        "(tokenizer.chat_template)"
                    )


def check_answer(message: Message, answer: str) -> None:
    """Checks that the text of a trained turn holds all of it.

    Raises:
        ValueError: the template left a part out.
    """
    if not answer.strip() and not message.tool_calls and not message.reasoning:
        raise ValueError("the chat template renders an answer as nothing")
    reasoning = message.reasoning
    parts = _without(answer, [reasoning]) if reasoning else [answer]
    if parts is None:
        raise ValueError(
            f"the chat template leaves out the reasoning of an answer, {_shown(message.reasoning)}"
            "; name a template that writes it (tokenizer.chat_template), or remove the field"
        )
    rest = _without_content("\0".join(parts), message.content)
    if message.tool_calls:
        _check_calls(message.tool_calls, rest)


def _without_content(answer: str, content: str) -> str:
    """What an answer holds beside its content; ValueError where it does not hold all of it."""
    rest = _without(answer, [content])
    if rest is not None:
        return "\0".join(rest)
    # A template may write the tags of reasoning, and the white space around them, in its own way.
    parts = [part for part in _REASONING_TAGS.split(content) if part.strip()]
    for number, part in enumerate(parts, start=1):
        if _without(answer, parts[:number]) is None:
            where = "the reasoning in front of" if number < len(parts) else "a part of"
            raise ValueError(
                f"the chat template leaves out {where} an answer, {_shown(part)}; name a template "
                "that writes all of the content (tokenizer.chat_template), or give the text a "
                "place that this one writes: a field reasoning_content, or a turn of its own"
            )
    rest = _without(answer, parts) or [answer]
    if any(not between.strip() for between in rest[1:-1]):
        raise ValueError(
            "the chat template leaves out the tags between the reasoning of an answer and what "
            "follows; name a template that writes them (tokenizer.chat_template)"
        )
    return "\0".join(rest)


def _without(answer: str, parts: Sequence[str]) -> list[str] | None:
    """What stands around texts in an answer that has them in this order; None where it does not."""
    rest, position = [], 0
    for part in parts:
        part = part.strip()
        place = answer.find(part, position)
        if place >= 0:
            rest.append(answer[position:place])
            position = place + len(part)
            continue
        found = [
            (place, -len(form))
            for form in _forms(part)
            if (place := answer.find(form, position)) >= 0
        ]
        if not found:
            return None
        place, length = min(found)
        rest.append(answer[position:place])
        position = place - length
    return [*rest, answer[position:]]


def _check_calls(calls: Sequence[Mapping[str, Any]], answer: str) -> None:
    """Raises ValueError where a text does not hold every call, as often as it is there."""
    names = Counter(str(call["function"]["name"]) for call in calls)
    for name, count in names.items():
        found = len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", answer))
        if found < count:
            which = f"{count - found} of {count} tool calls" if count > 1 else "the tool call"
            raise ValueError(
                f"the chat template leaves out {which} {name!r}; name a template that writes "
                "it (tokenizer.chat_template), or give each call a turn of its own, with its "
                "result behind it"
            )
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        for label, forms in _leaves(arguments):
            if not any(form in answer for form in forms):
                raise ValueError(
                    f"the chat template leaves out {label} of the tool call {name!r}; name a "
                    "template that writes it (tokenizer.chat_template)"
                )


def _leaves(value: Any) -> Iterator[tuple[str, Sequence[str]]]:
    """Keys and values of arguments in words, and the forms in which a text may hold them."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f"the argument {key!r}", _forms(str(key))
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield f"the value {_shown(value)}", _forms(value.strip())
    else:
        yield f"the value {value!r}", (json.dumps(value, default=str), str(value))


def _holds(text: str, content: str) -> bool:
    return content in text or any(form in text for form in _forms(content))


def _forms(text: str) -> tuple[str, ...]:
    """A text as it is, in JSON, in Python's notation, and in XML."""
    if text.isascii() and text.isalnum():
        return (text,)
    encoded = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    forms = (text, *encoded, repr(text)[1:-1], html.escape(text), html.escape(encoded[0]))
    return tuple(dict.fromkeys(forms))


def _shown(text: str) -> str:
    text = text.strip()
    short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
    return repr(short)
