"""Detection of hangs: no step ends, or no tensor is loaded. Nothing here imports torch.

A training step must end in a time limit. Where weights are read or written the limit is longer,
and counts from the last tensor that any rank has done: a slow file system is no hang while it gives
one tensor after the other. Other phases have no limit.
"""

import contextlib
import faulthandler
import json
import threading
import time
from typing import Any

from sft_fast.runtime.launch_files import LaunchFiles
from sft_fast.runtime.processes import is_stopped, process_space

# The first step compiles kernels; a tensor may be large, and far away.
FIRST_STEP_FACTOR = LOADING_FACTOR = 10
SLOW_STEP_FACTOR = 10
MISSED_RENEWALS = 10
# The watchdog's thread looks several times a second, unless the whole process did not run.
LONGEST_GAP_S = 5.0


class HangDetector:
    """Notices when this rank has done nothing for too long.

    `begin_phase`, `heartbeat` and `tensor_done` are called by the main thread, the others by the
    watchdog's. Time in which the process was suspended, stopped or frozen, does not count.

    Attributes:
        files: of the launch; `files.progress["tensors"]` counts the tensors that were done.
        hang_timeout_s: seconds in which a step must end, unless earlier steps were slow too.
    """

    def __init__(self, files: LaunchFiles, hang_timeout_s: float):
        self.files, self.hang_timeout_s = files, hang_timeout_s
        self.clock_lock = threading.Lock()
        self.last_tick, self.suspended_s = time.monotonic(), 0.0
        self.last_beat: float | None = None
        self.slowest_s = 0.0
        self.is_loading = False
        self.last_tensor_at = 0.0
        self.seen: dict[int, int] = {}
        """Rank -> tensors when last looked at."""
        self.has_dumped = False
        self.stuck: Any = None
        """The file for a stuck interpreter."""

    def tick(self) -> None:
        """Says that the process runs; a long time without is one in which it did not."""
        with self.clock_lock:
            now = time.monotonic()
            gap_s = now - self.last_tick
            if gap_s > LONGEST_GAP_S:
                self.suspended_s += gap_s
            self.last_tick = now

    def awake_s(self) -> float:
        """A clock that stands still while the process is suspended."""
        return time.monotonic() - self.suspended_s

    def begin_phase(self, is_loading: bool = False, is_timed: bool = False) -> None:
        """Begins a phase.

        Args:
            is_loading: `tensor_done` is called in it for each tensor.
            is_timed: its steps have the time limit from now on, not from the first `heartbeat` on.
        """
        self.last_beat = self.awake_s() if is_timed else None
        self.last_tensor_at, self.is_loading = self.awake_s(), is_loading

    @property
    def is_timed(self) -> bool:
        """Whether a step must end within the time limit."""
        return self.last_beat is not None

    def heartbeat(self) -> None:
        """Ends a step; from now on the next one must end within the time limit."""
        self.tick()
        now = self.awake_s()
        if self.last_beat is not None:
            self.slowest_s = max(self.slowest_s, now - self.last_beat)
        self.last_beat = now

    def tensor_done(self) -> None:
        """Counts a tensor that was read or written."""
        self.files.progress["tensors"] = self.files.progress.get("tensors", 0) + 1
        self.last_tensor_at = self.awake_s()

    def find_hang(self) -> str | None:
        """Why this rank counts as hanging; None = it does not."""
        if self.is_loading:
            return self.find_standstill()
        last_beat = self.last_beat  # the main thread may begin a phase meanwhile
        if last_beat is None:
            return None
        silent_s = self.awake_s() - last_beat
        limit_s = max(self.hang_timeout_s, SLOW_STEP_FACTOR * self.slowest_s)
        if self.slowest_s == 0.0:
            limit_s *= FIRST_STEP_FACTOR
        if silent_s < limit_s:
            return None
        return f"no step ended for {silent_s:.0f} s"

    def find_standstill(self) -> str | None:
        """`find_hang` in a phase of loading."""
        silent_s = self.awake_s() - self.last_tensor_at
        if silent_s < LOADING_FACTOR * self.hang_timeout_s:
            return None
        # Another rank may have been moving, and this one waiting for it.
        tensors = {rank: peer.get("tensors", 0) for rank, peer in self.files.peers()}
        if tensors != self.seen:
            self.seen, self.last_tensor_at = tensors, self.awake_s()
            return None
        return f"no tensor was read or written for {silent_s:.0f} s"

    def suspects(self) -> str:
        """The ranks that are stopped, silent or behind, as text."""
        figure = "tensors" if self.is_loading else "step"
        peers, space = self.files.peers(), process_space()
        silent = self.files.silent_peers(3 * self.files.publish_every_s)
        stopped = [r for r, peer in peers if peer.get("space") == space and is_stopped(peer["pid"])]
        if stopped:
            return f"ranks that are stopped by a signal: {sorted(stopped)}"
        if silent:
            return f"ranks that give no sign of life: {silent}"
        done = {rank: peer.get(figure, 0) for rank, peer in peers}
        done[self.files.rank] = self.files.progress.get(figure, 0)
        last = min(done.values())
        behind = [rank for rank, number in sorted(done.items()) if number == last]
        if len(behind) < len(done):
            return f"ranks that are behind: {behind}"
        return f"all ranks wait after {figure} {last}"

    def dump_stacks(self) -> None:
        """Writes the stacks of all threads to a file, once: later they show how the rank left."""
        if self.has_dumped:
            return
        self.has_dumped = True
        folder = self.files.output / "stacks"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self.files.rank:05d}.txt").open("w") as file:
                file.write(f"{json.dumps(self.files.record())}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)

    def guard_against_stuck_interpreter(self) -> None:
        """Renews a timer, in C, that ends the process when this thread no longer gets to run."""
        if self.stuck is None:
            try:
                self.stuck = (self.files.folder / f"stuck_{self.files.rank:05d}.txt").open("w")
            except OSError:
                return  # the disk is full for now
        limit_s = max(
            FIRST_STEP_FACTOR * self.hang_timeout_s,
            SLOW_STEP_FACTOR * self.slowest_s,
            MISSED_RENEWALS * self.files.publish_every_s,
        )
        faulthandler.dump_traceback_later(limit_s, file=self.stuck, exit=True)

    def close(self) -> None:
        """Stops the timer."""
        faulthandler.cancel_dump_traceback_later()
        if self.stuck is not None:
            self.stuck.close()
