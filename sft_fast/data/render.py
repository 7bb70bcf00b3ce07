"""From a conversation to token ids and the mask of the supervised tokens.

A conversation is rendered by the chat template and tokenised once. Which characters are supervised
is decided on the text, and mapped to tokens through their character offsets. The rules:

1. An assistant turn's span starts where the text of the turns before it, rendered with the
   generation prompt, ends: there the model starts to write. It ends with the end-of-turn token: the
   first special token behind the content. Template text behind that token (a newline) is not
   supervised.
2. Both ends come from renders of the first turns. Each must be a prefix of the whole render, or the
   template is refused: then what the model sees when it answers is not what it would be trained on.
   Where the template marks the answers itself ({% generation %}), its marks are used instead, and
   extended over the end-of-turn token.
3. The text is cut behind the last supervised span: with causal attention nothing behind it has a
   gradient. Where the template writes no end-of-turn token there, the EOS token is put there.
4. A token is supervised when it holds at least one supervised character. A token that also holds
   prompt characters is supervised too, because it is the first token of the answer; such tokens
   are counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sft_fast.data.conversation import Conversation, Message
from sft_fast.data.templates import embedded_template, freeze_clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACE_CHARACTERS = 40


class TemplateCompileError(ValueError):
    """A chat template that is not valid Jinja."""


@dataclass(frozen=True)
class Span:
    """Supervised characters [start, end) of a text; `end_of_turn` is the token that closes them."""

    start: int
    end: int
    end_of_turn: str | None


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text; the text ends with the last span."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens.

    Attributes:
        input_ids: uint32 [n].
        supervised: bool [n]; the tokens that the model learns to write.
        boundary_tokens: supervised tokens that also hold characters of the prompt.
    """

    input_ids: npt.NDArray[np.uint32]
    supervised: npt.NDArray[np.bool_]
    boundary_tokens: int


