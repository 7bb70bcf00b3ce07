"""Questions with known answers, from the rows of an evaluation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_rows import BadRow, Row
from sft_fast.data.source import Source


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what it should say."""

    row: Row
    turns: list[dict[str, Any]]
    """Messages up to the answer, as a chat template takes them."""
    tools: list[dict[str, Any]]
    """JSON schemas of the tools on offer."""
    answer: str


def read_questions(sources: Sequence[Source], count: int) -> list[Question]:
    """The first `count` questions: of each row its last answer in words, with what led to it.

    Rows that cannot be used, texts without turns and rows that only call tools are passed over; the
    token store has counted the first kind already.
    """
    return list(islice(_questions(sources), count))


def _questions(sources: Sequence[Source]) -> Iterator[Question]:
    for source in sources:
        reader = ConversationReader(source.format_name, source.fields)
        for row in source.rows.scan():
            if isinstance(row, BadRow):
                continue
            try:
                chat = reader(row)
            except ValueError:
                continue
            turns = list(chat.messages)
            while turns and (turns[-1].role != "assistant" or turns[-1].tool_calls):
                turns.pop()
            if len(turns) > 1:
                before = [turn.as_dict() for turn in turns[:-1]]
                tools = [dict(tool) for tool in chat.tools]
                yield Question(row, before, tools, turns[-1].content)
