"""Errors that users can fix: every problem of a configuration at once, each with its place and its
fix; and files that are damaged."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_fast.exit_codes import DAMAGED, HANG, USER_ERROR
from sft_fast.redact import redact


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration.

    Attributes:
        keys: The dotted keys that take part, e.g. ("optim.lr",); empty when the file is at fault.
        found: What the file or the command line says.
        expected: What would be right.
        fix: The nearest right key or value, or what to do; may be empty.
        where: "file:line" or "command line: a.b=c"; empty when only defaults take part.
    """

    keys: tuple[str, ...]
    found: str
    expected: str
    fix: str = ""
    where: str = ""

    def __str__(self) -> str:
        lines = ["  ".join(part for part in (self.where, ", ".join(self.keys)) if part)]
        parts = (("found", self.found), ("expected", self.expected), ("fix", self.fix))
        lines += [f"  {name + ':':<10}{text}" for name, text in parts if text]
        return "\n".join(lines)


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` holds everything that is wrong with it."""

    def __init__(self, problems: Iterable[Problem], source: str = "the configuration") -> None:
        self.problems = tuple(problems)
        self.source = source
        assert self.problems
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in {self.source}"
        in_order = sorted(self.problems, key=_place)
        return redact("\n".join([title, *(str(problem) for problem in in_order)]))


class DamageError(ValueError):
    """Files of a checkpoint, an export or a model are not what they were when written."""


def exit_code(error: Exception) -> int:
    """With which a process ends after `error`, a ValueError or OSError."""
    if isinstance(error, TimeoutError):
        return HANG
    return DAMAGED if isinstance(error, DamageError) else USER_ERROR


def first_line(error: BaseException) -> str:
    """What an error says first; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _place(problem: Problem) -> tuple[bool, int]:
    """Lines of the file from its top; what has no line in it comes behind them."""
    found = re.match(r"[^;]*:(\d+)(?:;|\Z)", problem.where)
    return (found is None, int(found[1]) if found is not None else 0)


def show(value: Any) -> str:
    """Returns `value` as an error message shows it: in YAML's words, short, without secrets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"a mapping with {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} items"
    text = redact(value) if isinstance(value, str) else str(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"the string {text!r}" if isinstance(value, str) else text


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the candidate most like `word`, or None when none is close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_file(path: Path) -> Path | None:
    """Returns the entry of the folder of `path` whose name is most like its own, or None."""
    if path.exists() or not path.parent.is_dir():
        return None
    name = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return None if name is None else path.with_name(name)


def nearest_key(unknown: str, known: Iterable[str]) -> str | None:
    """Returns the dotted key that `unknown` most likely means, or None when none is close.

    Args:
        unknown: Dotted key that does not exist, e.g. "lr" or "optim.warmup".
        known: All dotted keys that exist.
    """
    section, _, name = unknown.rpartition(".")

    def likeness(candidate: str) -> tuple[float, bool]:
        candidate_section, _, candidate_name = candidate.rpartition(".")
        # "warmup" means optim.warmup_steps; of two equally like names the same section wins.
        if name in candidate_name.split("_"):
            return (0.9 if name != candidate_name else 1.0), candidate_section == section
        differing = sum(a != b for a, b in zip(name, candidate_name, strict=False))
        is_swap = differing == 2 and sorted(name) == sorted(candidate_name)
        swapped = 0.95 if is_swap else 0.0
        ratio = difflib.SequenceMatcher(None, name, candidate_name).ratio()
        return max(ratio, swapped), candidate_section == section

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.65 else None
