"""From a conversation to its text and the characters that are supervised.

A conversation is rendered by the chat template, tokenised once (tokens.py), and which characters
are supervised is decided on the text. The rules:

1. An assistant turn's span starts where the text of the turns before it, rendered with the
   generation prompt, ends: there the model starts to write. It ends with the end-of-turn token, the
   special token that ends the turn; of neighbours (<|END_RESPONSE|><|END_OF_TURN_TOKEN|>) the last
   one. Template text behind that token (a newline) is not supervised, nor is an EOS token that
   stands behind the last turn only.
2. Both ends are proven (turn_bounds.py). A template for which that fails is refused, or, with
   `changing_history="expand"`, every answer becomes a sample of its own, with its own history.
   Where the template marks the answers itself ({% generation %}), its marks are used instead, and
   extended over the end-of-turn token.
3. The text is cut behind the last supervised span: with causal attention nothing behind it has a
   gradient. Where the template writes no end-of-turn token there, the EOS token is put there.
4. Reasoning that is not trained is context: the span then starts behind the tag that ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from sft_fast.data.channels import TurnParts, behind_reasoning
from sft_fast.data.choices import ChangingHistory, TrainOn
from sft_fast.data.conversation import Conversation, GivenTokens, Message, Segment
from sft_fast.data.kept import TemplateKeys, check_kept
from sft_fast.data.template_limits import TemplateLimits, check_length
from sft_fast.data.templates import fitted_template, freeze_clock
from sft_fast.data.tokens import RenderedChat, Sample, Span, TextTokenizer
from sft_fast.data.turn_bounds import TurnBounds, UnstableTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "MaskOptions", "RenderedChat", "Sample", "Span"]

OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversations")
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateCompileError(ValueError):
    """A chat template that is not valid Jinja."""


class TemplateTypeError(ValueError):
    """A chat template that does to a value what its type does not allow."""


@dataclass(frozen=True)
class MaskOptions:
    """What is supervised.

    Attributes:
        train_on: every assistant turn, or the last one that is trained at all.
        train_tool_calls: whether assistant turns with tool calls are supervised.
        train_reasoning: whether the reasoning in front of an answer is.
        trim_tail: cuts off what follows the last supervised token. Without effect on the loss of a
            dense model; not so where a loss counts every token (MoE balance, MTP).
        changing_history: what happens to a conversation whose template rewrites earlier answers:
            "error", or "expand" to one sample per answer.
    """

    train_on: TrainOn = "all_turns"
    train_tool_calls: bool = True
    train_reasoning: bool = True
    trim_tail: bool = True
    changing_history: ChangingHistory = "error"

    def __post_init__(self) -> None:
        for name, kind in (("train_on", TrainOn), ("changing_history", ChangingHistory)):
            if getattr(self, name) not in get_args(kind):
                found, allowed = getattr(self, name), ", ".join(get_args(kind))
                raise ValueError(f"{name} is {found!r}; expected one of {allowed}")


@dataclass(frozen=True)
class TemplateContext:
    """What a chat template is given beside the turns.

    Attributes:
        tools: the tools on offer.
        options: variables of the record's own, e.g. enable_thinking.

    Raises:
        ValueError: an option has the name of something that every template is given.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = OWN_VARIABLES.intersection(self.options)
        if taken:
            raise ValueError(
                f"'chat_template_kwargs' sets {sorted(taken)[0]!r}, which the run sets itself; "
                "remove it"
            )

    @cached_property
    def key(self) -> str:
        """What tells this context from another."""
        return repr(self)


NO_CONTEXT = TemplateContext()


def _context(conversation: Conversation) -> TemplateContext:
    """What the template is given beside the turns of a conversation."""
    if not conversation.tools and not conversation.template_options:
        return NO_CONTEXT
    return TemplateContext(conversation.tools, conversation.template_options)


