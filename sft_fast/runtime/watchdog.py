"""What a process does when it is told to stop, when another rank fails, and when nothing moves.

One thread per rank looks after all of it, so that a rank which is stuck in a collective still
answers. Through launch_files.py the first rank that fails or has to leave says so, and the others
follow. Nothing here imports torch.

    <output_dir>/SAVE, STOP     made by the user: save now; save and leave
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sft_fast.errors import exit_code
from sft_fast.exit_codes import FAILED, HANG, INTERRUPTED
from sft_fast.files import read_json, write_json
from sft_fast.redact import redact
from sft_fast.runtime.hang import HangDetector
from sft_fast.runtime.launch_files import LaunchFiles
from sft_fast.runtime.processes import die_with_parent, end_children
from sft_fast.runtime.run_lock import HEARTBEAT_S, RunLock, check_output_dir

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_S = 0.25
RANKS_THAT_LOOK_PER_S = 500
# torchrun kills 30 s after SIGTERM.
LEAVE_WITHIN_S = 25.0
ORPHAN_LEAVES_WITHIN_S = 4.0
# A rank that another one's failure reaches by itself gets this long to leave in its own way.
FOLLOW_S = 1.5
# torchrun passes a Ctrl-C on that the rank has had from the terminal already.
SECOND_INTERRUPT_S = 0.5
# What a rank announces, the state that follows from it, and the exit code of who follows if it
# names no other.
FOLLOWED = (("failed", "failed", FAILED), ("left", "preempted", 0))
OUT_OF_MEMORY_HINT = (
    "\nlower train.micro_batch_size or packing.capacity, or set model.recompute=full; "
    "parallel.tensor and parallel.pipeline spread the model over more ranks"
)


class Watchdog:
    """Looks after one process; to be used in a `with`. Without `start` it only takes notes.

    Attributes:
        files: what the ranks of this launch write for each other.
        hang: notices when nothing moves.
        stop_requested, save_requested: what this rank was told.
        all_stop, all_save: what all ranks agreed on at the end of a step.
        is_on_trial: a finished run is here, and nothing says yet that this one goes on from it.
    """

    def __init__(self, output: Path, hang_timeout_s: float = 120.0):
        self.output = output
        self.files = LaunchFiles(output)
        self.hang = HangDetector(self.files, hang_timeout_s)
        self.rank = self.files.rank
        self.can_leave = True
        self.stop_requested = self.save_requested = False
        self.all_stop = self.all_save = self.is_on_trial = False
        self.stop_reason = ""
        self.first_step: tuple[int, float] | None = None
        self.leave_at = math.inf
        self.interrupted_at = -math.inf
        self.lock: RunLock | None = None
        self.is_closed = threading.Event()
        self.thread: threading.Thread | None = None
        self.old_handlers: dict[int, Any] = {}

    # --- what the main thread calls

    def start(self) -> "Watchdog":
        """Takes the run directory and begins to look.

        Raises:
            ValueError: the directory cannot be written, or another job uses it.
        """
        check_output_dir(self.output)
        self.output.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.lock = RunLock(self.output, self.files.job)
            self.files.tidy()
        self.files.open()
        self.is_on_trial = (read_json(self.output / "status.json") or {}).get("state") == "finished"
        self.files.publish("running")
        self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            self.old_handlers = {number: signal.signal(number, ignore) for number in SIGNALS}
            self.old_handlers[0] = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.run, name="sft_fast watch", daemon=True)
        self.thread.start()
        return self

    def enter(self, phase: str, can_leave: bool = False, is_loading: bool = False) -> None:
        """Names what comes next.

        Args:
            can_leave: nothing would be lost if the process left at any moment.
            is_loading: `tensor_done` is called for each tensor, and has a time limit.
        """
        self.hang.begin(is_loading)
        self.files.phase, self.can_leave = phase, can_leave
        if self.thread is not None:
            self.files.publish("running")

    def confirm_run(self) -> None:
        """Says that the run belongs here; a refused one leaves a finished run's records alone."""
        self.is_on_trial = False

    def heartbeat(self, **progress: Any) -> None:
        """Says that a step ended; from now on the next one must within the time limit."""
        now = time.monotonic()
        self.hang.beat()
        self.files.progress |= progress
        if "step" not in progress:
            return
        if self.first_step is None:
            self.first_step = (progress["step"], now)
        step, began = self.first_step
        per_step_s = (now - began) / max(progress["step"] - step, 1)
        left = self.files.progress.get("num_steps", progress["step"]) - progress["step"]
        self.record(eta_s=round(left * per_step_s, 1) if now > began else None)

    def tensor_done(self) -> None:
        """Says that a tensor was read or written in a phase of loading."""
        self.hang.move()

    def record(self, **progress: Any) -> None:
        """Adds figures to the reports."""
        self.files.progress |= progress

    @contextlib.contextmanager
    def paused(
        self, phase: str, can_leave: bool = False, is_loading: bool = False
    ) -> Iterator[None]:
        """A phase inside another one, without its time limit; arguments as for `enter`."""
        hang, files = self.hang, self.files
        before, was_timed = (files.phase, self.can_leave), hang.last_beat is not None
        was_loading = hang.is_loading
        hang.begin(is_loading)
        files.phase, self.can_leave = phase, can_leave
        yield
        files.phase, self.can_leave = before
        hang.begin(was_loading)
        hang.last_beat = time.monotonic() if was_timed else None

    def votes(self) -> tuple[float, float]:
        """(save, stop): this rank's votes, 0 or 1."""
        return float(self.save_requested), float(self.stop_requested)

    def apply_votes(self, save: float, stop: float) -> None:
        """Takes in the sum of all ranks' votes."""
        self.all_save, self.all_stop = save > 0, stop > 0
        if self.all_stop:
            self.stop_requested = True
        if self.all_save:
            self.save_requested = False

    def fail(
        self, cause: str, phase: str | None = None, is_refusal: bool = False, **details: Any
    ) -> bool:
        """Records a failure; True when it is the launch's first.

        Args:
            is_refusal: by something that the user can mend.
            details: more for error.json; with `exit_code` the ranks that follow end.
        """
        if self.thread is None:
            return True
        record = self.files.record() | {
            "phase": phase or self.files.phase,
            "cause": redact(cause),
            **details,
        }
        if not self.files.announce("failed", record):
            return False
        if is_refusal and self.is_on_trial:
            return True
        with contextlib.suppress(OSError):
            write_json(self.output / "error.json", record, mode=0o640)
        self.files.write_status("failed", cause=record["cause"])
        return True

    def close(self, state: str) -> None:
        """Ends the watch: `finished`, `preempted` (saved, to be resumed) or `failed`."""
        if self.thread is None:
            return
        self.is_closed.set()
        self.thread.join()
        self.thread = None
        self.hang.close()
        if 0 in self.old_handlers:
            signal.set_wakeup_fd(self.old_handlers.pop(0))
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        for descriptor in self.pipe:
            os.close(descriptor)
        self.files.publish("done")
        if self.rank == 0:
            if state != "failed":
                self.files.write_status(state)
            assert self.lock is not None, "rank 0 takes the lock in start"
            self.lock.release()

    # --- the thread

    def run(self) -> None:
        next_publish = next_lock = next_look = 0.0
        while not self.is_closed.is_set():
            now = time.monotonic()
            if now >= next_publish:
                next_publish = now + self.files.publish_every_s
                self.files.publish("running")
                self.hang.guard_against_stuck_interpreter()
                if self.rank == 0 and not self.is_on_trial:
                    self.files.write_status("stopping" if self.stop_requested else "running")
            if self.lock is not None and now >= next_lock:
                next_lock = now + HEARTBEAT_S
                if not self.lock.beat():
                    cause = "the lock of output_dir was taken by another job"
                    self.fail(cause)
                    self.leave("failed", FAILED, cause)
            signals = self.wait_for_signals()
            if signals or now >= next_look:
                # A shared file system should not feel a large job.
                next_look = now + self.files.world_size / RANKS_THAT_LOOK_PER_S
                self.follow_others()
            self.answer(signals)
            self.look_for_triggers()
            self.look_for_hang()

    def wait_for_signals(self) -> bytes:
        ready, _, _ = select.select([self.pipe[0]], [], [], POLL_S)
        return os.read(self.pipe[0], 64) if ready else b""

    def follow_others(self, patient: bool = True) -> None:
        """Leaves when another rank failed, left, or died without a word.

        Args:
            patient: the main thread may hear of it by itself, and gets the time to.
        """
        self.files.meet()
        # Looked for first: who is found dead then has announced what it had to.
        dead = self.files.dead_peers()
        for name, state, code in FOLLOWED:
            announced = self.files.announced(name)
            if announced is not None:
                self.is_closed.wait(FOLLOW_S if patient else 0.0)
                if not self.is_closed.is_set():
                    code = announced.get("exit_code", code)
                    if code == HANG:
                        self.hang.dump_stacks()
                    self.leave(state, code, announced["cause"])
        for rank, peer in dead:
            cause = f"process {peer['pid']} of rank {rank} is gone: killed, or crashed"
            facts = {"rank": rank, "pid": peer["pid"], "reported_by": self.rank}
            self.fail(cause, peer["phase"], **facts)
            self.leave("failed", FAILED, cause)

    def fail_with(self, error: BaseException) -> None:
        """Records an exception, unless it only is what another rank's death looks like from here.
        Then it ends this process, without a second message."""
        if isinstance(error, RuntimeError):
            # A connection is closed a moment before its process is seen to be dead.
            deadline = time.monotonic() + FOLLOW_S / 2
            while time.monotonic() < deadline and self.thread is not None:
                self.follow_others(patient=False)
                time.sleep(POLL_S / 5)
        hint = OUT_OF_MEMORY_HINT if "OutOfMemory" in type(error).__name__ else ""
        text = f"{type(error).__name__}: {error}{hint}"
        if isinstance(error, ValueError | OSError):
            self.fail(text, is_refusal=True, exit_code=exit_code(error))
        else:
            self.fail(text)

    def answer(self, signals: bytes) -> None:
        now = time.monotonic()
        for number in signals:
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            is_interrupt = number == signal.SIGINT
            if is_interrupt and now - self.interrupted_at > SECOND_INTERRUPT_S:
                if math.isfinite(self.interrupted_at):
                    self.leave("preempted", INTERRUPTED)
                self.interrupted_at = now
            self.request_stop(name)
        if os.getppid() != self.files.parent:
            self.request_stop("the parent process is gone", ORPHAN_LEAVES_WITHIN_S)
        if self.stop_requested and self.can_leave:
            self.files.announce("left", self.files.record() | {"cause": self.stop_reason})
            self.leave("preempted", 0)
        if now > self.leave_at:
            text = f"could not save within {LEAVE_WITHIN_S:.0f} s of {self.stop_reason}"
            self.fail(text, exit_code=HANG)
            self.leave("failed", HANG, text)

    def request_stop(self, reason: str, within_s: float = LEAVE_WITHIN_S) -> None:
        if not self.stop_requested:
            self.stop_reason = reason
            self.stop_requested = True
            log(f"rank {self.rank}: {reason} in phase {self.files.phase}: saving and leaving")
        self.leave_at = min(self.leave_at, time.monotonic() + within_s)

    def look_for_triggers(self) -> None:
        if self.rank != 0:
            return
        if take(self.output / "STOP"):
            self.request_stop("file STOP", math.inf)
        if take(self.output / "SAVE"):
            self.save_requested = True

    def look_for_hang(self) -> None:
        silence = self.hang.find()
        if silence is None:
            return
        self.hang.dump_stacks()
        self.files.publish("hangs")
        # So that every rank dumps, and says how far it is, before torchrun ends the others.
        self.is_closed.wait(FOLLOW_S)
        cause = f"{silence}; {self.hang.suspects()}"
        if self.fail(cause, exit_code=HANG):
            log(f"rank {self.rank}: {cause}; stacks of all ranks: {self.output / 'stacks'}")
        self.leave("failed", HANG, cause)

    def leave(self, state: str, code: int, cause: str | None = None) -> NoReturn:
        """Ends the process at once: the main thread may be stuck where no exception reaches it."""
        if self.rank == 0 and not self.is_on_trial:
            self.files.write_status(state, cause=cause or self.stop_reason)
        self.files.publish("done")
        if self.lock is not None:
            self.lock.release()
        end_children()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def take(path: Path) -> bool:
    """Removes a trigger file; True when it was there."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def ignore(number: int, frame: object) -> None:
    """The thread hears of a signal through the wake-up pipe; this only keeps the default away."""


def log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


_current: Watchdog | None = None


def current_watchdog() -> Watchdog:
    """The watch of this process; one that only takes notes where none was started."""
    global _current
    if _current is None:
        _current = Watchdog(Path("."))
    return _current


@contextlib.contextmanager
def watching(output: Path, hang_timeout_s: float) -> Iterator[Watchdog]:
    """Starts the process's watchdog, and ends it with the state that fits how the body ended."""
    global _current
    watchdog = Watchdog(output, hang_timeout_s).start()
    _current = watchdog
    state = "failed"
    try:
        yield watchdog
        state = "preempted" if watchdog.stop_requested else "finished"
    except BaseException as error:  # recorded, not handled
        watchdog.fail_with(error)
        raise
    finally:
        watchdog.close(state)
        _current = None


def reset_in_child() -> None:
    """A forked child is no rank: it must die of SIGTERM, and with its parent."""
    if _current is not None and _current.thread is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        die_with_parent()


os.register_at_fork(after_in_child=reset_in_child)
