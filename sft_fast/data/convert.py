"""Any source to a JSON Lines file of messages, which the format `messages` reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_fast.constants import IGNORE_INDEX
from sft_fast.data.conversation import Conversation
from sft_fast.data.formats import ConversationReader
from sft_fast.data.json_records import BadRecord
from sft_fast.data.source import Source
from sft_fast.data.table_values import as_json
from sft_fast.files import write_atomically


def convert(source: Source, path: str | Path, skip_bad_records: bool = False) -> tuple[int, int]:
    """Writes the conversations of a source, one a line; the file appears when it is complete.

    Args:
        source: the records and how to read them.
        path: a .jsonl file, which must not exist.
        skip_bad_records: lists records that cannot be used in `<path>.rejected` and goes on.

    Returns: records written, records rejected.

    Raises:
        ValueError: the file exists, a record cannot be used, or none is left.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; name another file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = ConversationReader(source.format_name, source.fields)
    rejected: list[str] = []
    written = 0
    with write_atomically(path) as file:
        for record in source.records.scan():
            try:
                if isinstance(record, BadRecord):
                    raise ValueError(record.message)
                values = messages_record(reader(record))
                line = json_line(values, record.origin)
            except ValueError as error:
                if not skip_bad_records:
                    raise
                rejected.append(str(error))
                continue
            file.write(line)
            written += 1
        if not written:
            raise ValueError(
                f"no record of {source.records.name} can be used, the first: {rejected[0]}"
            )
        if rejected:
            listed = path.with_name(path.name + ".rejected")
            listed.write_text("\n".join(rejected) + "\n", encoding="utf-8")
    return written, len(rejected)


def json_line(values: dict[str, Any], origin: str) -> str:
    """A line of JSON; ValueError, which begins with `origin`, where a value has no form in JSON."""
    try:
        return json.dumps(values, ensure_ascii=False, default=as_json) + "\n"
    except TypeError as error:
        raise ValueError(f"{origin}: {error}; leave that key or column out") from None


def messages_record(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a record of the format `messages`, `text`, `segments` or `tokens`."""
    if conversation.text is not None:
        return {"text": conversation.text}
    if conversation.segments:
        parts = [{"label": part.train, "text": part.text} for part in conversation.segments]
        return {"segments": parts}
    if conversation.tokens is not None:
        ids, trained = conversation.tokens.input_ids, conversation.tokens.trained
        pairs = zip(ids, trained, strict=True)
        labels = [token if is_trained else IGNORE_INDEX for token, is_trained in pairs]
        return {"input_ids": list(ids), "labels": labels}
    turns = []
    for message in conversation.messages:
        turn = message.as_dict()
        if message.role == "assistant":
            turn |= {} if message.train else {"train": False}
            turn |= {} if message.weight in (0, 1) else {"weight": message.weight}
        turns.append(turn)
    tools = [dict(tool) for tool in conversation.tools]
    values: dict[str, Any] = {"messages": turns}
    if tools:
        values["tools"] = tools
    if conversation.template_options:
        values["chat_template_kwargs"] = dict(conversation.template_options)
    return values
