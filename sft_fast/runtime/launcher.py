"""torchrun, with our signals and without its traceback.

    python -m sft_fast.runtime.launcher [--debug] RUN_DIR TORCHRUN_ARGUMENTS

A rank that fails prints why. Below that torchrun prints its own call stack and a table, which may
name another rank; here follows one line, and none for a user error, which has its own message.
--debug leaves what torchrun says as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from sft_fast.exit_codes import DAMAGED, FAILED, USER_ERROR
from sft_fast.files import read_json
from sft_fast.runtime.launch_files import written_at
from sft_fast.runtime.mapped_files import after_bus_error
from sft_fast.runtime.signals import wanted_signals
from sft_fast.runtime.terminal import open_streams, printable

# They repeat that a rank failed, and that a signal has come.
TORCHRUN_LOGGERS = ("multiprocessing.api", "agent.server.api")
KILLED_BY = ": by someone, or by the system for want of memory"


class SignalRelay:
    """Passes every signal of this process on to the ranks, which save and leave.

    torchrun passes the first one on, waits for the ranks, and kills them when it takes them too
    long. A later one would make it forget to wait.
    """

    def __init__(self) -> None:
        from torch.distributed.elastic.multiprocessing import api

        self.has_begun = False
        self.numbers = wanted_signals()
        # torchrun takes its signals each time that it starts the ranks, but not all of ours.
        api._terminate_process_handler = self.handle  # type: ignore[assignment]
        for number in self.numbers:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler.

        Raises:
            SignalException: for torchrun, at the first signal.
        """
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if number == signal.SIGHUP and number not in self.numbers:
            return
        if not self.has_begun:
            self.has_begun = True
            name = signal.Signals(number).name
            raise SignalException(f"{name} has come", signal.Signals(number))
        for rank in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)


def main(run_dir: Path, arguments: list[str], debug: bool = False) -> int:
    """Runs the ranks to their end.

    Args:
        run_dir: output_dir of the run, where ranks record the first failure.
        arguments: of torchrun.
        debug: torchrun may say what it says by itself.

    Returns: 0; the exit code of the rank that failed first, 1 where a signal ended it; 128 + the
        number of the signal that ended this process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if not debug:
        for name in TORCHRUN_LOGGERS:
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    began = time.time()
    SignalRelay()
    explain_bus_errors(run_dir)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        if debug:
            raise
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (USER_ERROR, DAMAGED):
            ended = f"rank {rank} ended with exit code {failure.exitcode}"
            if failure.exitcode < 0:
                ended = f"rank {rank} was ended by {failure.signal_name()}"
                if -failure.exitcode == signal.SIGKILL:
                    ended += KILLED_BY
            say(f"error: {recorded_failure(run_dir, began) or ended}")
        return max(failure.exitcode, FAILED)
    except SignalException as error:
        if failure_text := recorded_failure(run_dir, began):
            say(f"error: {failure_text}")
        return 128 + int(error.sigval)
    return 0


def explain_bus_errors(run_dir: Path) -> None:
    """Has the files named that a rank ended by SIGBUS may have touched, before it starts again."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    look_at = ProcessFailure.__post_init__

    def look_at_failure(failure: ProcessFailure) -> None:
        look_at(failure)
        if -failure.exitcode == signal.SIGBUS:
            launches = sorted((run_dir / ".launch").glob("*"), key=written_at)
            say(f"local rank {failure.local_rank}: {after_bus_error(launches)}")

    ProcessFailure.__post_init__ = look_at_failure  # type: ignore[method-assign]


def say(text: str) -> None:
    """Prints to standard error, which may be a terminal that was closed."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def recorded_failure(run_dir: Path, began: float) -> str:
    """The first failure in error.json since `began`, seconds since 1970; "" = there is none."""
    path = run_dir / "error.json"
    record = read_json(path)
    if record is None or path.stat().st_mtime < began:
        return ""
    place = f"rank {record.get('rank')}, phase {record.get('phase')}"
    return f"{place}: {record.get('cause')} ({path})"


if __name__ == "__main__":
    open_streams()
    is_debug = sys.argv[1] == "--debug"
    run_dir, *torchrun_arguments = sys.argv[1 + is_debug :]
    raise SystemExit(main(Path(run_dir), torchrun_arguments, is_debug))
