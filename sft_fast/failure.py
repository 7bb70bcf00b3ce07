"""What a process does when it is told to stop, when another rank fails, and when nothing moves.

One thread per rank looks after all of it, so that a rank which is stuck in a collective still
answers. Ranks of a launch meet in `<output_dir>/.launch/<id>`: each writes what it does there, the
first that fails or has to leave says so, the others follow. Nothing here imports torch.

    <output_dir>/status.json    where the run stands, renewed by rank 0
    <output_dir>/error.json     the first failure: rank, phase, cause
    <output_dir>/stacks/        stacks of every rank that saw a hang
    <output_dir>/SAVE, STOP     made by the user: save now; save and leave
"""

import contextlib
import faulthandler
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil

from sft_fast.exit_codes import FAILED, HANG, INTERRUPTED
from sft_fast.processes import die_with_parent, end_children, is_alive, is_stopped
from sft_fast.redact import redact
from sft_fast.run_lock import HEARTBEAT_S, RunLock, check_output_dir

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_S = 0.25
PUBLISH_S = 2.0
RANKS_THAT_LOOK_PER_S = 500
RANKS_THAT_WRITE_PER_S = 50
# torchrun kills 30 s after SIGTERM.
LEAVE_WITHIN_S = 25.0
ORPHAN_LEAVES_WITHIN_S = 4.0
# A rank that another one's failure reaches by itself gets this long to leave in its own way.
FOLLOW_S = 1.5
# torchrun passes a Ctrl-C on that the rank has had from the terminal already.
SECOND_INTERRUPT_S = 0.5
# The first step compiles kernels.
FIRST_STEP_FACTOR = 10
SLOW_STEP_FACTOR = 10
OLD_LAUNCH_S = 60.0
HALF_WRITTEN = (".status.json.*", ".error.json.*", ".config.yaml.*", ".lock-*")
# What a rank announces, the state that follows from it, and the exit code of who follows.
ANNOUNCEMENTS = (("failed", "failed", FAILED), ("left", "preempted", 0))
OUT_OF_MEMORY_HINT = (
    "\nlower train.micro_batch_size or packing.capacity, or set model.recompute=full; "
    "parallel.tensor and parallel.pipeline spread the model over more ranks"
)


