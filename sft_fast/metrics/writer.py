"""What a run says: metrics.jsonl always, one line for the eye, trackers where they are wanted.

Only the main rank writes; on the others every method returns at once.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sft_fast.errors import first_line
from sft_fast.metrics.format import finite, line
from sft_fast.packing.steps import StepCounts
from sft_fast.runtime.terminal import printable

if TYPE_CHECKING:
    from sft_fast.metrics.progress import ProgressLine
    from sft_fast.metrics.trackers import Tracker

Item = TypeVar("Item")
GIB = 2**30
MOST_TRACKER_FAILURES = 3
"""In a row; each may have been waited for."""


class StepReason(Enum):
    """Why an optimizer step moved the weights, or left them where they were."""

    UPDATED = auto()
    WARNED = auto()
    """Updated, although the guard found loss or gradient unusual."""
    REFUSED = auto()
    """The guard did not let the update happen."""
    OVERFLOW = auto()
    """A scaled fp16 gradient was not finite; the next step takes a smaller scale."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave; equal on every rank."""

    loss: float
    """Mean over the global batch's supervised tokens, nats."""
    grad_norm: float
    """Before clipping; NaN after an overflow."""
    lr: float
    reason: StepReason = StepReason.UPDATED
    warning: str = ""
    """The reason in words, unless it is UPDATED."""
    experts: Mapping[str, float] = field(default_factory=dict)
    """How the routers spread the tokens; see expert_load.FIGURES. {} = there are no experts."""

    @property
    def updated(self) -> bool:
        """Whether the weights moved."""
        return self.reason in (StepReason.UPDATED, StepReason.WARNED)

    @property
    def is_of_guard(self) -> bool:
        """Whether the guard found something, which is reported with the step's samples."""
        return self.reason in (StepReason.WARNED, StepReason.REFUSED)

    def figures(self) -> dict[str, Any]:
        """The outcome as metrics.jsonl has it."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "was_skipped": not self.updated,
            "warning": self.warning,
            **self.experts,
        }


@dataclass
class Window:
    """The steps since the last line; speeds are means over them."""

    num_steps: int = 0
    elapsed_s: float = 0.0
    data_wait_s: float = 0.0
    flops: float = 0.0
    num_tokens: int = 0
    num_supervised: int = 0
    capacity_tokens: int = 0

    def add(self, counts: StepCounts, elapsed_s: float, data_wait_s: float, flops: float) -> None:
        """Adds one step."""
        self.num_steps += 1
        self.elapsed_s += elapsed_s
        self.data_wait_s += data_wait_s
        self.flops += flops
        self.num_tokens += counts.num_tokens
        self.num_supervised += counts.num_supervised
        self.capacity_tokens += counts.capacity_tokens

    def speeds(self, peak_flops: float | None) -> dict[str, float | None]:
        """Figures of a line.

        Args:
            peak_flops: FLOP/s of all ranks; None: unknown, and so is the MFU.
        """
        seconds = max(self.elapsed_s, 1e-9)
        return {
            "elapsed_s": seconds / max(self.num_steps, 1),
            "tokens_per_s": self.num_tokens / seconds,
            "supervised_tokens_per_s": self.num_supervised / seconds,
            "capacity_tokens_per_s": self.capacity_tokens / seconds,
            "padding": 1 - self.num_tokens / max(self.capacity_tokens, 1),
            "data_wait": self.data_wait_s / seconds,
            "tflops": self.flops / seconds / 1e12,
            "mfu": None if peak_flops is None else self.flops / seconds / peak_flops,
        }


class MetricsWriter:
    """Appends to `metrics.jsonl`, prints, and feeds trackers."""

    def __init__(self, folder: Path, is_main: bool, trackers: "list[Tracker] | None" = None):
        self.is_main = is_main
        self.file = None
        self.is_failing = False
        self.trackers = trackers or []
        self.progress: ProgressLine | None = None
        self.tracker_failures: dict[int, int] = {}
        """id of a tracker -> points in a row that it did not take."""
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            # To open one waits for who reads it.
            if path.is_fifo():
                raise ValueError(f"output_dir: {path} is a pipe, expected a file; move it away")
            self.file = path.open("a", encoding="utf-8")
            if is_cut_off(Path(self.file.name)):
                # What a crash left of a line must not take the next one with it.
                self.file.write("\n")

    def write(self, kind: str, **values: Any) -> None:
        """Appends one record; `kind` names it ("plan", "step", "eval", ...).

        NaN and infinity are written as null: they are not JSON. A full disk does not end a run for
        the sake of its log: it is said once, and tried again with the next record.
        """
        if self.file is None:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        clean = {key: finite(value) for key, value in record.items()}
        try:
            self.file.write(json.dumps(clean) + "\n")
            self.file.flush()
            self.is_failing = False
        except OSError as error:
            if not self.is_failing:
                self.log(f"warning: {self.file.name} is not written: {error.strerror}")
            self.is_failing = True
        if "step" in values:
            self._track(kind, values)

    def _track(self, kind: str, values: dict[str, Any]) -> None:
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name != "step" and math.isfinite(value)
        }
        for tracker in tuple(self.trackers):
            try:
                tracker.log(numbers, values["step"])
                self.tracker_failures.pop(id(tracker), None)
            # It may raise anything, and only looks on.
            except Exception as error:
                self._give_up_if_often(tracker, error)

    def _give_up_if_often(self, tracker: "Tracker", error: Exception) -> None:
        """Warns of a tracker that failed, and leaves it out after some failures in a row."""
        failures = self.tracker_failures.get(id(tracker), 0) + 1
        self.tracker_failures[id(tracker)] = failures
        is_last = failures == MOST_TRACKER_FAILURES
        if is_last:
            self.trackers.remove(tracker)
        if is_last or failures == 1:
            end = "; it is left out from now on" if is_last else ""
            self.log(f"warning: {type(tracker).__name__} took no figures: {first_line(error)}{end}")

    def log(self, text: str) -> None:
        """Prints a line on the main rank; a full disk does not stop the run."""
        if not self.is_main:
            return
        text = printable(text)
        # Standard output may be a file on a full disk, or a pipe that nobody reads any more.
        with contextlib.suppress(OSError):
            if self.progress is not None:
                self.progress.print(text)
            else:
                print(text, flush=True)

    def draw(self, step: int, figures: dict[str, Any]) -> None:
        """Draws the progress line anew; a terminal that was closed does not stop the run."""
        assert self.progress is not None
        try:
            self.progress.update(step, figures)
        except OSError:
            self.end_progress()

    def end_progress(self) -> None:
        """Leaves the line as it is; what is said later is printed below it."""
        progress, self.progress = self.progress, None
        if progress is not None:
            with contextlib.suppress(OSError):
                progress.close()

    def close(self) -> None:
        """Ends progress line, trackers and file."""
        self.end_progress()
        for tracker in self.trackers:
            try:
                tracker.close()
            # As above.
            except Exception as error:
                self.log(f"warning: {type(tracker).__name__} did not end: {first_line(error)}")
        self.trackers = []
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()


def is_cut_off(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class StepMeter:
    """Turns steps into lines.

    A terminal gets one line that is redrawn; anything else a line every `every_steps` steps.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        num_steps: int,
        every_steps: int,
        flops: Callable[[StepCounts], float],
        peak_flops: float | None = None,
    ) -> None:
        """
        Args:
            writer: where lines go.
            num_steps: of the run.
            every_steps: steps between lines.
            flops: of a step with these counts, over all ranks.
            peak_flops: FLOP/s of all ranks together; None: unknown.
        """
        self.writer = writer
        self.num_steps = num_steps
        self.every_steps = every_steps
        self.flops = flops
        self.peak_flops = peak_flops
        self.window = Window()
        if writer.is_main and sys.stdout.isatty():
            from sft_fast.metrics.progress import ProgressLine

            writer.progress = ProgressLine(num_steps)

    def step(
        self,
        step: int,
        outcome: StepOutcome,
        counts: StepCounts,
        elapsed_s: float,
        data_wait_s: float,
    ) -> None:
        """Takes in one optimizer step; `step` counts from 1."""
        if not self.writer.is_main:
            return
        self.window.add(counts, elapsed_s, data_wait_s, self.flops(counts))
        is_due = step == self.num_steps or step % self.every_steps == 0
        progress = self.writer.progress
        is_drawn = progress is not None and (step == self.num_steps or progress.is_due())
        if not is_due and not is_drawn:
            return
        speeds = self.window.speeds(self.peak_flops)
        eta_s = (self.num_steps - step) * (speeds["elapsed_s"] or 0.0)
        figures = {**outcome.figures(), **speeds, "memory_gib": peak_memory_gib(), "eta_s": eta_s}
        if is_drawn:
            self.writer.draw(step, figures)
        if is_due:
            self.writer.write("step", step=step, **asdict(counts), **figures)
            if progress is None:
                self.writer.log(f"step {step}/{self.num_steps}  {line(figures)}")
            self.window = Window()


def peak_memory_gib() -> float:
    """Most memory that this process has held: of the GPU, or without one of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class Timed(Iterator[Item], Generic[Item]):
    """An iterator that knows how long it was waited for."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._waited_s = 0.0

    def __next__(self) -> Item:
        began = time.perf_counter()
        item = next(self._items)
        self._waited_s += time.perf_counter() - began
        return item

    def take_waited_s(self) -> float:
        """Seconds waited since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s
