"""Checkpoints that resume exactly: weights, optimizer, schedule and the position in the data.

A checkpoint is a directory `step_<number>`, written as manifest.py says: it appears whole, and what
later damages it is found before it is loaded. What is in it: shards.py. A run may resume with other
parallel sizes.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft_fast.config.sections import CheckpointConfig
from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
from sft_fast.megatron.checkpoint.load import quick_damage
from sft_fast.megatron.checkpoint.reading import check_complete
from sft_fast.megatron.checkpoint.shards import (
    Snapshot,
    own_share,
    take_snapshot,
    write_snapshot,
)
from sft_fast.megatron.checkpoint.train_state import STATE_FILE, TrainState, state_text
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.runtime.manifest import (
    REPLACED_PREFIX,
    TEMPORARY_PREFIX,
    LaterVersionError,
    StagedDirectory,
    agree,
    remove_directory,
    remove_whatever,
    staged_directory,
)
from sft_fast.runtime.phases import Phases
from sft_fast.runtime.run_files import checkpoint_path, checkpoint_step, list_checkpoints

logger = logging.getLogger(__name__)

Files = Mapping[str, Callable[[], bytes]]


class CheckpointWriter:
    """Saves a run's checkpoints and deletes old ones; every rank has one.

    A save that fails is reported and training goes on, until `max_failures` in a row or the last.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        log: Callable[[str], None],
        copier: HostCopier,
        phases: Phases,
    ):
        """
        Args:
            folder: of the run's checkpoints.
            config: when, how and how many.
            log: gets the warnings.
            copier: the one whose `before_update` comes before each optimizer update.
            phases: gets the number of failures in a row.
        """
        self.folder, self.config, self.log = folder, config, log
        self.copier, self.phases = copier, phases
        copier.log = log
        self.num_failures = 0
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.deadline = 0.0
        self.saving: Path | None = None
        self.saved_step: int | None = None
        self.warnings: list[str] = []
        self.has_room = True
        """The host had memory for a copy each time so far."""

    def prepare(self, sharded: dict[str, Any]) -> None:
        """Reserves host memory for saves of such a state beside the first steps."""
        self.copier.prepare([tensor for _, tensor in own_share(sharded).tensors])

    def save(
        self,
        state: TrainState,
        sharded: dict[str, Any],
        is_last: bool = False,
        files: Files | None = None,
    ) -> None:
        """Writes `folder/step_<n>`; with `asynchronous` and room for a copy on every rank beside
        the next steps.

        Args:
            state: where the run stands.
            sharded: what this rank has of weights and optimizer.
            is_last: the run ends with it.
            files: name -> content of more files; the main rank's are written.

        Raises:
            OSError: it failed on some rank, for whatever reason, and it was the last save or one
                failure too many; older checkpoints are untouched.
            TimeoutError: this or another rank hangs.
        """
        self.finish()
        exchange = StoreExchange("save", self.config.timeout_minutes * 60)
        copy, goes_on = None, False
        if self.config.asynchronous and not is_last:
            copy = self.copy(sharded)
            # A rank that waits for its file would look hung to those that train on.
            goes_on = all(exchange.all_gather("room", copy is not None))
        snapshot = own_share(sharded) if copy is None else copy
        self.saving = checkpoint_path(self.folder, state.step)
        self.deadline = time.monotonic() + 2 * exchange.timeout_s
        # A thread, so that a write which never returns does not take the time limit with it.
        self.thread = threading.Thread(
            target=self.write,
            args=(self.saving, state, snapshot, exchange, files or {}),
            daemon=True,
        )
        self.thread.start()
        if not goes_on:
            self.finish(is_last)

    def copy(self, sharded: dict[str, Any]) -> Snapshot | None:
        """This rank's share in host memory; None, and one warning, where there is no room."""
        try:
            return take_snapshot(sharded, self.copier)
        except MemoryError as error:
            if self.has_room:
                logger.warning(
                    "warning: rank %d has no memory for checkpoint.asynchronous (%s); saves hold "
                    "training up until they are written",
                    self.phases.rank,
                    error,
                )
            self.has_room = False
            return None

    def write(
        self,
        final: Path,
        state: TrainState,
        snapshot: Snapshot,
        exchange: StoreExchange,
        files: Files,
    ) -> None:
        """Runs in the thread."""
        try:
            needed = snapshot.num_bytes
            with staged_directory(final, exchange, needed, check_complete) as stage:
                agree(
                    exchange,
                    "files",
                    lambda: self.write_files(stage, state, snapshot, exchange, files),
                )
            self.saved_step = state.step
            if exchange.rank == 0:
                self.prune(state.step, state.early_stopping.get("best_step", 0))
        # Whatever it is, it belongs to the main thread; here nobody would see it.
        except BaseException as error:
            self.error = error

    def write_files(
        self,
        stage: StagedDirectory,
        state: TrainState,
        snapshot: Snapshot,
        exchange: StoreExchange,
        files: Files,
    ) -> None:
        """This rank's share of a checkpoint."""
        self.copier.wait()
        write_snapshot(snapshot, stage, exchange.rank)
        if exchange.rank == 0:
            stage.write_text(STATE_FILE, state_text(state))
            for name, content in files.items():
                with stage.create(name) as file:
                    file.write(content())

    def poll(self) -> None:
        """Tells of a save in the background as soon as it ended; raises as `save` does."""
        if self.thread is not None and (
            not self.thread.is_alive() or time.monotonic() > self.deadline
        ):
            self.finish()

    def finish(self, is_last: bool = False) -> None:
        """Waits for a save that is under way; raises as `save` does."""
        if self.thread is None:
            return
        self.thread.join(max(self.deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            raise TimeoutError(
                f"saving {self.saving} has not ended in {120 * self.config.timeout_minutes} s: the "
                "file system does not answer, or checkpoint.timeout_minutes is too short"
            )
        self.thread, error, self.error = None, self.error, None
        while self.warnings:
            self.log(self.warnings.pop(0))
        self.num_failures = 0 if error is None else self.num_failures + 1
        self.phases.record(failed_saves=self.num_failures)
        if error is not None:
            self.handle_save_failure(error, is_last)

    def handle_save_failure(self, error: BaseException, is_last: bool) -> None:
        """Warns of a save that failed; raises where training may not go on after it."""
        # A time-out of the file system has a number; without one, a rank or its writer hangs.
        if not isinstance(error, OSError) or error.errno is None:
            raise error
        most, reason = self.config.max_failures, error.strerror or str(error)
        if is_last or self.num_failures > most:
            there = [path.name for path in list_checkpoints(self.folder)]
            rest = "there is no checkpoint yet"
            if there:
                rest = f"rerun the same command to resume from {there[-1]}"
            text = f"{self.saving} could not be saved: {reason}; {rest}"
            raise OSError(error.errno, text) from error
        self.log(
            f"warning: {self.saving} could not be saved ({self.num_failures} of {most} such "
            f"failures in a row allowed): {reason}; training goes on"
        )

    def prune(self, step: int, best_step: int) -> None:
        """Deletes whole checkpoints older than the newest `keep_last` and, if wanted, the best.

        Only those up to `step` count: a later one was damaged when this run began.
        """
        until = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]
        whole = [path for path in until if is_ours(path)]
        best = checkpoint_path(self.folder, best_step) if self.config.keep_best else None
        for old in whole[: -self.config.keep_last]:
            if old == best:
                continue
            try:
                remove_directory(old)
            except OSError as error:
                self.warnings.append(f"warning: {old} could not be deleted: {error}")


def step_of(checkpoint: Path) -> int:
    """The step in the name of a listed checkpoint."""
    step = checkpoint_step(checkpoint)
    assert step is not None, checkpoint
    return step


def is_ours(checkpoint: Path) -> bool:
    """Whether it looks whole; one of a later version is not this run's to delete."""
    try:
        return not quick_damage(checkpoint)
    except LaterVersionError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Deletes what saves left that did not end; only for the one rank that holds the run's lock."""
    for prefix in (TEMPORARY_PREFIX, REPLACED_PREFIX):
        for path in folder.glob(f"{prefix}*"):
            remove_whatever(path)
