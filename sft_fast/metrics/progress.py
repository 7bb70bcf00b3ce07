"""Live progress lines on a terminal, with a bar; other output goes above them."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sft_fast.metrics.format import duration, warning

SECONDS_BETWEEN_DRAWS = 1.0
BAR_WIDTH = 30
Field = tuple[str, str]


class ProgressLine:
    """A bar and the figures of the last step."""

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._console = console or Console(highlight=False)
        # Drawn by update(): a thread of its own would draw between two steps of no change.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stderr=False)
        self._live.start()
        # An error must not leave the cursor hidden.
        atexit.register(self._live.stop)
        self._drawn_at = 0.0

    def is_due(self) -> bool:
        """True when the last drawing is old enough to be replaced."""
        return time.monotonic() - self._drawn_at >= SECONDS_BETWEEN_DRAWS

    def update(self, step: int, figures: Mapping[str, Any]) -> None:
        """Draws the lines; `figures` are those of `metrics.line`."""
        self._drawn_at = time.monotonic()
        # A bar of rich's own would cost as much again as all the rest.
        done = round(BAR_WIDTH * step / self._num_steps)
        bar = (("━" * done, "green"), ("━" * (BAR_WIDTH - done), "dim"))
        left = f"  {step / self._num_steps:.0%}  eta {duration(figures['eta_s'])}"
        head = Text.assemble(f"step {step}/{self._num_steps}  ", *bar, left)
        texts = [labelled(fields) for fields in (learning(figures), speed(figures))]
        if sum(len(text) for text in texts) + 2 <= self._console.width:
            texts = [Text("  ").join(texts)]
        if text := warning(figures):
            texts.append(Text(text, "bold yellow"))
        self._live.update(Text("\n").join([head, *texts]), refresh=True)

    def print(self, text: str) -> None:
        """Prints above the line."""
        self._console.print(Text(text))

    def close(self) -> None:
        """Leaves the last lines on the terminal."""
        atexit.unregister(self._live.stop)
        self._live.stop()


def labelled(fields: list[Field]) -> Text:
    """(name, value) pairs in a row; the names step back."""
    parts = [Text.assemble((name, "dim"), " ", value) for name, value in fields]
    return Text("  ").join(parts)


def learning(figures: Mapping[str, Any]) -> list[Field]:
    """The figures of what is learnt, as (name, text)."""
    return [
        ("loss", f"{figures['loss']:.4f}"),
        ("lr", f"{figures['lr']:.2e}"),
        ("grad norm", f"{figures['grad_norm']:.3f}"),
        ("memory", f"{figures['memory_gib']:.1f} GiB"),
        ("data wait", f"{figures['data_wait']:.1%}"),
    ]


def speed(figures: Mapping[str, Any]) -> list[Field]:
    """The figures of how fast it goes, as (name, text)."""
    mfu = figures["mfu"]
    return [
        ("tokens/s", f"{figures['tokens_per_s']:,.0f}"),
        ("trained", f"{figures['supervised_tokens_per_s']:,.0f}"),
        ("computed", f"{figures['capacity_tokens_per_s']:,.0f}"),
        ("padding", f"{figures['padding']:.1%}"),
        *([] if mfu is None else [("mfu", f"{mfu:.1%}")]),
    ]
