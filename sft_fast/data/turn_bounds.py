"""Where each answer starts and ends in a rendered chat, and the proof of it.

An answer starts where the text of the turns before it, rendered with the generation prompt, ends:
there the model starts to write. It ends before the text of the next turn. Both texts must be
prefixes of the whole, or the answer would be trained in a context that the model never sees.

To render every prefix takes time that grows with the square of the number of turns. Instead:

1. The prefixes are rendered for a skeleton of the chat, with a short placeholder for every content,
   and once for all chats of the same structure. That gives the texts between the contents. The chat
   itself is rendered whole, must be exactly these texts with its own contents in between, and one
   of its prefixes is rendered as well.
2. A chat is proven by prefixes of its own where a skeleton may not stand for it: there are tool
   calls, a content holds a string that the template mentions (`</think>`), or the whole is not what
   the skeleton says.
3. A template whose code only writes contents (template_flow.py) makes of a skeleton all that there
   is to know: the text is its texts with the contents of the chat in between, and nothing is
   rendered. The first CHECKED_CHATS of a structure are rendered all the same and must be that.
4. A template that drops the reasoning of earlier calls once an answer follows gives no prefix of
   it. An answer that is trained alone stands behind what the model sees before it then, if without
   that reasoning the template gives the very same whole.
5. Of many answers, in a skeleton or a chat, each is rendered behind its last turns alone. The whole
   must be exactly the texts that this gives, one after another, and the prefixes up to the last
   answer, the one in the middle before it, and so on, must be what they say. Where it is not so,
   every prefix is rendered: a template that is refused is refused for a prefix of the chat itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sft_fast.data.conversation import REASONING_FIELDS, Message
from sft_fast.data.template_flow import only_writes_contents

Apply = Callable[[Sequence[Message], bool], str]
"""(turns, whether the generation prompt follows) -> text."""
Bounds = list[tuple[int, int]]
"""Of each answer: where it starts, and where what follows it starts."""

MOST_LAYOUTS = 4096
FEW_ANSWERS = 8
"""As many answers are proven by all of their prefixes; that is as fast."""
CHECKED_CHATS = 4
_PLACE_CHARACTERS = 40
_EXPRESSION = re.compile(r"\{[{%](.*?)[}%]\}", re.DOTALL)
_LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_SHORTEST_MARK = 3


class UnstableTemplateError(ValueError):
    """A template that renders a turn differently when more turns follow."""


@dataclass(frozen=True)
class _Layout:
    """What a structure of turns looks like.

    Attributes:
        between: the texts before, between and after the contents.
        contents: numbers of the turns whose contents stand between them, in the text's order.
        bounds: start and limit of each answer: (number of a text in `between`, offset in it).
    """

    between: tuple[str, ...]
    contents: tuple[int, ...]
    bounds: tuple[tuple[tuple[int, int], tuple[int, int]], ...]


class TurnBounds:
    """Finds the answers of chats that one template renders."""

    def __init__(self, template: str, eos: str | None) -> None:
        """`eos`: the EOS token, that a template may put behind the last turn only."""
        self._eos = eos or ""
        self._layouts: dict[object, _Layout | None] = {}
        self._num_checked: dict[object, int] = {}
        code = " ".join(_EXPRESSION.findall(template))
        found = (single or double for single, double in _LITERAL.findall(code))
        marks = {text.replace("\\n", "\n").strip() for text in found}
        self._marks = tuple(
            mark for mark in marks if len(mark) >= _SHORTEST_MARK and not mark.isalnum()
        )
        self._only_writes = only_writes_contents(template, self._marks)

    def find(
        self, messages: Sequence[Message], answers: Sequence[int], tools: str, apply: Apply
    ) -> tuple[str, Bounds]:
        """Renders a chat and finds its answers.

        Args:
            messages: the turns.
            answers: numbers of the turns to find, ascending.
            tools: what tells the tools of this chat from those of another.
            apply: renders turns.

        Returns: the text, and the bounds of each answer.

        Raises:
            UnstableTemplateError: a prefix is not one; the message shows the place.
        """
        # With one answer its own prefixes are as cheap.
        is_helpful = len(answers) > 1 or self._only_writes
        key = self._structure(messages, answers, tools) if is_helpful else None
        layout = None if key is None else self._layout(key, messages, answers, apply)
        if layout is not None and self._only_writes:
            composed = _compose(layout, messages)
            if composed is not None:
                if self._num_checked.setdefault(key, 0) >= CHECKED_CHATS:
                    return composed
                self._num_checked[key] += 1
                text = apply(messages, False)
                if composed != (text, self._prove(messages, answers, text, apply)):
                    self._layouts[key] = None
                return text, self._prove(messages, answers, text, apply)
        text = apply(messages, False)
        bounds = None if layout is None else _fit(layout, messages, text)
        if bounds is None:
            try:
                return text, self._prove(messages, answers, text, apply)
            except ValueError:
                joined = _behind_reasoning(messages, answers, text, apply)
                if joined is None:
                    raise
                return joined
        before = apply(messages[: answers[-1]], True)
        _check_start(messages, answers[-1], before, text, apply)
        return text, bounds if len(before) == bounds[-1][0] else self._prove(
            messages, answers, text, apply
        )

    def _structure(
        self, messages: Sequence[Message], answers: Sequence[int], tools: str
    ) -> object | None:
        """What a chat has in common with others of one layout; None where it has none."""
        # Calls are rarely the same twice, so their skeletons would serve one chat each.
        turns = []
        for message in messages:
            content = message.content
            if message.tool_calls:
                return None
            for mark in self._marks:
                if mark in content:
                    return None
            extra = repr(message.extra) if message.extra else ""
            blank = "" if content and not content.isspace() else content + "|"
            turns.append((message.role, message.name, extra, blank))
        return (tools, tuple(answers), tuple(turns))

    def _layout(
        self, key: object, messages: Sequence[Message], answers: Sequence[int], apply: Apply
    ) -> _Layout | None:
        if key not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
                self._num_checked.clear()
            skeleton = [
                replace(message, content=_placeholder(number))
                if message.content.strip()
                else message
                for number, message in enumerate(messages)
            ]
            self._layouts[key] = self._measure(skeleton, answers, apply)
        return self._layouts[key]

    def _prove(
        self, messages: Sequence[Message], answers: Sequence[int], text: str, apply: Apply
    ) -> Bounds:
        if len(answers) > FEW_ANSWERS:
            try:
                parts = self._prove_in_parts(messages, answers, text, apply)
            except ValueError:
                # The template refuses some of the turns without the others.
                parts = None
            if parts is not None:
                return parts
        bounds = []
        for number in answers:
            before = apply(messages[:number], True)
            is_last = number + 1 == len(messages)
            until = text if is_last else apply(messages[: number + 1], False)
            if not text.startswith(until):
                until = until.removesuffix(self._eos)
            _check_start(messages, number, before, text, apply)
            check_prefix(until, text, f"turns 1 to {number + 1}")
            bounds.append((len(before), len(until)))
        return bounds

    def _prove_in_parts(
        self, messages: Sequence[Message], answers: Sequence[int], text: str, apply: Apply
    ) -> Bounds | None:
        """The bounds, in time linear in the turns; None where the parts do not make the whole."""
        bounds: Bounds = []
        position = 0
        for place in range(len(answers)):
            known, turns = _last_turns(messages, answers, place)
            before, after = apply(turns[:-1], True), apply(turns, False)
            start = 0
            if known:
                earlier = apply(turns[:known], False)
                if not before.startswith(earlier):
                    earlier = earlier.removesuffix(self._eos)
                start = len(earlier)
                if not before.startswith(earlier):
                    return None
            if not after.startswith(before):
                return None
            answer = after[len(before) :]
            first = position + len(before) - start
            if not text.startswith(answer, first):
                answer = answer.removesuffix(self._eos)
            if not text.startswith(before[start:], position) or not text.startswith(answer, first):
                return None
            position = first + len(answer)
            bounds.append((first, position))
        if answers[-1] + 1 == len(messages) and position != len(text):
            return None
        place = len(answers) - 1
        while place > 0:
            before = apply(messages[: answers[place]], True)
            if len(before) != bounds[place][0] or not text.startswith(before):
                return None
            place //= 2
        return bounds

    def _measure(
        self, skeleton: Sequence[Message], answers: Sequence[int], apply: Apply
    ) -> _Layout | None:
        """The layout of a skeleton; None where the skeleton is no help."""
        try:
            text = apply(skeleton, False)
            bounds = self._prove(skeleton, answers, text, apply)
        except ValueError:
            return None
        places = []
        for number, message in enumerate(skeleton):
            if message.content != _placeholder(number):
                continue
            if text.count(message.content) != 1:
                return None
            places.append((text.index(message.content), number))
        places.sort()
        between, starts, position = [], [], 0
        for place, number in places:
            starts.append(position)
            between.append(text[position:place])
            position = place + len(_placeholder(number))
        starts.append(position)
        between.append(text[position:])
        found = []
        for pair in bounds:
            located = [_locate(position, starts, between) for position in pair]
            if located[0] is None or located[1] is None:
                return None
            found.append((located[0], located[1]))
        return _Layout(tuple(between), tuple(number for _, number in places), tuple(found))


def _last_turns(
    messages: Sequence[Message], answers: Sequence[int], place: int
) -> tuple[int, list[Message]]:
    """The turns to render an answer behind: how many of them are before its own, and all.

    Its own are those since the answer before. Two answers stand before them, and in front of all
    the system turn and the user's last: no template sees an order of roles that is new to it.
    """
    if place < 2:
        known = 0 if place == 0 else answers[0] + 1
        return known, list(messages[: answers[place] + 1])
    first = answers[place - 2]
    opening = [message for message in messages[:1] if message.role == "system" and first > 0]
    user = next((n for n in range(first - 1, -1, -1) if messages[n].role == "user"), None)
    if user is not None:
        opening.append(messages[user])
    turns = [*opening, *messages[first : answers[place] + 1]]
    return len(opening) + answers[place - 1] + 1 - first, turns


def _behind_reasoning(
    messages: Sequence[Message], answers: Sequence[int], text: str, apply: Apply
) -> tuple[str, Bounds] | None:
    """The last answer behind what the model sees before it, and its bounds.

    A template may drop the reasoning of earlier calls once an answer follows, which the model has
    before it when it writes that answer. None: that is not all that the template changes.

    Args:
        messages: the turns.
        answers: numbers of the turns to find.
        text: the whole chat.
        apply: renders turns.
    """
    if answers[0] + 1 != len(messages):
        return None
    plain = [*map(_without_reasoning, messages[:-1]), messages[-1]]
    start = apply(plain[:-1], True)
    if not text.startswith(start) or apply(plain, False) != text:
        return None
    before, answer = apply(messages[:-1], True), text[len(start) :]
    return before + answer, [(len(before), len(before) + len(answer))]


def _without_reasoning(message: Message) -> Message:
    extra = {key: value for key, value in message.extra.items() if key not in REASONING_FIELDS}
    return replace(message, extra=extra) if message.role == "assistant" else message


def _check_start(
    messages: Sequence[Message], number: int, before: str, text: str, apply: Apply
) -> None:
    """Raises ValueError where the text of a chat does not start with what precedes an answer.

    Args:
        messages: the turns.
        number: of the answer.
        before: the turns before it with the generation prompt.
        text: the whole chat.
        apply: renders turns.
    """
    if text.startswith(before):
        return
    turns = f"turns 1 to {number} with the generation prompt"
    alone = apply(messages[: number + 1], False)
    if alone.startswith(before):
        check_prefix(before, text, turns)
    raise ValueError(
        "the chat template writes other text with its generation prompt than with an answer behind "
        f"it, so what is trained is not what the model sees: {_difference(before, alone, turns)}. "
        "Name a template whose answers start with its generation prompt "
        "(tokenizer.chat_template), or one with {% generation %}"
    )


def check_prefix(prefix: str, text: str, turns: str) -> None:
    """Raises UnstableTemplateError with the place where `text` does not start with `prefix`."""
    if text.startswith(prefix):
        return
    raise UnstableTemplateError(
        "the chat template renders the same turns differently when more follow, so the answers "
        f"cannot be found: {_difference(prefix, text, turns)}. Train each answer with its own "
        "history (data.changing_history: expand), or only the last one (data.train_on: last_turn), "
        "or use a template that keeps earlier turns as they are, or one with {% generation %}"
    )


def _difference(prefix: str, text: str, turns: str) -> str:
    """Where a text does not start with a prefix."""
    same = next(
        (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text)
    )
    place = slice(max(0, same - _PLACE_CHARACTERS), same + _PLACE_CHARACTERS)
    return (
        f"{turns} give ...{prefix[place]!r} where the whole conversation gives "
        f"...{text[place]!r} (character {same + 1})"
    )


def _locate(position: int, starts: Sequence[int], between: Sequence[str]) -> tuple[int, int] | None:
    """Which text between contents a position is in, and where; the later one if it is in two."""
    found = None
    for number, (start, text) in enumerate(zip(starts, between, strict=True)):
        if start <= position <= start + len(text):
            found = (number, position - start)
    return found


def _fit(layout: _Layout, messages: Sequence[Message], text: str) -> Bounds | None:
    """The bounds in a text that is the layout with the messages' contents; None if it is not."""
    if not text.startswith(layout.between[0]):
        return None
    starts, position = [0], len(layout.between[0])
    for number, following in zip(layout.contents, layout.between[1:], strict=True):
        for content in _variants(messages[number].content):
            end = position + len(content)
            if text.startswith(content, position) and text.startswith(following, end):
                break
        else:
            return None
        starts.append(end)
        position = end + len(following)
    if position != len(text):
        return None
    return [
        (starts[first] + start, starts[second] + limit)
        for (first, start), (second, limit) in layout.bounds
    ]


def _compose(layout: _Layout, messages: Sequence[Message]) -> tuple[str, Bounds] | None:
    """The text that a layout makes of a chat, and its bounds; None: white space is in doubt."""
    contents = [messages[number].content for number in layout.contents]
    if any(content[0].isspace() or content[-1].isspace() for content in contents):
        return None
    pieces = [layout.between[0]]
    starts, position = [0], len(layout.between[0])
    for content, following in zip(contents, layout.between[1:], strict=True):
        position += len(content)
        starts.append(position)
        position += len(following)
        pieces += (content, following)
    return "".join(pieces), [
        (starts[first] + start, starts[second] + limit)
        for (first, start), (second, limit) in layout.bounds
    ]


def _variants(content: str) -> Iterator[str]:
    """A content as templates write it."""
    yield content
    yield content.strip()
    yield content.lstrip()
    yield content.rstrip()


def _placeholder(number: int) -> str:
    # Private characters, that no template looks for.
    return f"\ue000{number}\ue001"
