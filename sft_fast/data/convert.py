"""Any source to a JSON Lines file of messages, which the format `messages` reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_fast.data.conversation import Conversation
from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_rows import BadRow
from sft_fast.data.source import Source
from sft_fast.files import write_atomically


def convert(source: Source, path: str | Path, skip_bad_rows: bool = False) -> tuple[int, int]:
    """Writes the conversations of a source, one a line; the file appears when it is complete.

    Args:
        source: the rows and how to read them.
        path: a .jsonl file, which must not exist.
        skip_bad_rows: lists rows that cannot be used in `<path>.rejected` instead of stopping.

    Returns: rows written, rows rejected.

    Raises:
        ValueError: the file exists, a row cannot be used, or none is left.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; name another file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = ConversationReader(source.format_name, source.fields)
    rejected: list[str] = []
    written = 0
    with write_atomically(path) as file:
        for row in source.rows.scan():
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.message)
                values = messages_row(reader(row))
            except ValueError as error:
                if not skip_bad_rows:
                    raise
                rejected.append(str(error))
                continue
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            written += 1
        if not written:
            raise ValueError(f"no row of {source.rows.name} can be used, the first: {rejected[0]}")
        if rejected:
            listed = path.with_name(path.name + ".rejected")
            listed.write_text("\n".join(rejected) + "\n", encoding="utf-8")
    return written, len(rejected)


def messages_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a row of the format `messages`, or of `text`."""
    if conversation.text is not None:
        return {"text": conversation.text}
    turns = []
    for message in conversation.messages:
        turn = message.as_dict()
        if message.role == "assistant":
            turn |= {} if message.train else {"train": False}
            turn |= {} if message.weight in (0, 1) else {"weight": message.weight}
        turns.append(turn)
    tools = [dict(tool) for tool in conversation.tools]
    return {"messages": turns} | ({"tools": tools} if tools else {})
