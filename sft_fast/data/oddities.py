"""What is read as it stands and yet seldom meant: counted, and named in words.

Nothing here changes what is trained. A chat that ends with the user, or a text with HTML in it, may
be right; whoever did not expect it finds it in `preview`, `data-report` and the log of a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sft_fast.data.conversation import Conversation, Message

OPENING_ROLES = ("system", "developer")
"""Of turns at the start of a conversation that hold for all of it."""
_SPEAKERS = "user|human|assistant|ai|bot|gpt|chatgpt|question|answer|q|a"
# A needle that most texts lack, what it is part of, and how that is called.
_TEXTS = (
    ("&", re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{2,6}|#x[0-9a-fA-F]{2,6});"), "HTML"),
    ("<", re.compile(r"</?(?:br|p|div|span|li|ul|strong|em)\b[^<>]*>", re.IGNORECASE), "HTML"),
    (
        "<",
        re.compile(r"<\|[a-z_]{2,30}\|>|</?s>|<(?:start|end)_of_turn>"),
        "control tokens as text",
    ),
    ("[", re.compile(r"\[/?INST\]|<</?SYS>>"), "control tokens as text"),
    (
        "###",
        re.compile(r"^### ?(?:instruction|response|input|human|assistant|user)\b", re.I | re.M),
        "headings of a prompt template",
    ),
    (
        ":",
        re.compile(rf"(?:^|\n\n)(?:{_SPEAKERS}) ?:\s", re.IGNORECASE),
        "speakers' names in a text",
    ),
    ("data:image/", re.compile("data:image/[a-z]+;base64,"), "an image as text"),
    ("\r", re.compile("\r"), "carriage returns"),
)
_BEYOND_ASCII = (
    (re.compile("\N{REPLACEMENT CHARACTER}"), "characters that were lost in decoding"),
    # UTF-8 that was read as Latin-1 or Windows-1252.
    (
        re.compile("\u00c3[\u0080-\u00bf]|\u00c2[\u00a0-\u00bf]|\u00e2\u20ac|\u00ef\u00bb\u00bf"),
        "characters in the wrong encoding",
    ),
    (re.compile("[\u200b\u2060\ufeff]"), "invisible characters"),
)
_LIST = re.compile(r"""\[\s*(?:'.*'|".*")\s*\]|(?:array|Series|DataFrame)\(.*\)""", re.DOTALL)
_PLACEHOLDERS = frozenset(("nan", "none", "null", "n/a", "undefined", "todo", "tbd", "...", "[]"))
_LONGEST_PLACEHOLDER = max(map(len, _PLACEHOLDERS))


def find_oddities(conversation: Conversation) -> tuple[str, ...]:
    """Names of what is seldom meant in a conversation, each once."""
    found: dict[str, None] = dict.fromkeys(_in_order(conversation.messages))
    for message in conversation.messages:
        found |= dict.fromkeys(_in_text(message.content))
        if message.role == "assistant":
            found |= dict.fromkeys(_in_answer(message.content))
    if conversation.text is not None:
        found |= dict.fromkeys(_in_text(conversation.text))
    return tuple(found)


def _in_order(messages: Sequence[Message]) -> Iterator[str]:
    """What is odd about who speaks when."""
    turns = [turn for turn in messages if turn.role not in OPENING_ROLES]
    if not turns:
        return
    if turns[0].role == "assistant":
        yield "chats that begin with the assistant"
    if turns[-1].role != "assistant":
        yield f"chats that end with the {turns[-1].role}"
    opening = [turn.role for turn in messages[: messages.index(turns[0])]]
    if len(opening) + len(turns) < len(messages):
        yield "a system turn inside of a chat"
    if len(set(opening)) < len(opening):
        yield "two system turns in front of a chat"
    for turn, after in zip(turns, turns[1:], strict=False):
        if turn.role == after.role == "user":
            yield "two turns of the user in a row"
        elif turn.role == after.role == "assistant" and "channel" not in turn.extra:
            yield "two turns of the assistant in a row"
        elif after.role == "assistant" and turn.content == after.content and turn.content:
            yield "an answer that repeats its question"


def _in_text(text: str) -> Iterator[str]:
    for needle, pattern, name in _TEXTS:
        if needle in text and pattern.search(text):
            yield name
    if "\\n" in text and "\n" not in text:
        yield r"\n as two characters in a text without line breaks"
    if not text.isascii():
        for pattern, name in _BEYOND_ASCII:
            if pattern.search(text):
                yield name


def _in_answer(text: str) -> Iterator[str]:
    if len(text) <= _LONGEST_PLACEHOLDER + 2 and text.strip().lower() in _PLACEHOLDERS:
        yield "an answer that is a placeholder, as 'nan'"
    if text.endswith(("]", ")")) and _LIST.fullmatch(text):
        yield "an answer that is a list in Python's notation"
