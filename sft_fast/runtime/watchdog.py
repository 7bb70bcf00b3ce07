"""The watchdog of a rank: a thread that sees signals, failures of other ranks, and hangs.

It is a thread, so that a rank whose main thread is stuck in a collective still answers.
The main thread tells it through `Phases`. Through launch_files.py the first rank that fails or has
to leave says so, and the others follow. Nothing here imports torch.

    <output_dir>/SAVE, STOP     made by the user: save now; save and leave
"""

import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from sft_fast.errors import exit_code, first_line
from sft_fast.exit_codes import FAILED, HANG, INTERRUPTED
from sft_fast.files import read_json, write_json
from sft_fast.redact import redact
from sft_fast.runtime.hang import HangDetector
from sft_fast.runtime.launch_files import LaunchFiles
from sft_fast.runtime.mapped_files import shortened
from sft_fast.runtime.phases import Phases
from sft_fast.runtime.processes import end_children
from sft_fast.runtime.run_directory import claim
from sft_fast.runtime.run_files import list_checkpoints
from sft_fast.runtime.run_lock import HEARTBEAT_S, STALE_S, RunLock
from sft_fast.runtime.signals import SIGNALS, SignalPipe
from sft_fast.runtime.terminal import printable

POLL_S = 0.25
RANKS_THAT_LOOK_PER_S = 500
# torchrun kills 30 s after SIGTERM.
LEAVE_WITHIN_S = 25.0
ORPHAN_LEAVES_WITHIN_S = 4.0
# A rank that another one's failure reaches by itself gets this long to leave in its own way.
FOLLOW_S = 1.5
# torchrun passes a Ctrl-C on that the rank has had from the terminal already.
SECOND_INTERRUPT_S = 0.5
# A rank of another machine that did not publish that often is taken for lost.
SILENT_PUBLICATIONS = 3
# In a save, whose files may hold these up, and where no connection tells that it was lost.
SILENT_PUBLICATIONS_IN_SAVE = 10
NO_SAVE = "there is no checkpoint yet"
# How torch, gloo, NCCL and RCCL say that the other end of a connection is gone.
LOST_CONNECTION = re.compile(
    r"connection|peer|socket|nccl|gloo|broken pipe|timed? ?out|DistBackend|DistNetwork", re.I
)
# What a rank announces, the state that follows from it, and the exit code of who follows if it
# names no other.
FOLLOWED = (("failed", "failed", FAILED), ("left", "preempted", 0))
OUT_OF_MEMORY_HINT = (
    "\nlower train.micro_batch_size or packing.capacity, or set model.recompute=full; "
    "parallel.tensor and parallel.pipeline spread the model over more ranks"
)


