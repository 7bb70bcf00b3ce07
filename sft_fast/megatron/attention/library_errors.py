"""Errors of attention libraries, told apart from those of our own code around them.

A library that cannot be used is passed over; a bug of ours must not look like that. So what a
library raises gets a note, and only errors with the note count against the library.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

LOAD_ERRORS = (
    *(ImportError, OSError, AttributeError, RuntimeError),  # built for another torch, or in part
    AssertionError,  # how Transformer Engine says that its parts do not fit together
)
"""What a library that cannot be used raises when it is imported."""
CALL_ERRORS = (
    *LOAD_ERRORS,  # aiter and Transformer Engine load and compile parts of theirs at the first call
    *(ValueError, TypeError),  # how they refuse an argument, or do not know it yet
)
"""What a library that cannot do what it is asked raises when it is called."""
NOTE = "raised by the attention library, not by sft_fast"


@contextlib.contextmanager
def noting_library() -> Iterator[None]:
    """Adds the note to what the body raises; the body calls a library and does nothing else."""
    try:
        yield
    except CALL_ERRORS as error:
        error.add_note(NOTE)
        raise


def from_library(function: Callable[..., Any]) -> Callable[..., Any]:
    """A library's function whose errors have the note."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with noting_library():
            return function(*args, **kwargs)

    return call


def is_from_library(error: BaseException) -> bool:
    """Whether a library raised `error`."""
    return NOTE in getattr(error, "__notes__", ())