class Watch:
    """Looks after one process; to be used in a `with`. Without `start` it only takes notes.

    Attributes:
        phase: what the process does; named in every report.
        stop_requested, save_requested: what this rank was told.
        all_stop, all_save: what all ranks agreed on at the end of a step.
        is_on_trial: a finished run is here, and nothing says yet that this one goes on from it.
    """

    def __init__(self, output: Path, hang_timeout_s: float = 120.0):
        self.output, self.hang_timeout_s = output, hang_timeout_s
        env = os.environ
        self.rank, self.world_size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        first = self.rank - int(env.get("LOCAL_RANK", "0"))
        local = range(first, first + int(env.get("LOCAL_WORLD_SIZE", "1")))
        self.unmet = {rank for rank in local if rank != self.rank}
        """Ranks of this machine that have not shown themselves yet."""
        self.met: dict[int, dict[str, Any]] = {}
        self.publish_every_s = max(PUBLISH_S, self.world_size / RANKS_THAT_WRITE_PER_S)
        self.launch, self.job = launch_name()
        self.folder = output / ".launch" / self.launch
        self.parent = os.getppid()
        self.started = self.launched = time.time()
        if "TORCHELASTIC_RUN_ID" in env:
            self.launched = psutil.Process(self.parent).create_time()
        self.phase, self.can_leave = "start", True
        self.stop_requested = self.save_requested = False
        self.all_stop = self.all_save = self.is_on_trial = False
        self.stop_reason = ""
        self.progress: dict[str, Any] = {}
        self.first_step: tuple[int, float] | None = None
        self.last_beat: float | None = None
        self.slowest_s = 0.0
        self.leave_at = math.inf
        self.interrupted_at = -math.inf
        self.stale: dict[str, dict[str, Any]] = {}
        """Announcements of an earlier launch that had the same name."""
        self.lock: RunLock | None = None
        self.is_closed = threading.Event()
        self.thread: threading.Thread | None = None
        self.old_handlers: dict[int, Any] = {}
        self.stacks: Any = None

    # --- what the main thread calls

    def start(self) -> "Watch":
        """Takes the run directory and begins to look.

        Raises:
            ValueError: the directory cannot be written, or another job uses it.
        """
        check_output_dir(self.output)
        self.output.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.lock = RunLock(self.output, self.job)
            self.tidy()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, _, _ in ANNOUNCEMENTS:
            record = read_json(self.folder / name)
            if record is not None and record["time"] < self.launched:
                self.stale[name] = record
        self.is_on_trial = (read_json(self.output / "status.json") or {}).get("state") == "finished"
        self.publish("running")
        self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            self.old_handlers = {number: signal.signal(number, ignore) for number in SIGNALS}
            self.old_handlers[0] = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.run, name="sft_fast watch", daemon=True)
        self.thread.start()
        return self

    def enter(self, phase: str, can_leave: bool = False) -> None:
        """Names what comes next.

        Args:
            can_leave: nothing would be lost if the process left at any moment.
        """
        self.last_beat = None
        self.phase, self.can_leave = phase, can_leave
        if self.thread is not None:
            self.publish("running")

    def accept(self) -> None:
        """Says that the run belongs here; a refused one leaves a finished run's records alone."""
        self.is_on_trial = False

    def beat(self, **progress: Any) -> None:
        """Says that a step ended; from now on the next one must within the time limit."""
        now = time.monotonic()
        if self.last_beat is not None:
            self.slowest_s = max(self.slowest_s, now - self.last_beat)
        self.last_beat = now
        self.progress |= progress
        if "step" not in progress:
            return
        if self.first_step is None:
            self.first_step = (progress["step"], now)
        step, began = self.first_step
        per_step_s = (now - began) / max(progress["step"] - step, 1)
        left = self.progress.get("num_steps", progress["step"]) - progress["step"]
        self.progress["eta_s"] = round(left * per_step_s, 1) if now > began else None

    @contextlib.contextmanager
    def paused(self, phase: str, can_leave: bool = False) -> Iterator[None]:
        """A phase inside another one, without its time limit."""
        before, was_timed = (self.phase, self.can_leave), self.last_beat is not None
        self.last_beat = None
        self.phase, self.can_leave = phase, can_leave
        yield
        self.phase, self.can_leave = before
        self.last_beat = time.monotonic() if was_timed else None

    def requests(self) -> tuple[float, float]:
        """(save, stop): this rank's votes, 0 or 1."""
        return float(self.save_requested), float(self.stop_requested)

    def agree(self, save: float, stop: float) -> None:
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
        """
        if self.thread is None:
            return True
        record = self.record() | {"phase": phase or self.phase, "cause": redact(cause), **details}
        if not self.announce("failed", record):
            return False
        if is_refusal and self.is_on_trial:
            return True
        with contextlib.suppress(OSError):
            write_json(self.output / "error.json", record, mode=0o640)
        self.write_status("failed", cause=record["cause"])
        return True

    def close(self, state: str) -> None:
        """Ends the watch: `finished`, `preempted` (saved, to be resumed) or `failed`."""
        if self.thread is None:
            return
        self.is_closed.set()
        self.thread.join()
        self.thread = None
        faulthandler.cancel_dump_traceback_later()
        if 0 in self.old_handlers:
            signal.set_wakeup_fd(self.old_handlers.pop(0))
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        for descriptor in self.pipe:
            os.close(descriptor)
        if self.stacks is not None:
            self.stacks.close()
        self.publish("done")
        if self.rank == 0:
            if state != "failed":
                self.write_status(state)
            assert self.lock is not None, "rank 0 takes the lock in start"
            self.lock.release()

    # --- the thread

    def run(self) -> None:
        next_publish = next_lock = next_look = 0.0
        while not self.is_closed.is_set():
            now = time.monotonic()
            if now >= next_publish:
                next_publish = now + self.publish_every_s
                self.publish("running")
                self.guard_against_stuck_interpreter()
                if self.rank == 0 and not self.is_on_trial:
                    self.write_status("stopping" if self.stop_requested else "running")
            if self.lock is not None and now >= next_lock:
                next_lock = now + HEARTBEAT_S
                if not self.lock.beat():
                    cause = "the lock of output_dir was taken by another job"
                    self.fail(cause)
                    self.leave("failed", FAILED, cause)
            signals = self.wait_for_signals()
            if signals or now >= next_look:
                # A shared file system should not feel a large job.
                next_look = now + self.world_size / RANKS_THAT_LOOK_PER_S
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
        self.meet()
        # Looked for first: who is found dead then has announced what it had to.
        dead = self.dead_peers()
        for name, state, code in ANNOUNCEMENTS:
            announced = self.announced(name)
            if announced is not None:
                self.is_closed.wait(FOLLOW_S if patient else 0.0)
                if not self.is_closed.is_set():
                    code = announced.get("exit_code", code)
                    if code == HANG:
                        self.dump_stacks()
                    self.leave(state, code, announced["cause"])
        for rank, peer in dead:
            cause = f"process {peer['pid']} of rank {rank} is gone: killed, or crashed"
            facts = {"rank": rank, "pid": peer["pid"], "reported_by": self.rank}
            self.fail(cause, peer["phase"], **facts)
            self.leave("failed", FAILED, cause)

    def meet(self) -> None:
        for rank in sorted(self.unmet):
            peer = read_json(self.folder / f"rank_{rank:05d}.json")
            # A file of an earlier start has another parent.
            if peer is not None and peer["parent"] == self.parent:
                self.met[rank] = peer
                self.unmet.remove(rank)

    def dead_peers(self) -> list[tuple[int, dict[str, Any]]]:
        """Ranks on this machine, of the same parent, that ended without saying so."""
        dead = []
        for rank, peer in self.met.items():
            if not is_alive(peer["pid"]):
                last = read_json(self.folder / f"rank_{rank:05d}.json") or peer
                if last["pid"] == peer["pid"] and last["state"] != "done":
                    dead.append((rank, last))
        return dead

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
        is_refusal = isinstance(error, ValueError | OSError)
        self.fail(f"{type(error).__name__}: {error}{hint}", is_refusal=is_refusal)

    def peers(self) -> list[tuple[int, dict[str, Any]]]:
        """All other ranks, as they last showed themselves."""
        paths = sorted(self.folder.glob("rank_*.json"))
        found = [(int(path.stem[5:]), read_json(path)) for path in paths]
        return [(rank, peer) for rank, peer in found if peer is not None and rank != self.rank]

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
        if os.getppid() != self.parent:
            self.request_stop("the parent process is gone", ORPHAN_LEAVES_WITHIN_S)
        if self.stop_requested and self.can_leave:
            self.announce("left", self.record() | {"cause": self.stop_reason})
            self.leave("preempted", 0)
        if now > self.leave_at:
            text = f"could not save within {LEAVE_WITHIN_S:.0f} s of {self.stop_reason}"
            self.fail(text)
            self.leave("failed", HANG, text)

    def request_stop(self, reason: str, within_s: float = LEAVE_WITHIN_S) -> None:
        if not self.stop_requested:
            self.stop_reason = reason
            self.stop_requested = True
            say(f"rank {self.rank}: {reason} in phase {self.phase}: saving and leaving")
        self.leave_at = min(self.leave_at, time.monotonic() + within_s)

    def look_for_triggers(self) -> None:
        if self.rank != 0:
            return
        if take(self.output / "STOP"):
            self.request_stop("file STOP", math.inf)
        if take(self.output / "SAVE"):
            self.save_requested = True

    def look_for_hang(self) -> None:
        if self.last_beat is None:
            return
        silent_s = time.monotonic() - self.last_beat
        limit_s = max(self.hang_timeout_s, SLOW_STEP_FACTOR * self.slowest_s)
        if self.slowest_s == 0.0:
            limit_s *= FIRST_STEP_FACTOR
        if silent_s < limit_s:
            return
        self.dump_stacks()
        self.publish("hangs")
        # So that every rank dumps, and says how far it is, before torchrun ends the others.
        self.is_closed.wait(FOLLOW_S)
        cause = f"no step ended for {silent_s:.0f} s; {self.suspects()}"
        if self.fail(cause, exit_code=HANG):
            say(f"rank {self.rank}: {cause}; stacks of all ranks: {self.output / 'stacks'}")
        self.leave("failed", HANG, cause)

    def suspects(self) -> str:
        """Says which ranks give no sign of life, or are behind."""
        now, peers = time.time(), self.peers()
        limit_s = 3 * self.publish_every_s
        silent = [rank for rank, peer in peers if now - peer["time"] > limit_s]
        host = socket.gethostname()
        stopped = [r for r, peer in peers if peer["host"] == host and is_stopped(peer["pid"])]
        if stopped:
            return f"ranks that are stopped by a signal: {sorted(stopped)}"
        if silent:
            return f"ranks that give no sign of life: {silent}"
        steps = {rank: peer.get("step", 0) for rank, peer in peers}
        steps[self.rank] = self.progress.get("step", 0)
        last = min(steps.values())
        behind = [rank for rank, step in sorted(steps.items()) if step == last]
        if len(behind) < len(steps):
            return f"ranks that are behind: {behind}"
        return f"all ranks wait after step {last}"

    def dump_stacks(self) -> None:
        folder = self.output / "stacks"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self.rank:05d}.txt").open("w") as file:
                file.write(f"{json.dumps(self.record())}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)

    def guard_against_stuck_interpreter(self) -> None:
        """A C thread that ends the process when this thread no longer gets to run."""
        if self.stacks is None:
            try:
                self.stacks = (self.folder / f"stuck_{self.rank:05d}.txt").open("w")
            except OSError:
                return  # the disk is full for now
        limit_s = max(FIRST_STEP_FACTOR * self.hang_timeout_s, SLOW_STEP_FACTOR * self.slowest_s)
        faulthandler.dump_traceback_later(limit_s, file=self.stacks, exit=True)

    def leave(self, state: str, code: int, cause: str | None = None) -> NoReturn:
        """Ends the process at once: the main thread may be stuck where no exception reaches it."""
        if self.rank == 0 and not self.is_on_trial:
            self.write_status(state, cause=cause or self.stop_reason)
        self.publish("done")
        if self.lock is not None:
            self.lock.release()
        end_children()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    # --- files

    def record(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "parent": self.parent,
            "phase": self.phase,
            "time": time.time(),
            "launch": self.launch,
            **self.progress,
        }

    def publish(self, state: str) -> None:
        with contextlib.suppress(OSError):
            write_json(self.folder / f"rank_{self.rank:05d}.json", self.record() | {"state": state})

    def announce(self, name: str, record: dict[str, Any]) -> bool:
        """Makes the file `name` unless another rank was first."""
        path, temporary = self.folder / name, self.folder / f".{name}_{self.rank}"
        try:
            if self.stale.get(name) is not None and read_json(path) == self.stale[name]:
                path.unlink(missing_ok=True)
            write_json(temporary, record)
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            return True  # a full disk must not hide the failure
        return True

    def announced(self, name: str) -> dict[str, Any] | None:
        """What another rank of this launch announced."""
        record = read_json(self.folder / name)
        if record is None or record == self.stale.get(name):
            return None
        # Not by process id: ranks in containers have the same ones.
        return record if record.get("reported_by", record["rank"]) != self.rank else None

    def write_status(self, state: str, **more: Any) -> None:
        """Readable at any time; `heartbeat` is renewed every two seconds while the run lives."""
        done = {"job": self.job, "started": self.started, "heartbeat": time.time()}
        with contextlib.suppress(OSError):
            write_json(
                self.output / "status.json", {"state": state, **self.record(), **done, **more}
            )

    def tidy(self) -> None:
        """Removes what earlier launches left; this launch's other ranks may be here already."""
        old = [path for path in self.folder.parent.glob("*") if path != self.folder]
        # What a kill left between writing a file and giving it its name.
        for pattern in HALF_WRITTEN:
            old += self.output.glob(pattern)
        for path in old:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.started - OLD_LAUNCH_S:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        (self.output / "error.json").unlink(missing_ok=True)
        shutil.rmtree(self.output / "stacks", ignore_errors=True)


