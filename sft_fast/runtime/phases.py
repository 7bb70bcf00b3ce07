"""What the main thread of a rank says it is doing: phases, steps, tensors, votes to stop.

The watchdog's thread reads it. Nothing here imports torch.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sft_fast.runtime.hang import HangDetector
from sft_fast.runtime.launch_files import LaunchFiles


class Phases:
    """The phases of one rank, told by its main thread.

    Attributes:
        files: what the ranks of this launch write for each other; has the phase and its figures.
        hang: notices when nothing moves.
        is_watched: a watchdog reads this, and publishes it for the other ranks.
        is_unconfirmed: the directory holds a finished run, and nothing says yet that this run
            resumes it.
        can_leave: nothing would be lost if the process ended now.
        stop_requested, save_requested: what this rank was told to do.
        all_stop, all_save: what all ranks agreed on at the end of a step.
    """

    def __init__(self, files: LaunchFiles, hang: HangDetector):
        self.files, self.hang = files, hang
        self.is_watched = self.is_unconfirmed = False
        self.can_leave = True
        self.stop_requested = self.save_requested = False
        self.all_stop = self.all_save = False
        self.first_step: tuple[int, float] | None = None

    @classmethod
    def unwatched(cls) -> "Phases":
        """Phases that nobody reads, for code that runs without a launch."""
        files = LaunchFiles(Path("."))
        return cls(files, HangDetector(files, hang_timeout_s=0.0))

    @property
    def rank(self) -> int:
        """This process's rank in the launch."""
        return self.files.rank

    def enter(self, phase: str, can_leave: bool = False, is_loading: bool = False) -> None:
        """Begins a phase.

        Args:
            phase: its name in every report.
            can_leave: nothing would be lost if the process left at any moment.
            is_loading: `tensor_done` is called for each tensor, and has a time limit.
        """
        self.hang.begin_phase(is_loading)
        self.files.phase, self.can_leave = phase, can_leave
        if self.is_watched:
            self.files.publish("running")

    @contextlib.contextmanager
    def paused(
        self, phase: str, can_leave: bool = False, is_loading: bool = False
    ) -> Iterator[None]:
        """A phase inside another one, without its time limit; arguments as for `enter`."""
        hang, files = self.hang, self.files
        outer, could_leave = files.phase, self.can_leave
        was_loading, was_timed = hang.is_loading, hang.is_timed
        hang.begin_phase(is_loading)
        files.phase, self.can_leave = phase, can_leave
        # Without `finally`: the record of an error names the inner phase, where it happened.
        yield
        files.phase, self.can_leave = outer, could_leave
        hang.begin_phase(was_loading, was_timed)

    def confirm_run(self) -> None:
        """Says that the run belongs here; a refused one leaves a finished run's records alone."""
        self.is_unconfirmed = False

    def heartbeat(self, **progress: Any) -> None:
        """Ends a step; from now on the next one must end within the time limit."""
        now = time.monotonic()
        self.hang.heartbeat()
        self.record(**progress)
        if "step" not in progress:
            return
        if self.first_step is None:
            self.first_step = (progress["step"], now)
        step, began = self.first_step
        per_step_s = (now - began) / max(progress["step"] - step, 1)
        left = self.files.progress.get("num_steps", progress["step"]) - progress["step"]
        self.record(eta_s=round(left * per_step_s, 1) if now > began else None)

    def tensor_done(self) -> None:
        """Counts a tensor that was read or written in a phase of loading."""
        self.hang.tensor_done()

    def record(self, **progress: Any) -> None:
        """Adds figures to every report."""
        self.files.progress |= progress

    def maps(self, files: Iterable[Path]) -> None:
        """Says which files this rank reads from mapped memory from now on."""
        if self.is_watched:
            self.files.list_mapped(files)

    def votes(self) -> tuple[float, float]:
        """(save, stop): this rank's votes, 0 or 1."""
        return float(self.save_requested), float(self.stop_requested)

    def apply_votes(self, save: float, stop: float) -> None:
        """Does what the sum of all ranks' votes says."""
        self.all_save, self.all_stop = save > 0, stop > 0
        if self.all_stop:
            self.stop_requested = True
        if self.all_save:
            self.save_requested = False


def no_report() -> None:
    """A `tensor_done` for code that runs without a launch."""
