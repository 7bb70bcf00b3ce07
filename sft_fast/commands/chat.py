"""`sft_fast chat`: talk to the result, through transformers alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft_fast.commands.arguments import Commands, positive


def add(commands: Commands) -> None:
    """Describes `chat` to argparse."""
    chat = commands.add_parser("chat", help="talk to a trained model")
    chat.add_argument("model", type=Path, metavar="OUT", help="output_dir of a run, or a model")
    chat.add_argument("--ask", action="append", metavar="TEXT", help="answer this and end; again")
    chat.add_argument("--system", metavar="TEXT", help="system turn")
    chat.add_argument("--max-new-tokens", type=positive, default=512)
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    chat.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    chat.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Answers the questions of `--ask`, or talks until the input ends."""
    from sft_fast.evaluation.chat import Chat
    from sft_fast.runtime.run_files import model_folder
    from sft_fast.runtime.terminal import printable

    chat = Chat(
        model_folder(parsed.model),
        device=parsed.device,
        system=parsed.system,
        max_new_tokens=parsed.max_new_tokens,
        temperature=parsed.temperature,
    )
    if parsed.ask:
        for question in parsed.ask:
            print(printable(chat.answer(question)))
        return
    print("Ctrl-D ends, /new begins anew.")
    talk(chat)


def talk(chat: Any) -> None:
    """Reads questions until the end of the input."""
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/new":
            chat.forget()
        elif question:
            chat.answer(question, is_streamed=True)