def launch_name() -> tuple[str, str]:
    """(name of this start of all ranks, name of the job that its restarts share)."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env:
        own = f"process-{os.getpid()}"
        return own, own
    job = f"{env['TORCHELASTIC_RUN_ID']}-{env.get('MASTER_PORT', '')}"
    job = re.sub(r"[^\w.-]", "_", job, flags=re.ASCII)
    return f"{job}-attempt{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", job


def read_json(path: Path) -> dict[str, Any] | None:
    """None when it is not there, or half-written as some file systems show it for a moment."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def take(path: Path) -> bool:
    """Removes a trigger file; True when it was there."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def ignore(number: int, frame: object) -> None:
    """The thread hears of a signal through the wake-up pipe; this only keeps the default away."""


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def write_json(path: Path, value: dict[str, Any], mode: int = 0o644) -> None:
    """In one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.replace(temporary, path)


_current: Watch | None = None


def current_watch() -> Watch:
    """The watch of this process; one that only takes notes where none was started."""
    global _current
    if _current is None:
        _current = Watch(Path("."))
    return _current


@contextlib.contextmanager
def watching(output: Path, hang_timeout_s: float) -> Iterator[Watch]:
    """Starts the process's watch, and ends it with the state that fits how the body ended."""
    global _current
    watch = Watch(output, hang_timeout_s).start()
    _current = watch
    state = "failed"
    try:
        yield watch
        state = "preempted" if watch.stop_requested else "finished"
    except BaseException as error:  # recorded, not handled
        watch.fail_with(error)
        raise
    finally:
        watch.close(state)
        _current = None


def reset_in_child() -> None:
    """A forked child is no rank: it must die of SIGTERM, and with its parent."""
    if _current is not None and _current.thread is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        die_with_parent()


os.register_at_fork(after_in_child=reset_in_child)
