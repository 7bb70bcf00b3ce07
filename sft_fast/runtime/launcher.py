"""torchrun without its traceback: `python -m sft_fast.runtime.launcher RUN_DIR TORCHRUN_ARGUMENTS`.

A rank that fails prints why. Below that torchrun prints its own call stack and a table, which may
name another rank; here follows one line, and none for a user error, which has its own message.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from sft_fast.exit_codes import DAMAGED, FAILED, USER_ERROR
from sft_fast.files import read_json

# They repeat that a rank failed, and that a signal has come.
TORCHRUN_LOGGERS = ("multiprocessing.api", "agent.server.api")


def main(run_dir: Path, arguments: list[str]) -> int:
    """Runs the ranks to their end.

    Args:
        run_dir: output_dir of the run, where ranks record the first failure.
        arguments: of torchrun.

    Returns: 0; the exit code of the rank that failed first, 1 where a signal ended it; 128 + the
        number of the signal that ended this process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in TORCHRUN_LOGGERS:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    began = time.time()
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (USER_ERROR, DAMAGED):
            ended = f"rank {rank} ended with exit code {failure.exitcode}"
            if failure.exitcode < 0:
                ended = f"rank {rank} was ended by {failure.signal_name()}"
            print(f"error: {recorded_failure(run_dir, began) or ended}", file=sys.stderr)
        return max(failure.exitcode, FAILED)
    except SignalException as error:
        if failure_text := recorded_failure(run_dir, began):
            print(f"error: {failure_text}", file=sys.stderr)
        return 128 + int(error.sigval)
    return 0


def recorded_failure(run_dir: Path, began: float) -> str:
    """The first failure in error.json since `began`, seconds since 1970; "" = there is none."""
    path = run_dir / "error.json"
    record = read_json(path)
    if record is None or path.stat().st_mtime < began:
        return ""
    place = f"rank {record.get('rank')}, phase {record.get('phase')}"
    return f"{place}: {record.get('cause')} ({path})"


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