class ChatRenderer:
    """Renders and tokenises conversations with one tokenizer.

    Attributes:
        template_source: which template is used, in words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            tokenizer: a fast tokenizer; without a chat template the embedded ChatML is used.

        Raises:
            ValueError: the tokenizer is slow, or the template does not compile.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self.template_source = "the tokenizer's" if tokenizer.chat_template else "embedded ChatML"
        self._embedded = None if tokenizer.chat_template else embedded_template(tokenizer)
        self._templates: dict[bool, str] = {}
        self._special = _special_tokens(tokenizer)
        names = sorted(self._special, key=len, reverse=True)
        any_special = "|".join(map(re.escape, names)) or r"(?!)"
        self._special_pattern = re.compile(any_special)
        self._special_next = re.compile(rf"\s*(?:{any_special})")
        self._control = self._control_tokens()

    def render(self, conversation: Conversation) -> RenderedChat:
        """Renders a conversation up to the end of its last supervised turn.

        Raises:
            ValueError: the template refuses the conversation, drops a part of it, or does not
                show where the answers are; or a content holds a control token.
        """
        self._check_contents(conversation)
        last = max(i for i, message in enumerate(conversation.messages) if message.supervised)
        messages = conversation.messages[: last + 1]
        template = self._template(conversation.tools)
        if _GENERATION.search(template):
            text, spans = self._marked_spans(messages, conversation.tools)
        else:
            text, spans = self._prefix_spans(messages, conversation.tools)
        _check_kept(messages, conversation.tools, spans, text)
        return self._closed(text, spans)

    def tokenize(self, chats: Sequence[RenderedChat]) -> list[Sample]:
        """Tokenises texts, each once and whole.

        Raises:
            ValueError: two BOS tokens, a span without tokens, or an end-of-turn token that the
                tokenizer does not read as one token.
        """
        encoded = self._tokenizer(
            [chat.text for chat in chats],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            self._sample(chat, input_ids, offsets)
            for chat, input_ids, offsets in zip(
                chats, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]

    def _sample(
        self, chat: RenderedChat, input_ids: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> Sample:
        bos = self._tokenizer.bos_token_id
        if bos is not None and list(input_ids[:2]) == [bos, bos]:
            raise ValueError("the text starts with two BOS tokens; remove one from the template")
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        starts = bounds[:, 0]
        # A token without characters of its own belongs to the character at its start.
        ends = np.maximum(bounds[:, 1], starts + 1)
        supervised = np.zeros(len(starts), dtype=np.bool_)
        boundary_tokens = 0
        for span in chat.spans:
            inside = (starts < span.end) & (ends > span.start)
            supervised |= inside
            boundary_tokens += int(np.count_nonzero(inside & (starts < span.start)))
            self._check_span(span, input_ids, inside)
        return Sample(np.asarray(input_ids, dtype=np.uint32), supervised, boundary_tokens)

    def _check_span(
        self, span: Span, input_ids: Sequence[int], inside: npt.NDArray[np.bool_]
    ) -> None:
        positions = np.flatnonzero(inside)
        if not len(positions):
            raise ValueError("the tokenizer gives an answer no tokens at all")
        if span.end_of_turn is not None:
            expected = self._special[span.end_of_turn]
            found = input_ids[positions[-1]]
            if found != expected:
                raise ValueError(
                    f"the end-of-turn token {span.end_of_turn!r} has the id {expected}, but the "
                    f"tokenizer reads the end of an answer as the id {found}"
                )

    def _prefix_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[Span]]:
        text = self._apply(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if not message.supervised:
                continue
            before = self._apply(messages[:i], tools, add_generation_prompt=True)
            until = text if i + 1 == len(messages) else self._apply(messages[: i + 1], tools)
            _check_prefix(before, text, f"turns 1 to {i} with the generation prompt")
            _check_prefix(until, text, f"turns 1 to {i + 1}")
            spans.append(self._span(text, len(before), len(until), message))
        return text, spans

    def _marked_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[Span]]:
        text, marks = self._apply_marked(messages, tools)
        answers = [message for message in messages if message.role == "assistant"]
        if len(marks) != len(answers):
            raise ValueError(
                f"the chat template marks {len(marks)} answers with {{% generation %}}, but the "
                f"conversation has {len(answers)}"
            )
        spans = []
        for (start, end), message in zip(marks, answers, strict=True):
            if not message.supervised:
                continue
            if not self._ends_turn(text[start:end]):
                behind = self._special_next.match(text, end)
                end = behind.end() if behind else end
            spans.append(self._span(text, start, end, message))
        return text, spans

    def _ends_turn(self, segment: str) -> bool:
        """Whether a special token stands at the end of a segment."""
        ends = [match.end() for match in self._special_pattern.finditer(segment)]
        return bool(ends) and not segment[ends[-1] :].strip()

    def _span(self, text: str, start: int, limit: int, message: Message) -> Span:
        """The span of the turn that the template wrote to text[start:limit]."""
        segment = text[start:limit]
        content = message.content.strip()
        found = segment.find(content) if content else -1
        if found >= 0:
            token = self._special_pattern.search(segment, found + len(content))
        else:
            token = None
            for token in self._special_pattern.finditer(segment):  # noqa: B007
                continue
        if token is not None:
            return Span(start, start + token.end(), token[0])
        return Span(start, start + len(segment.rstrip()), None)

    def _closed(self, text: str, spans: Sequence[Span]) -> RenderedChat:
        """Cuts the text behind the last span, and closes that one with EOS if nothing does."""
        last = spans[-1]
        text = text[: last.end]
        if last.end_of_turn is None:
            eos = self._tokenizer.eos_token
            if eos is None:
                raise ValueError(
                    "the chat template ends an answer with no special token and the tokenizer has "
                    "no EOS token, so the model could not learn to stop; add one to either"
                )
            text += eos
            last = Span(last.start, last.end + len(eos), eos)
        return RenderedChat(text, (*spans[:-1], last))

    def _template(self, tools: Sequence[Mapping[str, Any]]) -> str:
        if bool(tools) not in self._templates:
            template = self._embedded or self._tokenizer.get_chat_template(
                None, list(tools) or None
            )
            self._templates[bool(tools)] = freeze_clock(template)
        return self._templates[bool(tools)]

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
    ) -> str:
        return self._run(messages, tools, add_generation_prompt, marked=False)[0]

    def _apply_marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._run(messages, tools, add_generation_prompt=False, marked=True)

    def _run(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        marked: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[[message.as_dict() for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateSyntaxError as error:
            raise TemplateCompileError(
                f"the chat template does not compile, line {error.lineno}: {error}"
            ) from error
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return texts[0], [(int(start), int(end)) for start, end in marks[0]] if marked else []

    def _control_tokens(self) -> tuple[str, ...]:
        """Special tokens that structure a chat: a content that holds one would forge a turn."""
        probe = (Message("user", "a"), Message("assistant", "b"))
        try:
            text = self._apply(probe, ())
        except TemplateCompileError:
            raise
        except ValueError:
            # Templates may demand more than a plain exchange; each row will tell then.
            text = ""
        tokens = self._tokenizer
        ends = [token for token in (tokens.bos_token, tokens.eos_token) if token is not None]
        return tuple(dict.fromkeys([*self._special_pattern.findall(text), *ends]))

    def _check_contents(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages, start=1):
            # The text of a call is its Python form, where such a token looks the same.
            texts = (message.content, *map(str, message.tool_calls))
            for token in self._control:
                if any(token in text for text in texts):
                    raise ValueError(
                        f"turn {number} ({message.role}) contains the control token {token!r}, "
                        "which would be read as the structure of the chat; remove it"
                    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    tokens = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for name, number in (
        (tokenizer.bos_token, tokenizer.bos_token_id),
        (tokenizer.eos_token, tokenizer.eos_token_id),
    ):
        if name is not None and number is not None:
            tokens[name] = number
    return tokens


def _check_prefix(prefix: str, text: str, turns: str) -> None:
    if text.startswith(prefix):
        return
    same = next(
        (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text)
    )
    place = slice(max(0, same - _PLACE_CHARACTERS), same + _PLACE_CHARACTERS)
    raise ValueError(
        "the chat template renders the same turns differently when more follow, so the answers "
        f"cannot be found: {turns} give ...{prefix[place]!r} where the whole conversation gives "
        f"...{text[place]!r} (character {same + 1}). Use a template that keeps earlier turns as "
        "they are, or one with {% generation %}"
    )


def _check_kept(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    spans: Sequence[Span],
    text: str,
) -> None:
    """Raises ValueError where the template left out a turn, a tool, a call or an answer."""
    for number, message in enumerate(messages, start=1):
        kept = message.content.strip() in text
        if message.role in ("system", "developer", "user") and not kept:
            raise ValueError(f"the chat template leaves out turn {number} ({message.role})")
    for name in (tool.get("function", tool).get("name", "") for tool in tools):
        if str(name) not in text:
            raise ValueError(f"the chat template leaves out the tool {name!r}; use one with tools")
    supervised = [message for message in messages if message.supervised]
    for span, message in zip(spans, supervised, strict=True):
        answer = text[span.start : span.end].removesuffix(span.end_of_turn or "")
        for call in message.tool_calls:
            if str(call["function"]["name"]) not in answer:
                raise ValueError(
                    f"the chat template leaves out the tool call {call['function']['name']!r}; "
                    "use a template that writes tool calls"
                )
        if not answer.strip():
            raise ValueError("the chat template renders an answer as nothing")
