"""Checkpoints that resume exactly: weights, optimizer, schedule and the position in the data.

A checkpoint is a directory `step_<number>`, written as manifest.py says: it appears whole, and what
later damages it is found before it is loaded. What is in it: shards.py. A run may resume with other
parallel sizes.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import ModuleList

from sft_fast.config.schema import CheckpointConfig
from sft_fast.errors import DamageError
from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
from sft_fast.megatron.checkpoint.optimizer_shards import (
    SHARDING,
    is_distributed,
    load_optimizer,
    load_weights,
    state_of_parts,
    state_to_save,
)
from sft_fast.megatron.checkpoint.shards import (
    ShardReader,
    Snapshot,
    check_complete,
    load_state,
    own_share,
    read_common,
    take_snapshot,
    write_snapshot,
)
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.lora import has_adapters, is_adapter
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.optim import fuse_update, separate_step_counts
from sft_fast.runtime.manifest import (
    REPLACED_PREFIX,
    TEMPORARY_PREFIX,
    Damage,
    StagedDirectory,
    agree,
    find_damage,
    remove_directory,
    staged_directory,
)
from sft_fast.runtime.run_files import check_is_checkpoint, list_checkpoints
from sft_fast.runtime.watchdog import current_watch

logger = logging.getLogger(__name__)

STATE_FILE = "train_state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; the data position follows from `step` alone."""

    step: int
    """Optimizer steps done, skipped ones included."""
    fields: dict[str, str]
    """What the weights and the order of the data depend on; see fingerprint.run_fields."""
    first_data_step: int = 0
    """Step at which the present data began; later than 0 after a change that was allowed."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the numerical guard remembers; see guard.Guard."""
    standing: dict[str, Any] = field(default_factory=dict)
    """How the evaluations so far compare; see standing.Standing."""
    resumed_from: str = ""
    """The checkpoint that `checkpoint.resume` named; "" = this run began at step 0."""
    data: dict[str, Any] = field(default_factory=dict)
    """What an export says of the data; see traits.DataTraits. {} in checkpoints of before."""


def model_weights(model: ModuleList) -> dict[str, Any]:
    """The weights of each chunk in dist_checkpointing's sharded form; with LoRA, the adapters."""
    weights = {}
    for number, chunk in enumerate(model):
        tensors = unwrap(chunk).sharded_state_dict(metadata=dict(SHARDING))
        if has_adapters(model):
            tensors = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
        weights[f"chunk{number}"] = tensors
    return weights


def sharded_state(
    model: ModuleList, optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler
) -> dict[str, Any]:
    """What this rank saves, in dist_checkpointing's sharded form; its tensors stay where they are.

    With LoRA it holds the adapters and their optimizer state, no base weights.
    """
    state = state_to_save(model_weights(model), optimizer)
    return {**state, "lr_schedule": schedule.state_dict()}


class CheckpointWriter:
    """Saves a run's checkpoints and deletes old ones; every rank has one.

    A save that fails is reported and training goes on, until `max_failures` in a row or the last.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        say: Callable[[str], None],
        copier: HostCopier,
    ):
        """
        Args:
            copier: the one whose `before_update` comes before each optimizer update.
        """
        self.folder, self.config, self.say = folder, config, say
        self.copier = copier
        copier.say = say
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

    def save(self, state: TrainState, sharded: dict[str, Any], is_last: bool = False) -> None:
        """Writes `folder/step_<n>`; with `asynchronous` and room for a copy on every rank beside
        the next steps.

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
            target=self.write, args=(self.saving, state, snapshot, exchange), daemon=True
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
                    current_watch().rank,
                    error,
                )
            self.has_room = False
            return None

    def write(
        self, final: Path, state: TrainState, snapshot: Snapshot, exchange: StoreExchange
    ) -> None:
        """Runs in the thread."""
        try:
            needed = snapshot.num_bytes
            with staged_directory(final, exchange, needed, check_complete) as stage:
                agree(exchange, "files", lambda: self.write_files(stage, state, snapshot, exchange))
            self.saved_step = state.step
            if exchange.rank == 0:
                self.prune(state.step, state.standing.get("best_step", 0))
        # Whatever it is, it belongs to the main thread; here nobody would see it.
        except BaseException as error:
            self.error = error

    def write_files(
        self, stage: StagedDirectory, state: TrainState, snapshot: Snapshot, exchange: StoreExchange
    ) -> None:
        """This rank's share of a checkpoint."""
        self.copier.wait()
        write_snapshot(snapshot, stage, exchange.rank)
        if exchange.rank == 0:
            stage.write_text(STATE_FILE, json.dumps(asdict(state)) + "\n")

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
            self.say(self.warnings.pop(0))
        self.num_failures = 0 if error is None else self.num_failures + 1
        current_watch().note(failed_saves=self.num_failures)
        if error is not None:
            self.bear(error, is_last)

    def bear(self, error: BaseException, is_last: bool) -> None:
        """Warns of a save that failed; raises where training may not go on after it."""
        # A time-out of the file system has a number; without one, a rank or its writer hangs.
        if not isinstance(error, OSError) or error.errno is None:
            raise error
        most, reason = self.config.max_failures, error.strerror or str(error)
        if is_last or self.num_failures > most:
            there = [path.name for path in list_checkpoints(self.folder)]
            rest = "there is no checkpoint yet"
            if there:
                rest = f"the same command goes on from {there[-1]}"
            text = f"{self.saving} could not be saved: {reason}; {rest}"
            raise OSError(error.errno, text) from error
        self.say(
            f"warning: {self.saving} could not be saved ({self.num_failures} of {most} such "
            f"failures in a row allowed): {reason}; training goes on"
        )

    def prune(self, step: int, best_step: int) -> None:
        """Deletes whole checkpoints older than the newest `keep_last` and, if wanted, the best.

        Only those up to `step` count: a later one was damaged when this run began.
        """
        newest = checkpoint_path(self.folder, step)
        until = [path for path in list_checkpoints(self.folder) if path.name <= newest.name]
        whole = [path for path in until if not quick_damage(path)]
        best = checkpoint_path(self.folder, best_step) if self.config.keep_best else None
        for old in whole[: -self.config.keep_last]:
            if old == best:
                continue
            try:
                remove_directory(old)
            except OSError as error:
                self.warnings.append(f"warning: {old} could not be deleted: {error}")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step_{step:08d}"