class ChatRenderer:
    """Renders and tokenises conversations with one tokenizer.

    Attributes:
        template_source: which template is used, in words.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: MaskOptions | None = None
    ) -> None:
        """
        Args:
            tokenizer: a fast tokenizer; without a chat template the embedded ChatML is used.
            options: what is supervised.

        Raises:
            ValueError: the tokenizer is slow, or the template does not compile.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._options = options or MaskOptions()
        has_template = bool(tokenizer.chat_template)
        self.template_source = "the tokenizer's" if has_template else "embedded ChatML"
        self._embedded = None if has_template else fitted_template("chatml", tokenizer)
        self._templates: dict[bool, str] = {}
        self._bounds: dict[str, TurnBounds] = {}
        self._keys_of: dict[str, TemplateKeys] = {}
        self._parts: dict[str, TurnParts] = {}
        self._has_eos_behind_all: dict[str, bool] = {}
        self._special = _special_tokens(tokenizer)
        self._token_of_name = dict(tokenizer.special_tokens_map)
        self._text_tokenizer = TextTokenizer(tokenizer, self._special)
        self._special_names = tuple(sorted(self._special, key=len, reverse=True))
        any_special = "|".join(map(re.escape, self._special_names)) or r"(?!)"
        self._special_pattern = re.compile(any_special)
        self._special_next = re.compile(rf"\s*(?:{any_special})")
        self._control = self._control_tokens()

    def render(self, conversation: Conversation) -> RenderedChat:
        """Renders a conversation up to the end of its last supervised turn.

        Raises:
            ValueError: the template refuses the conversation, drops a part of it, or does not
                show where the answers are; a content holds a control token; or nothing is left to
                supervise.
        """
        if conversation.text is not None:
            return self._plain_text(conversation.text)
        if conversation.segments:
            return _joined(conversation.segments)
        if conversation.tokens is not None:
            return self._given_tokens(conversation.tokens)
        conversation = self.fitted(conversation)
        self._check_contents(conversation)
        answers = self._answers(conversation.messages)
        stop = answers[-1] + 1 if self._options.trim_tail else len(conversation.messages)
        messages = conversation.messages[:stop]
        context = _context(conversation)
        try:
            text, spans = self._spans(messages, answers, context)
        except TemplateTypeError:
            if not any(message.tool_calls for message in messages):
                raise
            # A template that joins texts wants the arguments of a call as one.
            text, spans = self._spans(_with_text_arguments(messages), answers, context)
        self._keys(context).check(messages, answers)
        check_kept(messages, answers, context.tools, spans, text)
        if not self._options.train_reasoning:
            spans = [
                behind_reasoning(span, text, messages[number], self._special_next)
                for number, span in zip(answers, spans, strict=True)
            ]
        return self._closed(text, spans, len(conversation.messages) - stop)

    def fitted(self, conversation: Conversation) -> Conversation:
        """The conversation in turns that the chat template reads, see `TurnParts`."""
        if not any(message.extra for message in conversation.messages):
            return conversation
        template = self._template(TemplateContext(conversation.tools))
        if template not in self._parts:
            self._parts[template] = TurnParts(template)
        return replace(conversation, messages=self._parts[template].fit(conversation.messages))

    def unread_keys(self, conversation: Conversation) -> tuple[str, ...]:
        """What the chat template does not read: "key of turns", "variable of the template"."""
        options = conversation.template_options
        if not options and not any(message.extra for message in conversation.messages):
            return ()
        conversation = self.fitted(conversation)
        keys = self._keys(TemplateContext(conversation.tools))
        unread = [f"{key} of turns" for key in keys.unread(conversation.messages)]
        has_template = bool(conversation.messages)
        unread += [
            f"{name} of the template"
            for name in sorted(options)
            if not (has_template and keys.names(name))
        ]
        return tuple(unread)

    def render_samples(self, conversation: Conversation) -> list[RenderedChat]:
        """Renders a conversation to the one sample it is, or to one per answer (`expand`).

        Raises:
            ValueError: as `render`.
        """
        conversation = self.fitted(conversation)
        try:
            return [self.render(conversation)]
        except UnstableTemplateError:
            if self._options.changing_history == "error":
                raise
        return [self.render(part) for part in self.one_per_answer(conversation)]

    def one_per_answer(self, conversation: Conversation) -> list[Conversation]:
        """Each answer that is trained with the turns before it, and alone to be trained."""
        numbers = self._answers(conversation.messages)
        turns = [conversation.messages[: number + 1] for number in numbers]
        return [replace(conversation, messages=_only_last(part)) for part in turns]

    def with_options(self, conversation: Conversation) -> Conversation:
        """The conversation with the turns to be trained that the options leave: of a part of it the
        same turns are trained as of the whole.

        Raises:
            ValueError: they leave none.
        """
        answers = self._answers(conversation.messages)
        turns = tuple(
            replace(turn, train=number in answers)
            for number, turn in enumerate(conversation.messages)
        )
        return replace(conversation, messages=turns)

    def tokenize(self, chats: Sequence[RenderedChat]) -> list[Sample]:
        """Tokenises texts, each once and whole.

        Raises:
            ValueError: two BOS tokens, a span without tokens, or an end-of-turn token that the
                tokenizer does not read as one token.
        """
        return self._text_tokenizer(chats)

    def _answers(self, messages: Sequence[Message]) -> list[int]:
        """Numbers of the turns to supervise."""
        numbers = [
            number
            for number, message in enumerate(messages)
            if message.supervised and (self._options.train_tool_calls or not message.tool_calls)
        ]
        if not numbers:
            raise ValueError(
                "every assistant turn is a tool call, and data.train_tool_calls is false, so there "
                "is nothing to learn from"
            )
        return numbers[-1:] if self._options.train_on == "last_turn" else numbers

    def _plain_text(self, text: str) -> RenderedChat:
        """A text from BOS, if the tokenizer puts one, to EOS, all of it supervised but BOS."""
        tokenizer = self._tokenizer
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        puts_bos = bos is not None and [tokenizer.bos_token_id] == list(
            tokenizer("a")["input_ids"][:1]
        )
        start = bos if puts_bos and bos is not None else ""
        text = start + text.removeprefix(start)
        if eos is not None and not text.endswith(eos):
            text += eos
        return RenderedChat(text, (Span(len(start), len(text), eos),))

    def _given_tokens(self, given: GivenTokens) -> RenderedChat:
        """Tokens that the source holds, if all of them are in the vocabulary."""
        size = len(self._tokenizer)
        outside = next((token for token in given.input_ids if not 0 <= token < size), None)
        if outside is not None:
            raise ValueError(
                f"input_ids holds {outside}, and the tokenizer has {size} tokens; it was made with "
                "another tokenizer"
            )
        ids = np.array(given.input_ids, dtype=np.uint32)
        return RenderedChat("", (), sample=Sample(ids, np.array(given.trained, dtype=np.bool_), 0))

    def _spans(
        self,
        messages: Sequence[Message],
        answers: Sequence[int],
        context: TemplateContext,
    ) -> tuple[str, list[Span]]:
        if _GENERATION.search(self._template(context)):
            return self._marked_spans(messages, answers, context)
        return self._proven_spans(messages, answers, context)

    def _proven_spans(
        self,
        messages: Sequence[Message],
        answers: Sequence[int],
        context: TemplateContext,
    ) -> tuple[str, list[Span]]:
        template = self._template(context)
        if template not in self._bounds:
            self._bounds[template] = TurnBounds(template, self._tokenizer.eos_token)
        text, bounds = self._bounds[template].find(
            messages,
            answers,
            context.key,
            lambda turns, prompt: self._apply(turns, context, prompt),
        )
        stop = len(text)
        if bounds[-1][1] == stop and self._writes_eos_behind_all(template, context):
            stop -= len(str(self._tokenizer.eos_token))
        spans = [
            self._span(text, start, min(limit, stop), messages[number])
            for number, (start, limit) in zip(answers, bounds, strict=True)
        ]
        return text, spans

    def _writes_eos_behind_all(self, template: str, context: TemplateContext) -> bool:
        """Whether the EOS token that ends a rendered chat is a part of no turn."""
        if template not in self._has_eos_behind_all:
            turns = (Message("user", "a"), Message("assistant", "b"))
            eos, alone, more = self._tokenizer.eos_token or "", "", ""
            # One that demands more than a plain exchange is taken at its word.
            with suppress(ValueError):
                alone, more = self._apply(turns, context), self._apply((*turns, turns[0]), context)
            rest = alone.removesuffix(eos)
            self._has_eos_behind_all[template] = (
                rest != alone
                and more.startswith(rest)
                and not more.startswith(alone)
                and self._closing(rest) is not None
            )
        return self._has_eos_behind_all[template]

    def _marked_spans(
        self,
        messages: Sequence[Message],
        answers: Sequence[int],
        context: TemplateContext,
    ) -> tuple[str, list[Span]]:
        text, marks = self._apply_marked(messages, context)
        turns = [number for number, turn in enumerate(messages) if turn.role == "assistant"]
        if len(marks) != len(turns):
            raise ValueError(
                f"the chat template marks {len(marks)} answers with {{% generation %}}, but the "
                f"conversation has {len(turns)}"
            )
        spans = []
        for (start, end), number in zip(marks, turns, strict=True):
            if number not in answers:
                continue
            if not self._ends_turn(text[start:end]):
                behind = self._special_next.match(text, end)
                end = behind.end() if behind else end
            spans.append(self._span(text, start, end, messages[number]))
        return text, spans

    def _ends_turn(self, segment: str) -> bool:
        """Whether a special token stands at the end of a segment."""
        ends = [match.end() for match in self._special_pattern.finditer(segment)]
        return bool(ends) and not segment[ends[-1] :].strip()

    def _span(self, text: str, start: int, limit: int, message: Message) -> Span:
        """The span of the turn that the template wrote to text[start:limit]."""
        segment = text[start:limit]
        found = self._end_of_turn(segment, message)
        if found is None:
            return Span(start, start + len(segment.rstrip()), None, message.weight)
        place, token = found
        return Span(start, start + place + len(token), token, message.weight)

    def _end_of_turn(self, segment: str, message: Message) -> tuple[int, str] | None:
        """Place and name of the special token that ends a turn.

        Special tokens may stand inside of a turn: around calls, behind reasoning.
        """
        content = message.content.strip()
        place = segment.rfind(content)
        found: re.Match[str] | None = None
        if message.tool_calls or not content or place < 0:
            for found in self._special_pattern.finditer(segment):  # noqa: B007
                continue
        elif not content.endswith(self._special_names) and (end := self._closing(segment)):
            return end
        else:
            # A special token ends the content itself, or template text follows the turn's last one.
            found = self._special_pattern.search(segment, place + len(content))
        return None if found is None else (found.start(), found[0])

    def _closing(self, segment: str) -> tuple[int, str] | None:
        """The special token that ends a text.

        Of several with white space in between the first one: only white space follows the answer.
        Of neighbours the last one.
        """
        found, end = None, len(segment.rstrip())
        is_neighbour = False
        while segment.endswith(self._special_names, 0, end):
            name = next(name for name in self._special_names if segment.endswith(name, 0, end))
            if not is_neighbour:
                found = (end - len(name), name)
            start = end - len(name)
            end = len(segment[:start].rstrip())
            is_neighbour = end == start
        return found

    def _closed(self, text: str, spans: Sequence[Span], trimmed_turns: int) -> RenderedChat:
        """Cuts the text behind the last span, and closes that one with EOS if nothing does."""
        last = spans[-1]
        tail = "" if self._options.trim_tail else text[last.end :]
        text = text[: last.end]
        if last.end_of_turn is None:
            eos = self._tokenizer.eos_token
            if eos is None:
                raise ValueError(
                    "the chat template ends an answer with no special token and the tokenizer has "
                    "no EOS token, so the model could not learn to stop; add one to either"
                )
            text += eos
            last = Span(last.start, last.end + len(eos), eos, last.weight)
        return RenderedChat(text + tail, (*spans[:-1], last), trimmed_turns)

    def _template(self, context: TemplateContext) -> str:
        has_tools = bool(context.tools)
        if has_tools not in self._templates:
            template = self._embedded or self._tokenizer.get_chat_template(
                None, list(context.tools) or None
            )
            self._templates[has_tools] = freeze_clock(template)
        return self._templates[has_tools]

    def _keys(self, context: TemplateContext) -> TemplateKeys:
        template = self._template(context)
        if template not in self._keys_of:
            self._keys_of[template] = TemplateKeys(template)
        return self._keys_of[template]

    def _apply(
        self,
        messages: Sequence[Message],
        context: TemplateContext,
        add_generation_prompt: bool = False,
    ) -> str:
        return self._run(messages, context, add_generation_prompt, marked=False)[0]

    def _apply_marked(
        self, messages: Sequence[Message], context: TemplateContext
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._run(messages, context, add_generation_prompt=False, marked=True)

    def _run(
        self,
        messages: Sequence[Message],
        context: TemplateContext,
        add_generation_prompt: bool,
        marked: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [message.as_dict() for message in messages]
        try:
            with TemplateLimits():
                texts, marks = render_jinja_template(
                    conversations=[conversation],
                    tools=[dict(tool) for tool in context.tools] or None,
                    chat_template=self._template(context),
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._token_of_name, **context.options},
                )
        except TemplateSyntaxError as error:
            raise TemplateCompileError(
                f"the chat template does not compile, line {error.lineno}: {error}"
            ) from error
        except TypeError as error:
            raise TemplateTypeError(_refusal(error, messages)) from error
        except TemplateError as error:
            raise ValueError(_refusal(error, messages)) from error
        check_length(texts[0], (conversation, context))
        return texts[0], [(int(start), int(end)) for start, end in marks[0]] if marked else []

    def _control_tokens(self) -> tuple[str, ...]:
        """Special tokens that structure a chat: a content that holds one would forge a turn."""
        probe = (Message("user", "a"), Message("assistant", "b"))
        try:
            text = self._apply(probe, TemplateContext())
        except TemplateCompileError:
            raise
        except ValueError:
            # Templates may demand more than a plain exchange; each record will tell then.
            text = ""
        tokens = self._tokenizer
        ends = [token for token in (tokens.bos_token, tokens.eos_token) if token is not None]
        return tuple(dict.fromkeys([*self._special_pattern.findall(text), *ends]))

    def _check_contents(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages, start=1):
            text = message.content
            if message.tool_calls:
                # The text of a call is its Python form, where such a token looks the same.
                text = "\0".join((text, *map(str, message.tool_calls)))
            for token in self._control:
                if token in text:
                    raise ValueError(
                        f"turn {number} ({message.role}) contains the control token {token!r}, "
                        "which would be read as the structure of the chat; remove it"
                    )


def _refusal(error: Exception, messages: Sequence[Message]) -> str:
    """What is said of a conversation that a template refuses, and what is unusual about it."""
    roles = [message.role for message in messages if message.role not in ("system", "developer")]
    text = f"the chat template refuses the conversation: {error}"
    if roles[:1] == ["assistant"]:
        return f"{text} (it begins with the assistant: remove that turn, or put a question before)"
    for first, second in zip(roles, roles[1:], strict=False):
        if first == second != "tool":
            return f"{text} (two turns of the {first} follow each other: join them)"
    return text


def _with_text_arguments(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns whose calls have their arguments as JSON text."""

    def as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return tuple(
        replace(message, tool_calls=tuple(as_text(call) for call in message.tool_calls))
        for message in messages
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


def _joined(segments: Sequence[Segment]) -> RenderedChat:
    """Segments one after another, as they are; neighbours that are trained are one span."""
    text = ""
    spans: list[Span] = []
    for segment in segments:
        start, text = len(text), text + segment.text
        if segment.train and segment.text:
            if spans and spans[-1].end == start:
                start = spans.pop().start
            spans.append(Span(start, len(text), None))
    return RenderedChat(text, tuple(spans))


def _only_last(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns with the last one alone to be trained."""
    return (*(replace(turn, train=False) for turn in turns[:-1]), turns[-1])
