"""What breaks inside the ranks of a soak; a plugin of its run, told by files what to do.

A file `rank<N>` in the folder $SFT_FAST_SOAK holds the name of a fault; the rank finds it at its
next step. Some faults come at once, the others at the next save or the next line of the log.
"""

import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_fast.megatron import train_step as step_module
from sft_fast.megatron import training
from sft_fast.megatron.checkpoint import save

ORDER = Path(os.environ["SFT_FAST_SOAK"]) / f"rank{os.environ.get('RANK', '0')}"
waiting: set[str] = set()


def is_due(fault: str) -> bool:
    """Whether a fault waits for its place; it happens once."""
    is_waiting = fault in waiting
    waiting.discard(fault)
    return is_waiting


def obey() -> None:
    """Reads what this rank is to break."""
    if not ORDER.exists():
        return
    waiting.add(ORDER.read_text())
    ORDER.unlink()
    if is_due("raise"):
        raise RuntimeError("the device gave up")
    if is_due("no device memory"):
        raise MemoryError("out of memory")
    if is_due("hang"):
        time.sleep(3600)


class Tracker:
    """A tracker that cannot be reached now and then."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        if is_due("tracker"):
            raise ConnectionError("the service is away")

    def close(self) -> None:
        pass


train_step, run_schedule, write_snapshot = (
    training.train_step,
    step_module.run_schedule,
    save.write_snapshot,
)


def step(*args: Any, **options: Any) -> Any:
    obey()
    return train_step(*args, **options)


def schedule(model: Any, *args: Any) -> Any:
    reports = run_schedule(model, *args)
    if is_due("nan"):
        for buffer in model[0].buffers:
            buffer.grad_data.mul_(float("nan"))
    return reports


def write(*args: Any) -> None:
    if is_due("full disk"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[1].path / "x"))
    if is_due("writer"):
        raise RuntimeError("the writer broke")
    write_snapshot(*args)


training.train_step = step
training.open_trackers = lambda *_: [Tracker()]
step_module.run_schedule = schedule
save.write_snapshot = write
