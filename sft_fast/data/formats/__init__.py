"""From a record to a conversation: the formats that come with sft_fast, and their reader.

Formats are asked for "auto" in the order of these imports, and in each file from top to bottom.
"""

from sft_fast.data.format_registry import (
    detect_format,
    format_names,
    get_format,
    load_format,
    register_format,
    register_row_function,
)
from sft_fast.data.formats import (  # noqa: F401
    chats,
    pairs,  # noqa: F401 (behind chats: a chat may repeat its question)
    texts,
)
from sft_fast.data.formats.reader import ConversationReader, FileFormat, read_conversations

__all__ = [
    "ConversationReader",
    "FileFormat",
    "detect_format",
    "format_names",
    "get_format",
    "load_format",
    "read_conversations",
    "register_format",
    "register_row_function",
]
