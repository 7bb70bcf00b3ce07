"""One line on a terminal that is drawn anew, with a bar; other output goes above it."""

from __future__ import annotations

import atexit
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_DRAWS = 0.5
BAR_WIDTH = 30


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

    def update(self, step: int, text: str) -> None:
        """Draws the line."""
        self._drawn_at = time.monotonic()
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._num_steps, completed=step, width=BAR_WIDTH)
        head.add_row(Text(f"step {step}/{self._num_steps}"), bar)
        self._live.update(Group(head, Text(text)), refresh=True)

    def print(self, text: str) -> None:
        """Prints above the line."""
        self._console.print(Text(text))

    def close(self) -> None:
        self._live.stop()
        atexit.unregister(self._live.stop)