class Watchdog:
    """A thread that looks after one rank, from `start` to `close`.

    Attributes:
        phases: what the main thread says it is doing.
        lock: of the run directory; rank 0's only.
        leave_at: time.monotonic() at which a stop that was asked for has taken too long.
    """

    def __init__(self, output: Path, hang_timeout_s: float):
        self.output = output
        self.files = LaunchFiles(output)
        self.parent = os.getppid()
        self.hang = HangDetector(self.files, hang_timeout_s)
        self.phases = Phases(self.files, self.hang)
        self.rank = self.files.rank
        self.stop_reason = ""
        self.leave_at = math.inf
        self.interrupted_at = -math.inf
        self.lock: RunLock | None = None
        self.next_publish = self.next_lock = self.next_look = self.next_search = 0.0
        self.missed: set[int] = set()
        """Ranks that had been silent for too long when last looked at in a save."""
        self.heard = b""
        """The signals that came last."""
        self.told: set[str] = set()
        """Warnings of the thread itself."""
        self.report_lock = threading.Lock()
        self.is_leaving = self.is_over = False
        """What the files say is the last word; the other thread must not say "running" after it."""
        self.is_closed = threading.Event()
        self.thread = threading.Thread(target=self.run, name="sft_fast watchdog", daemon=True)

    def start(self) -> None:
        """Takes the run directory, and starts the thread.

        Raises:
            ValueError: the directory cannot be written, holds files of others, or another job
                uses it.
        """
        claim(self.output)
        if self.rank == 0:
            # The lock of a rank 0 that was killed elsewhere, for a restart on other machines.
            is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            patience_s = STALE_S + HEARTBEAT_S if is_restart else 0.0
            self.lock = RunLock(self.output, self.files.job, patience_s)
            self.files.tidy()
        self.files.open()
        status = read_json(self.output / "status.json") or {}
        self.phases.is_unconfirmed = status.get("state") == "finished"
        self.phases.is_watched = True
        self.files.publish("running")
        self.signals = SignalPipe()
        self.thread.start()

    def close(self, state: str) -> None:
        """Ends the thread.

        Args:
            state: of the run: `finished`, `preempted` (saved, to be resumed) or `failed`.
        """
        self.is_closed.set()
        self.thread.join()
        self.phases.is_watched = False
        self.hang.close()
        self.signals.close()
        self.files.publish("done")
        if self.rank == 0:
            if state != "failed":
                self.write_last_status(state)
            assert self.lock is not None, "rank 0 takes the lock in start"
            self.lock.release()

    def fail(
        self, cause: str, phase: str | None = None, is_refusal: bool = False, **details: Any
    ) -> bool:
        """Records a failure; returns True when it is the launch's first.

        Args:
            cause: the message.
            phase: in which it happened; None = the present one.
            is_refusal: the user can fix it.
            details: more for error.json; with `exit_code` the ranks that follow end.
        """
        # The main thread's workers are ended under it.
        if self.is_leaving:
            return False
        record = self.files.record() | {
            "phase": phase or self.files.phase,
            "cause": redact(cause),
            **details,
        }
        if not self.files.announce("failed", record):
            first = self.files.announced("failed")
            if self.rank == 0 and first is not None and not self.phases.is_unconfirmed:
                self.write_last_status("failed", cause=first["cause"])
            return False
        if is_refusal and self.phases.is_unconfirmed:
            return True
        with contextlib.suppress(OSError):
            write_json(self.output / "error.json", record, mode=0o640)
        self.write_last_status("failed", cause=record["cause"])
        return True

    def write_last_status(self, state: str, **more: Any) -> None:
        """Writes status.json for the last time, or once more with another state."""
        with self.report_lock:
            self.is_over = True
            self.files.write_status(state, **more)

    def fail_with(self, error: BaseException) -> None:
        """Records an exception of the main thread.

        Where it only is what another rank's death looks like from here, this process ends without
        a second message.
        """
        if isinstance(error, RuntimeError):
            # A connection is closed a moment before its process is seen to be dead.
            deadline = time.monotonic() + FOLLOW_S / 2
            while time.monotonic() < deadline:
                self.follow_others(patient=False)
                time.sleep(POLL_S / 5)
            if self.blames_silent_rank(error):
                return
        hint = OUT_OF_MEMORY_HINT if "OutOfMemory" in type(error).__name__ else ""
        text = f"{type(error).__name__}: {error}{hint}"
        if isinstance(error, ValueError | OSError):
            self.fail(text, is_refusal=True, exit_code=exit_code(error))
        else:
            self.fail(text)

    def blames_silent_rank(self, error: RuntimeError) -> bool:
        """Records a rank of another machine that fell silent, where `error` is a lost connection.

        Of a machine that is cut off or has lost its power, nobody else tells.
        """
        is_lost = LOST_CONNECTION.search(f"{type(error).__name__} {error}")
        if self.files.num_elsewhere == 0 or not is_lost:
            return False
        limit_s = SILENT_PUBLICATIONS * self.files.publish_every_s
        deadline = time.monotonic() + limit_s + self.files.publish_every_s
        while time.monotonic() < deadline:
            self.follow_others(patient=False)
            time.sleep(POLL_S)
        lost = self.files.lost_peers(limit_s)
        if lost:
            self.blame(lost, f"rank {self.rank} lost the connection: {first_line(error)}")
        return bool(lost)

    def blame(self, lost: dict[int, dict[str, Any]], consequence: str) -> str:
        """Records that ranks fell silent; returns the cause.

        Args:
            lost: the ranks, and their last records.
            consequence: what this rank has seen of it.
        """
        rank, peer = next(iter(lost.items()))
        hosts = ", ".join(sorted({str(record.get("host")) for record in lost.values()}))
        cause = f"ranks {sorted(lost)} on {hosts} give no sign of life; {consequence}"
        self.fail(cause, peer.get("phase"), rank=rank, host=peer.get("host"), reported_by=self.rank)
        return cause

    # --- the thread

    def run(self) -> None:
        """The thread's loop: publishes, renews the lock, answers signals, looks for hangs."""
        duties = (
            self.handle_signals,
            self.publish,
            self.keep_lock,
            self.look_at_others,
            self.look_for_triggers,
            self.look_for_hang,
            self.look_for_lost_machine,
        )
        while not self.is_closed.is_set():
            self.heard = self.signals.wait(POLL_S)
            self.hang.tick()
            for duty in duties:
                self.attempt(duty)

    def attempt(self, duty: Callable[[], None]) -> None:
        """Does one of the thread's duties; whatever becomes of it, the others are still done."""
        try:
            duty()
        # Without this thread nobody answers signals, renews the lock or sees a hang.
        except Exception as error:
            text = f"rank {self.rank}: warning: the watchdog met {type(error).__name__}: {error}"
            if text not in self.told:
                self.told.add(text)
                log(text)

    def publish(self) -> None:
        """Says how far this rank is, when it is time to."""
        now = time.monotonic()
        if now < self.next_publish:
            return
        self.next_publish = now + self.files.publish_every_s
        self.hang.guard_against_stuck_interpreter()
        with self.report_lock:
            if self.is_over:
                return
            self.files.publish("running")
            if self.rank == 0 and not self.phases.is_unconfirmed:
                self.files.write_status("stopping" if self.phases.stop_requested else "running")

    def keep_lock(self) -> None:
        """Renews the lock, when it is time to."""
        now = time.monotonic()
        if self.lock is None or now < self.next_lock:
            return
        self.next_lock = now + HEARTBEAT_S
        if not self.lock.renew():
            cause = "the lock of output_dir was taken by another job"
            self.fail(cause)
            self.leave("failed", FAILED, cause)

    def look_at_others(self) -> None:
        """Follows the others, when it is time to look; a shared file system should not feel it."""
        now = time.monotonic()
        if self.heard or now >= self.next_look:
            self.next_look = now + self.files.world_size / RANKS_THAT_LOOK_PER_S
            self.follow_others()

    def follow_others(self, patient: bool = True) -> None:
        """Ends this process when another rank failed, left, or died without a record.

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
            if cut_off := shortened([self.files.folder]):
                cause += f"; {cut_off}"
            facts = {"rank": rank, "pid": peer["pid"], "reported_by": self.rank}
            self.fail(cause, peer["phase"], **facts)
            self.leave("failed", FAILED, cause)

    def handle_signals(self) -> None:
        """Asks the run to stop, or leaves at once at a second Ctrl-C."""
        now = time.monotonic()
        for number in self.heard:
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            is_interrupt = number == signal.SIGINT
            if is_interrupt and now - self.interrupted_at > SECOND_INTERRUPT_S:
                if math.isfinite(self.interrupted_at):
                    self.leave("preempted", INTERRUPTED)
                self.interrupted_at = now
            self.request_stop(name)
        if os.getppid() != self.parent:
            self.request_stop("the parent process is gone", ORPHAN_LEAVES_WITHIN_S)
        if self.phases.stop_requested and self.phases.can_leave:
            self.files.announce("left", self.files.record() | {"cause": self.stop_reason})
            self.leave("preempted", 0)
        if now > self.leave_at:
            text = f"could not save within {LEAVE_WITHIN_S:.0f} s of {self.stop_reason}"
            self.fail(text, exit_code=HANG)
            self.leave("failed", HANG, text)

    def request_stop(self, reason: str, within_s: float = LEAVE_WITHIN_S) -> None:
        """Asks the main thread to save and leave within a time, in seconds."""
        if not self.phases.stop_requested:
            self.stop_reason = reason
            self.phases.stop_requested = True
            log(f"rank {self.rank}: {reason} in phase {self.files.phase}: saving and leaving")
        self.leave_at = min(self.leave_at, time.monotonic() + within_s)

    def look_for_triggers(self) -> None:
        """Handles the files STOP and SAVE, and removes them."""
        if self.rank != 0:
            return
        if remove_trigger(self.output / "STOP"):
            self.request_stop("file STOP", math.inf)
        if remove_trigger(self.output / "SAVE"):
            self.phases.save_requested = True

    def look_for_hang(self) -> None:
        """Ends the run where it hangs, with the stacks of all ranks."""
        silence = self.hang.find_hang()
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

    def look_for_lost_machine(self) -> None:
        """Ends the run where it waits in a save for a machine that is gone."""
        now = time.monotonic()
        limit_s = SILENT_PUBLICATIONS_IN_SAVE * self.files.publish_every_s
        if self.files.phase != "save" or self.files.num_elsewhere == 0:
            self.next_search, self.missed = now + limit_s, set()
        if now < self.next_search:
            return
        self.next_search = now + self.files.publish_every_s
        lost = self.files.lost_peers(limit_s)
        # Twice: after all were suspended, some are heard of later than others.
        missed, self.missed = self.missed, set(lost)
        if lost and self.missed <= missed:
            there = list_checkpoints(self.output / "checkpoints")
            rest = f"rerun the same command to resume from {there[-1].name}" if there else NO_SAVE
            cause = self.blame(lost, f"a save waited for them and was given up; {rest}")
            self.leave("failed", FAILED, cause)

    def leave(self, state: str, code: int, cause: str | None = None) -> NoReturn:
        """Ends the process at once: the main thread may be stuck where no exception reaches it."""
        self.is_leaving = True
        if self.rank == 0 and not self.phases.is_unconfirmed:
            self.write_last_status(state, cause=cause or self.stop_reason)
        with self.report_lock:
            self.is_over = True
        self.files.publish("done")
        if self.lock is not None:
            self.lock.release()
        end_children()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def remove_trigger(path: Path) -> bool:
    """Removes a trigger file; True when it was there."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def log(text: str) -> None:
    """Prints to standard error; a full disk does not stop the run."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def watching(output: Path, hang_timeout_s: float) -> Iterator[Phases]:
    """Runs a watchdog beside the body, and ends it with the state that fits how the body ended.

    Yields: what the body tells its phases.

    Raises:
        ValueError: `output` cannot be written, holds files of others, or another job uses it.
    """
    watchdog = Watchdog(output, hang_timeout_s)
    watchdog.start()
    state = "failed"
    try:
        yield watchdog.phases
        state = "preempted" if watchdog.phases.stop_requested else "finished"
    except BaseException as error:  # recorded, not handled
        watchdog.fail_with(error)
        raise
    finally:
        watchdog.close(state)
