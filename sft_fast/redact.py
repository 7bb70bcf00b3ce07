"""Keeps secrets out of what a run writes."""

import os
import re
from typing import Any

PLACEHOLDER = "[redacted]"
# Tokens of Hugging Face, OpenAI-like services and GitHub; user:password in a URL. Not 40
# hexadecimal digits: keys of wandb are, and commits too.
PATTERNS = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
)
SECRET_NAME = re.compile(r"(^|_)(api_?key|token|secret|password|passwd)($|_)", re.IGNORECASE)
SHORTEST_SECRET = 6


def redact(text: str) -> str:
    """`text` without anything that looks like a secret, or is one in the environment."""
    for name, value in os.environ.items():
        is_secret = SECRET_NAME.search(name) and not name.endswith(("_PATH", "_FILE", "_DIR"))
        if is_secret and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, PLACEHOLDER)
    for pattern in PATTERNS:
        text = pattern.sub(PLACEHOLDER, text)
    return text


def redact_values(value: Any) -> Any:
    """`redact` for every text inside mappings and lists."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_values(item) for item in value]
    return value