def quick_damage(checkpoint: Path) -> list[Damage]:
    """Files of another size than they should have."""
    return find_damage(checkpoint, hash_content=False)


def remove_leftovers(folder: Path) -> None:
    """Deletes what saves left that did not end; only for the one rank that holds the run's lock."""
    for prefix in (TEMPORARY_PREFIX, REPLACED_PREFIX):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def newest_whole_checkpoint(
    checkpoints: list[Path], say: Callable[[str], None], timeout_s: float
) -> Path | None:
    """The newest of `checkpoints` (oldest first) without damage; the ranks share the reading.

    Raises:
        DamageError: there are checkpoints, but all are damaged; names every damaged file.
    """
    everything: list[str] = []
    for checkpoint in reversed(checkpoints):
        damages = damage_of(checkpoint, timeout_s)
        if not damages:
            return checkpoint
        everything += damages
        say(f"warning: {checkpoint} is damaged and not used:\n  " + "\n  ".join(damages))
    if everything:
        raise DamageError(
            "no checkpoint is whole; delete them to start anew:\n  " + "\n  ".join(everything)
        )
    return None


def damage_of(checkpoint: Path, timeout_s: float) -> list[str]:
    """What is wrong with its files, as texts; every rank calls it, and reads a part."""
    exchange = StoreExchange(f"verify/{checkpoint}", timeout_s)
    found = find_damage(checkpoint, exchange.rank, exchange.world_size)
    shares = exchange.all_gather("damage", [str(damage) for damage in found])
    return sorted({text for share in shares for text in share})


def read_train_state(checkpoint: Path) -> TrainState:
    """Raises ValueError when `checkpoint` is not a checkpoint of this version."""
    path = checkpoint / STATE_FILE
    try:
        return TrainState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.resume: {checkpoint} is not a checkpoint: {error}") from None


def continuations(origin: Path, existing: list[Path]) -> list[Path]:
    """`origin` and what a run that began there has saved since, oldest first: so the command that
    names a checkpoint can be given again after an interruption.

    Args:
        existing: the checkpoints in the run's own directory.

    Raises:
        ValueError: `origin` is no checkpoint, or later ones there belong to another run.
    """
    own: list[tuple[int, Path]] = []
    others: list[tuple[int, Path]] = []
    for checkpoint in existing:
        try:
            state = read_train_state(checkpoint)
        except ValueError:
            continue
        begun_at = state.resumed_from
        is_own = begun_at != "" and Path(begun_at).resolve() == origin.resolve()
        (own if is_own else others).append((state.step, checkpoint))
    if not own:
        check_is_checkpoint(origin)
    if not own and not quick_damage(origin):
        step = read_train_state(origin).step
        later = [checkpoint.name for other, checkpoint in others if other > step]
        if later:
            raise ValueError(
                f"checkpoint.resume is {origin}, but {existing[0].parent} holds later checkpoints "
                f"of another run, {', '.join(later)}; move them away, or choose another output_dir"
            )
    return [origin, *(checkpoint for _, checkpoint in own)]


def load_checkpoint(
    checkpoint: Path,
    model: ModuleList,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
) -> None:
    """Restores weights, optimizer and schedule; bit-identical when the layout is the same."""
    weights = model_weights(model)
    common = read_common(checkpoint)
    with ShardReader(checkpoint) as reader:
        for number, chunk in enumerate(model):
            others = load_weights(weights[f"chunk{number}"], reader)
            unwrap(chunk).load_state_dict(others, strict=False)
        if is_distributed(optimizer):
            load_optimizer(optimizer, common["optimizer"], weights, reader)
    if not is_distributed(optimizer):
        request = optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(SHARDING))
        loaded = load_state(checkpoint, {"optimizer": request})["optimizer"]
        add_step_zero(optimizer, loaded)
        optimizer.load_state_dict(loaded)
    fuse_update(optimizer)
    separate_step_counts(optimizer)
    schedule.load_state_dict(common["lr_schedule"])


def add_step_zero(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Adds the step count that megatron leaves out where all steps so far were skipped; torch's
    Adam does not load without it."""
    for part, state in state_of_parts(optimizer, loaded):
        if isinstance(part.optimizer, torch.optim.Adam):
            of_parameters = state.get("optimizer", state)["state"]
            of_parameters.setdefault("common_step", torch.tensor(0.0))
