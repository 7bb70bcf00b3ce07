"""The command `sft_fast`: what `sft_fast.commands` holds, and what their errors look like."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from sft_fast import __version__
from sft_fast.commands import (
    chat,
    check,
    data,
    environment,
    export,
    launch,
    pictures,
    plan,
    preview,
    recipes,
    status,
    verify,
)
from sft_fast.exit_codes import BROKEN_PIPE, INTERRUPTED, USER_ERROR
from sft_fast.redact import redact
from sft_fast.registry import distrust
from sft_fast.runtime.telemetry import switch_off

# In the order in which a new user meets them.
MODULES = (
    *(recipes, check, preview, plan, launch, status, pictures),
    *(chat, export, verify, data, environment),
)
EPILOG = """\
begin with:
  sft_fast train demo                     # trains a small model in minutes
  sft_fast init MODEL chats.jsonl         # a configuration for your own data
  sft_fast COMMAND --help                 # what a command takes
"""

UNKNOWN_COMMAND = re.compile(r"argument COMMAND: invalid choice: '([^']*)'")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the longest command; argparse forgets that commands are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        """Counts the indentation of commands, which argparse forgets."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest command, and above the usage."""

    commands: argparse._SubParsersAction[Parser]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )

    def error(self, message: str) -> NoReturn:
        """Ends with one line that says what is wrong, and the usage."""
        # Overrides, of which there may be none, are no requirement.
        message = message.replace("required: config, a.b=c", "required: config")
        unknown = UNKNOWN_COMMAND.match(message)
        if unknown is not None:
            from sft_fast.errors import nearest

            near = nearest(unknown[1], self.commands.choices)
            hint = f"did you mean {near}?" if near else "`sft_fast --help` lists them"
            message = f"there is no command {unknown[1]}; {hint}"
        self.exit(USER_ERROR, f"error: {message}\n{self.format_usage()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        arguments: what follows the command's name; None: those of this process.

    Returns: 0, or a code of sft_fast.exit_codes.
    """
    from sft_fast.runtime.terminal import open_streams

    open_streams()
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one block only; here they may stand on both sides of options.
    if not hasattr(parsed, "overrides") or any(text.startswith("-") for text in rest):
        parser.parse_args(arguments)
    else:
        parsed.overrides += rest
    if arguments is None and getattr(parsed, "hides_torch", False):
        hide_torch()
    switch_off()
    try:
        with printable_streams():
            code: int = parsed.run(parsed) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `| head` has read enough; what Python writes at its exit must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        from sft_fast.errors import exit_code

        if parsed.debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        print_error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        # What a command was not trusted with is no matter of the next one in this process.
        distrust(None)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Keeps what names and data hold from being obeyed by the terminal."""
    from sft_fast.runtime.terminal import PrintableStream

    out, err = PrintableStream(sys.stdout), PrintableStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def print_error(error: Exception) -> None:
    """Prints `error`; with colours, and broken at words, on a terminal."""
    from sft_fast.runtime.terminal import as_seen

    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(as_seen(f"error: {redact(text)}", sys.stderr), file=sys.stderr)


def hide_torch() -> None:
    """Keeps transformers and datasets from importing torch in this process.

    Tokenizers and tables do not need it, and without it a command starts in half the time.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # datasets asks for it.
    os.environ["USE_TORCH"] = "0"
    if "torch" in sys.modules:
        return
    # transformers asks find_spec, once, which takes None for "not installed". Nothing else may see
    # it: datasets imports what it finds in sys.modules.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers.utils import is_torch_available

        is_torch_available()
    finally:
        del sys.modules["torch"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all commands."""
    parser = Parser(
        prog="sft_fast",
        description="Supervised fine-tuning on megatron-core.",
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.set_defaults(debug=False, run=lambda parsed: parser.print_help())
    parser.add_argument("--version", action="version", version=f"sft_fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in MODULES:
        module.add(commands)
    parser.commands = commands
    return parser
