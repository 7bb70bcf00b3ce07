"""Error messages on a terminal: wrapped at words, in colours for dark and light backgrounds."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from typing import Any, TextIO

# What errors.Problem writes: "  found:    ...".
PART = re.compile(r"(  (?:found|expected|fix): +)(.*)")
# Characters that a terminal obeys, and those that turn the direction of writing; colours alone are
# taken for our own.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
BOLD, RED, GREEN, RESET = "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[0m"


def printable(text: str) -> str:
    """A text from a file, a model or a name, with what a terminal would obey as escapes."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


class PrintableStream:
    """Standard output or error that lets text and colours through, and nothing else.

    Names of files and columns, and what is quoted of data, come from other people.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text; returns how many characters it had."""
        parts = COLOUR.split(text)
        parts[::2] = [printable(part) for part in parts[::2]]
        self._stream.write("".join(parts))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def has_colours(stream: TextIO) -> bool:
    """Whether `stream` shows colours: not a file or pipe, nor against NO_COLOR (no-color.org)."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def as_seen(text: str, stream: TextIO) -> str:
    """The text of an error, wrapped and coloured for a terminal."""
    text = printable(text)
    if not stream.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 40)
    is_of_problems = PART.search(text) is not None
    lines = []
    for number, line in enumerate(text.splitlines()):
        part = PART.fullmatch(line)
        indent = " " * (len(part[1]) if part else 2)
        broken = textwrap.wrap(
            line,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        shown = "\n".join(broken) or line
        if has_colours(stream):
            shown = coloured(shown, part[1] if part else "", is_of_problems or number == 0)
        lines.append(shown)
    return "\n".join(lines)


def coloured(shown: str, name: str, is_title: bool) -> str:
    """A line in colour: `name` is the beginning of a problem's part, or empty."""
    if name:
        colour = {"found": RED, "fix": GREEN}.get(name.strip(" :"), "")
        return f"{colour}{shown}{RESET}" if colour else shown
    if shown.startswith("error: "):
        return f"{BOLD}{RED}error:{RESET}{BOLD}{shown[6:]}{RESET}"
    return f"{BOLD}{shown}{RESET}" if is_title else shown


def open_streams() -> None:
    """Opens standard streams that were closed (`>&-`): the next file that is opened would take
    their number, and what is printed would go into it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def flush_streams() -> None:
    """Flushes what was printed, before the exit does: a terminal that was closed is no failure."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # What is left in the buffer must not fail at the exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
