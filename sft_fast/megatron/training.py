"""The training loop: what happens to a token, from the store to an optimizer step.

prepare      join the ranks, read the data, plan the steps     job.py
begin        find a checkpoint, or step 0                      start.py
             build model, optimizer, and what watches over them
loop         micro-batches, a step, what is said of it, a save
finish       export, answers of the exported model, report     finish.py
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sft_fast.config.schema import Config, save_config
from sft_fast.evaluation.early_stopping import EarlyStopping
from sft_fast.megatron.batches import open_batches, store_of
from sft_fast.megatron.checkpoint.load import CheckpointDamageError, load_checkpoint, unused
from sft_fast.megatron.checkpoint.save import CheckpointWriter, Files
from sft_fast.megatron.checkpoint.state import sharded_state
from sft_fast.megatron.checkpoint.train_state import TrainState
from sft_fast.megatron.device import free_memory
from sft_fast.megatron.evaluation import Evaluator
from sft_fast.megatron.finish import export, finish
from sft_fast.megatron.guard import Guard, check_limit, report_warning
from sft_fast.megatron.job import Job, prepare
from sft_fast.megatron.lora import seed_dropout
from sft_fast.megatron.memory import describe_memory
from sft_fast.megatron.meter import step_meter
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.neftune import add_noise, begin_step
from sft_fast.megatron.optim import gather_parameters
from sft_fast.megatron.source_check import check_source
from sft_fast.megatron.start import Start, find_start
from sft_fast.megatron.train_step import Run, build_run, train_step
from sft_fast.metrics.profiling import ProfilerWindow
from sft_fast.metrics.trackers import open_trackers
from sft_fast.metrics.writer import StepOutcome, Timed
from sft_fast.packing.from_config import warm_up_warning
from sft_fast.runtime.phases import Phases


@dataclass(frozen=True)
class Trainer:
    """What a step needs, and what watches over the steps."""

    run: Run
    guard: Guard
    evaluator: Evaluator
    checkpoints: CheckpointWriter


def train(config: Config, phases: Phases) -> int:
    """Runs a stage as `config` says; every rank of the job calls it.

    Args:
        config: the configuration.
        phases: told what this rank is doing.

    Returns: the process exit code, 0.

    Raises:
        ValueError: the config does not fit the data, the model or the world size.
    """
    job = prepare(config, phases)
    start, trainer = begin(job)
    if trainer is None:
        job.metrics.log(
            f"{start.checkpoint} is at step {start.step} of {start.num_steps}: nothing to do"
        )
        job.close()
        return 0
    state = loop(job, start, trainer)
    if phases.all_stop:
        job.metrics.log(
            f"stopped at step {state.step} of {start.num_steps}; rerun the same command to resume"
        )
    else:
        export(job, trainer.run, trainer.evaluator, state)
        del trainer  # its memory is wanted for the models that answer
        free_memory()
        finish(job)
    job.close()
    return 0


def begin(job: Job) -> tuple[Start, Trainer | None]:
    """Where the run starts, and what makes its steps; None = nothing is left to do."""
    damaged: dict[Path, list[str]] = {}
    is_announced = False
    while True:
        job.phases.enter("resume", can_leave=True)
        start = find_start(job, damaged)
        job.phases.confirm_run()
        if not is_announced:
            job.announce()
            is_announced = True
        wanted_export = job.output / "export" if job.config.export.enabled else None
        if start.is_finished(wanted_export):
            return start, None
        try:
            return start, build(job, start)
        except CheckpointDamageError as error:
            damaged[error.checkpoint] = error.damages
            job.metrics.log(unused(error.checkpoint, error.damages))
        # What was loaded so far goes, with the model.
        free_memory()


def build(job: Job, start: Start) -> Trainer:
    """Allocates and loads the model and the optimizer, and opens what watches over the steps.

    Raises:
        CheckpointDamageError: what is loaded is damaged.
    """
    config, phases, metrics, parallel = job.config, job.phases, job.metrics, job.parallel
    if start.step < start.num_steps and (warning := warm_up_warning(config.optim, start.num_steps)):
        metrics.log(warning)
    phases.enter("model", can_leave=True, is_loading=True)
    model = job.inputs.model
    run = build_run(
        config, model.architecture, model.weights, start.num_steps, parallel, phases.tensor_done
    )
    memory = describe_memory(config.model, config.lora, parallel)
    built = unwrap(run.model[0])
    metrics.log(f"attention: {built.attention}; kernels: {built.kernels}; {memory}")
    add_noise(run.model, config.train, config.seed, job.inputs.store.lengths, parallel)
    if start.checkpoint is None:
        check_start(job, run)
    else:
        load_checkpoint(
            start.checkpoint,
            run.model,
            run.optimizer,
            run.schedule,
            phases.tensor_done,
            config.checkpoint.timeout_minutes * 60,
        )
        if run.load is not None:
            run.load.load_state(start.state.router)
        metrics.log(f"resumed from {start.checkpoint} at step {start.step} of {start.num_steps}")
    if parallel.is_main:
        save_config(config, job.output / "config.yaml")
    checkpoints = CheckpointWriter(
        job.output / "checkpoints", config.checkpoint, metrics.log, run.copier, phases
    )
    if config.checkpoint.asynchronous and config.checkpoint.every_steps is not None:
        checkpoints.prepare(sharded_state(run.model, run.optimizer, run.schedule))
    guard = Guard(config.guard, config.optim.clip_grad, start.state.guard)
    evaluator = Evaluator(
        job.inputs.eval_store,
        config,
        parallel,
        metrics,
        EarlyStopping(**start.state.early_stopping),
        phases,
    )
    return Trainer(run, guard, evaluator, checkpoints)


def check_start(job: Job, run: Run) -> None:
    """Compares the model before the first step with its source; see source_check.py.

    Raises:
        ValueError: it is none that can be trained on.
    """
    gather_parameters(run.model)
    models = [unwrap(chunk) for chunk in run.model]
    with job.phases.paused("compare with transformers", can_leave=True):
        seen = check_source(
            models, job.config.model, job.inputs.model, job.inputs.store, job.parallel
        )
    if seen:
        job.metrics.log(seen)


def loop(job: Job, start: Start, trainer: Trainer) -> TrainState:
    """Trains from `start` to the end, or until all ranks agree to stop.

    Returns: where it ended; its checkpoint is saved.
    """
    config, phases, run, evaluator = job.config, job.phases, trainer.run, trainer.evaluator
    state, num_steps = start.state, start.num_steps
    phases.enter("train")
    phases.heartbeat(step=state.step, num_steps=num_steps)
    evaluator.before_training(run.model, state.step)
    if job.parallel.is_main:
        job.metrics.trackers = open_trackers(config, job.metrics.log)
    architecture = job.inputs.model.architecture
    meter = step_meter(
        job.metrics, config.metrics, config.lora, architecture, num_steps, job.parallel
    )
    profiler = ProfilerWindow(config.metrics, config.output_dir, job.parallel.is_main)
    steps = start.data_steps
    with open_batches(job.inputs.store, job.plan, steps, run.shape, job.parallel) as loader:
        batches = Timed(loader)
        for data_step in steps:
            if phases.all_stop:
                break
            profiler.before(state.step + 1)
            began = time.perf_counter()
            counts = job.plan.counts(data_step)
            seed_dropout(config.lora, config.seed, state.step, job.parallel)
            begin_step(run.model, state.step)
            outcome = train_step(run, batches, counts, trainer.guard, phases)
            done, elapsed_s = state.step + 1, time.perf_counter() - began
            phases.heartbeat(step=done, loss=outcome.loss)
            trainer.checkpoints.poll()
            if outcome.is_of_guard:
                report_outcome(job, trainer.guard, done, outcome, data_step)
            meter.step(done, outcome, counts, elapsed_s, batches.take_waited_s())
            if (trace := profiler.after(done)) is not None:
                job.metrics.log(f"profile: {trace}")
            if (done == num_steps or evaluator.is_due(done)) and not phases.all_stop:
                evaluator.after_step(run.model, done)
            early_stopping, guard = asdict(evaluator.early_stopping), trainer.guard.state()
            state = replace(state, step=done, early_stopping=early_stopping, guard=guard)
            is_last = done == num_steps or evaluator.should_stop() or phases.all_stop
            is_due = evaluator.should_save(done) or is_multiple(done, config.checkpoint.every_steps)
            if is_last or is_due or phases.all_save:
                save(trainer, state, is_last, job.plan.state_files(state.data_step), phases)
            if is_last:
                break
    job.metrics.end_progress()
    job.announce_read(state.data_step)
    trainer.checkpoints.finish(is_last=True)
    run.copier.release()
    return state


def report_outcome(job: Job, guard: Guard, step: int, outcome: StepOutcome, data_step: int) -> None:
    """Says what the guard found, and keeps the step's samples.

    Raises:
        ValueError: too many steps in a row were skipped.
    """
    made, folder = job.plan.step(data_step), job.output / "skipped"
    store = store_of(made, job.inputs.store)
    report_warning(step, outcome, made.sample_ids, store, folder, job.metrics)
    check_limit(guard, step, outcome.warning, folder)


def is_multiple(step: int, every_steps: int | None) -> bool:
    """Whether something that is done every so many steps is due; never with None."""
    return every_steps is not None and step % every_steps == 0


def save(trainer: Trainer, state: TrainState, is_last: bool, files: Files, phases: Phases) -> None:
    """Saves a checkpoint, or begins to, in the background."""
    run = trainer.run
    with phases.paused("save"):
        parts = sharded_state(run.model, run.optimizer, run.schedule)
        state = replace(state, router={} if run.load is None else run.load.state())
        trainer.checkpoints.save(state, parts, is_last, files)
