"""The command `sft_fast`: what `sft_fast.commands` holds, and what their errors look like."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

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

# In the order in which a new user meets them.
MODULES = (
    *(recipes, check, preview, plan, launch, status, pictures),
    *(chat, export, verify, data, environment),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        arguments: what follows the command's name; None: those of this process.

    Returns: 0; 1 where a command looked for problems and found some; 2 where the user's input is
        wrong.
    """
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one block only; here they may stand on both sides of options.
    if not hasattr(parsed, "overrides") or any(text.startswith("-") for text in rest):
        parser.parse_args(arguments)
    else:
        parsed.overrides += rest
    if arguments is None and getattr(parsed, "hides_torch", False):
        hide_torch()
    try:
        return parsed.run(parsed) or 0
    except (ValueError, OSError) as error:
        if parsed.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2


def hide_torch() -> None:
    """Keeps transformers from importing torch in this process: its tokenizers do not need it.

    That halves the start of a command. None in sys.modules makes find_spec say "not installed".
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft_fast", description="Supervised fine-tuning on megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"sft_fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in MODULES:
        module.add(commands)
    return parser
