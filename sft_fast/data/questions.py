"""Questions with known answers, from the records of an evaluation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_records import BadRecord, SourceRecord
from sft_fast.data.source import Source


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what it should say."""

    record: SourceRecord
    turns: list[dict[str, Any]]
    """Messages up to the answer, as a chat template takes them."""
    tools: list[dict[str, Any]]
    """JSON schemas of the tools on offer."""
    answer: str


def read_questions(sources: Sequence[Source], count: int) -> list[Question]:
    """The first `count` questions: of each record its last answer in words, with what led to it.

    Records that cannot be used, texts without turns and records that only call tools are passed
    over; the token store has counted the first kind already.
    """
    return list(islice(_questions(sources), count))


def _questions(sources: Sequence[Source]) -> Iterator[Question]:
    for source in sources:
        reader = ConversationReader(source.format_name, source.fields)
        for record in source.records.scan():
            if isinstance(record, BadRecord):
                continue
            try:
                chat = reader(record)
            except ValueError:
                continue
            turns = list(chat.messages)
            while turns and (turns[-1].role != "assistant" or turns[-1].tool_calls):
                turns.pop()
            if len(turns) > 1:
                before = [turn.as_dict() for turn in turns[:-1]]
                tools = [dict(tool) for tool in chat.tools]
                yield Question(record, before, tools, turns[-1].content)
