"""What is read as it stands and yet seldom meant: counted, and named in words.

Nothing here changes what is trained. A chat that ends with the user, or a text with HTML in it, may
be right; whoever did not expect it finds it in `preview`, `data-report` and the log of a run.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

from sft_fast.data.conversation import OPENING_ROLES, Conversation

_SPEAKERS = "user|human|assistant|ai|bot|gpt|chatgpt|question|answer|q|a"
# A needle that most texts lack, what it is part of, and how that is called. A pattern begins with
# a literal character, which is found faster.
_TEXTS = (
    ("&", re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{2,6}|#x[0-9a-fA-F]{2,6});"), "HTML"),
    ("<", re.compile(r"</?(?i:br|p|div|span|li|ul|strong|em)\b[^<>]*>"), "HTML"),
    (
        "<",
        re.compile(r"<(?:\|[a-z_]{2,30}\||/?s|(?:start|end)_of_turn)>"),
        "control tokens as text",
    ),
    ("[", re.compile(r"\[/?INST\]"), "control tokens as text"),
    (
        "###",
        re.compile(r"### ?(?i:instruction|response|input|human|assistant|user)\b"),
        "headings of a prompt template",
    ),
    ("\n\n", re.compile(rf"\n\n(?i:{_SPEAKERS}) ?:\s"), "speakers' names in a text"),
    ("data:image/", re.compile("data:image/[a-z]+;base64,"), "an image as text"),
    ("\r", re.compile("\r"), "carriage returns"),
)
_SPEAKER = re.compile(rf"(?i:{_SPEAKERS}) ?:\s")
_LONGEST_SPEAKER = 12
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
    messages = conversation.messages
    roles = tuple(
        "channel" if message.extra and "channel" in message.extra else message.role
        for message in messages
    )
    found = [*_of_order(roles)]
    for message in messages:
        _add_text(message.content, found)
        if message.role == "assistant":
            _add_answer(message.content, found)
    for turn, after in pairwise(messages):
        if turn.content == after.content and (turn.role, after.role) == ("user", "assistant"):
            found.append("an answer that repeats its question")
    if conversation.text is not None:
        _add_text(conversation.text, found)
    return tuple(dict.fromkeys(found)) if found else ()


@lru_cache(maxsize=4096)
def _of_order(roles: tuple[str, ...]) -> tuple[str, ...]:
    """What is odd about who speaks when; "channel" is a turn of the assistant or of a tool."""
    found = []
    first = next((n for n, role in enumerate(roles) if role not in OPENING_ROLES), None)
    if first is None:
        return ()
    if len(set(roles[:first])) < first:
        found.append("two system turns in front of a chat")
    turns = [role for role in roles[first:] if role not in OPENING_ROLES]
    if len(turns) < len(roles) - first:
        found.append("a system turn inside of a chat")
    if turns[0] == "assistant":
        found.append("chats that begin with the assistant")
    if turns[-1] not in ("assistant", "channel"):
        found.append(f"chats that end with the {turns[-1]}")
    found += [
        f"two turns of the {role} in a row"
        for role, after in pairwise(turns)
        if role == after and role in ("user", "assistant")
    ]
    return tuple(found)


def _add_text(text: str, found: list[str]) -> None:
    for needle, pattern, name in _TEXTS:
        if needle in text and pattern.search(text):
            found.append(name)
    if ":" in text[:_LONGEST_SPEAKER] and _SPEAKER.match(text):
        found.append("speakers' names in a text")
    if "\\n" in text and "\n" not in text:
        found.append(r"\n as two characters in a text without line breaks")
    if not text.isascii():
        found += [name for pattern, name in _BEYOND_ASCII if pattern.search(text)]


def _add_answer(text: str, found: list[str]) -> None:
    if len(text) <= _LONGEST_PLACEHOLDER + 2 and text.strip().lower() in _PLACEHOLDERS:
        found.append("an answer that is a placeholder, as 'nan'")
    if text.endswith(("]", ")")) and _LIST.fullmatch(text):
        found.append("an answer that is a list in Python's notation")
