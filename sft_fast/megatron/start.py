"""Where a run starts: at a checkpoint, or at step 0."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from sft_fast.config.sections import CheckpointConfig, TrainConfig
from sft_fast.evaluation.early_stopping import EarlyStopping
from sft_fast.megatron.checkpoint.fingerprint import DATA_ORDER_FIELDS, changed_fields
from sft_fast.megatron.checkpoint.load import (
    checkpoints_resumed_from,
    damage_of,
    newest_whole_checkpoint,
    unused,
)
from sft_fast.megatron.checkpoint.save import remove_leftovers
from sft_fast.megatron.checkpoint.train_state import TrainState, read_train_state
from sft_fast.megatron.job import Job
from sft_fast.megatron.join import agree, file_digest
from sft_fast.packing.steps import StepPlan
from sft_fast.packing.streaming import StreamPlan
from sft_fast.runtime.manifest import MANIFEST_FILE
from sft_fast.runtime.run_files import (
    check_resume,
    checkpoint_path,
    checkpoint_step,
    is_export_of,
    list_checkpoints,
)

SAME_CHECKPOINTS = 3
"""Of the newest ones the ranks compare the manifests too."""


@dataclass(frozen=True)
class Start:
    """Where a run starts, and where it is to end."""

    checkpoint: Path | None
    """What is loaded; None = the weights that the config names."""
    state: TrainState
    num_steps: int
    """Optimizer steps at the end of the run, those of the checkpoint included."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def data_steps(self) -> range:
        """The steps of the present data that are still to be made."""
        return range(self.state.data_step, self.num_steps - self.state.first_data_step)

    def is_finished(self, export: Path | None) -> bool:
        """Whether nothing is left to do: all steps are made, and exported after that.

        Args:
            export: where the export is; None = none is wanted.
        """
        if self.checkpoint is None or self.step < self.num_steps:
            return False
        if export is None:
            return True
        return is_export_of(export, self.checkpoint)


def find_start(job: Job, damaged: dict[Path, list[str]]) -> Start:
    """Looks for the checkpoint to resume from, and goes there in the data; every rank calls it.

    Args:
        job: what is trained.
        damaged: checkpoints that are known to be, with what is; those found here are added.

    Raises:
        ValueError: the checkpoint is none, is damaged, belongs to other data, another order of it
            or another model, or is beyond the end; or the run may not start anew beside others.
    """
    start = newest_start(job, damaged)
    # Where nothing is loaded, or a stream has gone on before it is, the load is too late to hash.
    while start.checkpoint is not None and (
        start.step == start.num_steps or isinstance(job.plan, StreamPlan)
    ):
        damages = damage_of(start.checkpoint, job.config.checkpoint.timeout_minutes * 60)
        if not damages:
            break
        damaged[start.checkpoint] = damages
        job.metrics.log(unused(start.checkpoint, damages))
        start = newest_start(job, damaged)
    if start.checkpoint is not None and start.state.data_step > 0:
        job.plan.resume(start.checkpoint, start.state.data_step)
    # A stream reads its first samples for it, so not before it is where it goes on.
    return replace(start, state=replace(start.state, data=asdict(job.origin.data)))


def newest_start(job: Job, damaged: dict[Path, list[str]]) -> Start:
    """`find_start` without the content of tensors, and without going there in the data."""
    options, train, log = job.config.checkpoint, job.config.train, job.metrics.log
    checkpoint = find_checkpoint(job.output, options, job.parallel.is_main, log, damaged)
    state = TrainState(0, job.fields)
    if checkpoint is not None:
        state = resumed_state(checkpoint, options, job.fields, log)
        check_name(checkpoint, state, job.output / "checkpoints")
    num_steps = total_steps(train, job.plan, state.first_data_step)
    if state.step > num_steps:
        raise ValueError(
            f"checkpoint.resume: {checkpoint} has {state.step} steps, more than the {num_steps} of "
            "train.steps or train.epochs; raise them, or choose another output_dir"
        )
    if EarlyStopping(**state.early_stopping).should_stop(job.config.evaluation.patience):
        num_steps = state.step
    return Start(checkpoint, state, num_steps)


def check_name(checkpoint: Path, state: TrainState, folder: Path) -> None:
    """Raises ValueError where a checkpoint in the run's own folder was renamed: as the newest by
    name it would be resumed from again and again, whatever was saved since."""
    if checkpoint.parent == folder and checkpoint_step(checkpoint) != state.step:
        right = checkpoint_path(folder, state.step).name
        raise ValueError(
            f"checkpoint.resume: {checkpoint} holds step {state.step}; expected it to be named "
            f"{right}; rename it, or move it away"
        )


def total_steps(train: TrainConfig, plan: StepPlan | StreamPlan, first: int) -> int:
    """Steps of the whole run, whose present data began at step `first`."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None and isinstance(plan, StepPlan), "the config demands steps"
    return first + train.epochs * plan.num_steps_per_epoch


def find_checkpoint(
    output: Path,
    options: CheckpointConfig,
    is_main: bool,
    log: Callable[[str], None],
    damaged: dict[Path, list[str]],
) -> Path | None:
    """The checkpoint that `checkpoint.resume` names; None = start at step 0.

    Args:
        output: the run's directory.
        options: section of the configuration.
        is_main: whether this rank removes what saves have left.
        log: told of damage.
        damaged: as for `find_start`.

    Raises:
        ValueError: it is none, or damaged, or the run may not start anew beside others, or the
            machines see other checkpoints.
    """
    folder = output / "checkpoints"
    if folder.is_symlink() and not folder.exists() or folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {folder} is no directory; move it away, or make it one")
    existing = list_checkpoints(folder)
    if options.resume == "never" and existing:
        raise ValueError(
            f"checkpoint.resume is never, but {output} holds {existing[-1].name}; "
            "choose another output_dir, or checkpoint.resume=auto"
        )
    check_resume(options.resume, output)
    if options.resume not in ("auto", "never"):
        existing = checkpoints_resumed_from(Path(options.resume), existing)
    timeout_s = options.timeout_minutes * 60
    names = {path.name: file_digest(path / MANIFEST_FILE) for path in existing[-SAME_CHECKPOINTS:]}
    agree("checkpoints", {"how many": str(len(existing))} | names, timeout_s)
    dist.barrier()  # every rank has seen the same folder before the main rank tidies it up
    if is_main:
        remove_leftovers(folder)
    return newest_whole_checkpoint(existing, log, timeout_s, damaged)


def resumed_state(
    checkpoint: Path,
    options: CheckpointConfig,
    fields: dict[str, str],
    log: Callable[[str], None],
) -> TrainState:
    """Where `checkpoint` stands, and where the data starts anew if other data is allowed.

    Args:
        checkpoint: the one to resume from.
        options: what may have changed.
        fields: of this run; see fingerprint.run_fields.
        log: told what has changed.

    Raises:
        ValueError: the checkpoint belongs to other data, another order of it or another model.
    """
    state = read_train_state(checkpoint)
    if options.resume != "auto":
        state = replace(state, resumed_from=str(Path(options.resume).resolve()))
    changed = changed_fields(state.fields, fields, options.allow_change, checkpoint)
    if not changed & DATA_ORDER_FIELDS:
        return replace(state, fields=fields)
    log(f"changed: {', '.join(sorted(changed))}; the data begins anew")
    return replace(state, fields=fields, first_data_step=state.step)
