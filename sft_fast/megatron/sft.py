"""The `("megatron", "sft")` trainer: what happens to a token, from store to optimizer step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import ModuleList
from transformers.utils.logging import disable_progress_bar

from sft_fast.config.schema import Config, save_config
from sft_fast.data.export_metadata import ExportMetadata
from sft_fast.evaluation.early_stopping import EarlyStopping
from sft_fast.evaluation.samples import write_samples
from sft_fast.megatron.batches import open_batches
from sft_fast.megatron.checkpoint.fingerprint import DATA_ORDER_FIELDS, changed_fields, run_fields
from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
from sft_fast.megatron.checkpoint.load import (
    checkpoints_resumed_from,
    load_checkpoint,
    newest_whole_checkpoint,
)
from sft_fast.megatron.checkpoint.save import CheckpointWriter, remove_leftovers
from sft_fast.megatron.checkpoint.state import sharded_state
from sft_fast.megatron.checkpoint.train_state import TrainState, read_train_state
from sft_fast.megatron.device import free_memory
from sft_fast.megatron.evaluation import Evaluator, report_exact_match
from sft_fast.megatron.export.adapter import export_adapter
from sft_fast.megatron.export.model import export_model
from sft_fast.megatron.guard import Guard, check_limit, report_warning
from sft_fast.megatron.hf import WeightSource, load_hf_weights
from sft_fast.megatron.load_inputs import read_inputs
from sft_fast.megatron.lora import adapter_fingerprint, add_adapters, seed_dropout
from sft_fast.megatron.memory import describe_memory
from sft_fast.megatron.meter import step_meter
from sft_fast.megatron.model import build_model, unwrap
from sft_fast.megatron.neftune import add_noise, begin_step
from sft_fast.megatron.optim import (
    build_lr_schedule,
    build_optimizer,
    clip_and_update,
    connect_schedule,
    gather_parameters,
    normalise_by,
    parts_of,
    ready_gradients,
    wrap_model,
)
from sft_fast.megatron.parallel import Parallel, init_parallel
from sft_fast.megatron.schedule import run_schedule, sum_over_ranks
from sft_fast.metrics.profiling import ProfilerWindow
from sft_fast.metrics.report import length_histogram, write_report
from sft_fast.metrics.trackers import check_trackers
from sft_fast.metrics.writer import MetricsWriter, StepOutcome, StepReason, Timed
from sft_fast.models.architecture import Architecture
from sft_fast.packing.from_config import make_plan, warm_up_warning
from sft_fast.packing.micro_batch import MicroBatch
from sft_fast.packing.report import packing_report
from sft_fast.packing.steps import StepCounts
from sft_fast.runtime.manifest import MANIFEST_FILE
from sft_fast.runtime.phases import Phases, no_report
from sft_fast.runtime.rendezvous import public_address_warning
from sft_fast.runtime.run_files import check_resume, checkpoint_path, list_checkpoints


@dataclass(frozen=True)
class Run:
    """What an optimizer step changes."""

    model: ModuleList
    """DistributedDataParallel parts: one, or one for each interleaved pipeline stage."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    copier: HostCopier = field(default_factory=HostCopier)
    """What a save in the background still reads; the update waits for it."""


def train_step(
    run: Run,
    batches: Iterator[MicroBatch],
    counts: StepCounts,
    config: Config,
    parallel: Parallel,
    guard: Guard | None = None,
    phases: Phases | None = None,
) -> StepOutcome:
    """One optimizer step; the only place where gradients happen.

    The objective is the weighted mean over the supervised tokens of the global batch: the sum of
    weight * loss over the sum of weights. Weights of the data are relative, then, and a token whose
    weight goes to 0 becomes one without a loss.

    Args:
        run: what is changed.
        batches: this rank's micro-batches, as many as one step has.
        counts: of the step, from the packing plan.
        config: the configuration.
        parallel: this rank's place.
        guard: refuses updates; None = every finite one is made.
        phases: has this rank's votes and gets the sum of all ranks'; None = nobody votes.
    """
    phases = phases or Phases.unwatched()
    for chunk in parts_of(run.model):
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    normalise_by(run.model, counts.loss_weight)
    reports = run_schedule(run.model, batches, config, parallel)
    total, votes = sum_over_ranks(reports, "lm loss", (2,), parallel, phases.votes())
    lr = run.optimizer.param_groups[0]["lr"]
    grad_norm = ready_gradients(run.optimizer)
    # The norm is on the host by now, so reading the loss waits for nothing.
    loss_sum, counted = total.tolist()
    assert counted == counts.num_supervised, (counted, counts)
    phases.apply_votes(*votes.tolist())
    loss = loss_sum / (counts.loss_weight or 1.0)
    reason, warning = StepReason.UPDATED, ""
    if grad_norm is None:
        reason, warning = StepReason.OVERFLOW, "fp16 overflow"
    elif guard is not None:
        reason, warning = guard.judge(loss, grad_norm)
    outcome = StepOutcome(loss, math.nan if grad_norm is None else grad_norm, lr, reason, warning)
    if outcome.updated:
        run.copier.before_update()
        clip_and_update(run.optimizer, outcome.grad_norm)
        run.schedule.step(increment=1)
    return outcome


def build_run(
    config: Config,
    architecture: Architecture,
    weights: WeightSource,
    num_steps: int,
    parallel: Parallel,
    tensor_done: Callable[[], None] = no_report,
) -> Run:
    """Allocates the model, loads its weights, and adds the optimizer and the schedule."""
    modules = build_model(architecture, config, parallel)
    for module in modules:
        load_hf_weights(module, weights, architecture, parallel, tensor_done)
        if config.lora.rank > 0:
            add_adapters(module, architecture, config.model, config.lora, config.seed, parallel)
    model = wrap_model(modules, config.model, config.parallel)
    optimizer = build_optimizer(model, config.model, config.parallel, config.optim, parallel)
    connect_schedule(model, optimizer)
    return Run(model, optimizer, build_lr_schedule(optimizer, config.optim, num_steps))


def find_checkpoint(config: Config, parallel: Parallel, log: Callable[[str], None]) -> Path | None:
    """The checkpoint that `checkpoint.resume` names; None = begin at step 0.

    Raises:
        ValueError: it is none, or damaged, or the run may not begin anew beside others.
    """
    options = config.checkpoint
    folder = Path(config.output_dir) / "checkpoints"
    existing = list_checkpoints(folder)
    if options.resume == "never" and existing:
        raise ValueError(
            f"checkpoint.resume is never, but {config.output_dir} holds {existing[-1].name}; "
            "choose another output_dir, or checkpoint.resume=auto"
        )
    check_resume(options.resume, Path(config.output_dir))
    if options.resume not in ("auto", "never"):
        existing = checkpoints_resumed_from(Path(options.resume), existing)
    dist.barrier()  # every rank has seen the same folder before rank 0 tidies it up
    if parallel.is_main:
        remove_leftovers(folder)
    return newest_whole_checkpoint(existing, log, options.timeout_minutes * 60)


def continued_state(
    config: Config,
    checkpoint: Path,
    fields: dict[str, str],
    metadata: ExportMetadata,
    log: Callable[[str], None],
) -> TrainState:
    """Where `checkpoint` stands, and where the data begins anew if other data is allowed.

    Args:
        config: of this run.
        checkpoint: the one to resume from.
        fields: of this run; see fingerprint.run_fields.
        metadata: of its data.
        log: told what has changed.

    Raises:
        ValueError: the checkpoint belongs to other data, another order of it or another model.
    """
    found = replace(read_train_state(checkpoint), data=asdict(metadata))
    if config.checkpoint.resume != "auto":
        found = replace(found, resumed_from=str(Path(config.checkpoint.resume).resolve()))
    changed = changed_fields(found.fields, fields, config.checkpoint.allow_change, checkpoint)
    if not changed & DATA_ORDER_FIELDS:
        return replace(found, fields=fields)
    log(f"changed: {', '.join(sorted(changed))}; the data begins anew")
    return replace(found, fields=fields, first_data_step=found.step)


def is_exported(checkpoint: Path, config: Config) -> bool:
    """Whether the export was made after `checkpoint`."""
    if not config.export.enabled:
        return True
    made = Path(config.output_dir) / "export" / MANIFEST_FILE
    return made.is_file() and made.stat().st_mtime >= (checkpoint / MANIFEST_FILE).stat().st_mtime


def train(config: Config, phases: Phases) -> int:
    """Runs supervised fine-tuning as `config` says; every rank of the job calls it.

    Args:
        config: the configuration.
        phases: told what this rank is doing.

    Returns: the process exit code, 0.

    Raises:
        ValueError: the config does not fit the data, the model or the world size.
    """
    phases.enter("join", can_leave=True)
    parallel = init_parallel(config)
    output = Path(config.output_dir)
    check_trackers(config.metrics)
    metrics = MetricsWriter(output, parallel.is_main)
    metrics.log(describe(parallel))
    if warning := public_address_warning():
        metrics.log(warning)
    phases.enter("data", can_leave=True)
    inputs = read_inputs(config, metrics.log)
    metrics.log(inputs.store.summary())
    plan = make_plan(inputs.store, config, inputs.model.architecture)
    packing = packing_report(plan, parallel.dp_size, config.train.micro_batch_size)
    metrics.log(f"packing: {packing.brief()}")
    adapters = adapter_fingerprint(config.lora, inputs.model.architecture, inputs.model.weights)
    fields = run_fields(
        config.model,
        config.seed,
        inputs.store,
        inputs.tokenizer,
        plan,
        inputs.model.architecture,
        adapters,
    )
    origin = inputs.origin
    state = TrainState(0, fields, data=asdict(origin.data))
    phases.enter("resume", can_leave=True)
    checkpoint = find_checkpoint(config, parallel, metrics.log)
    if checkpoint is not None:
        state = continued_state(config, checkpoint, fields, origin.data, metrics.log)
    first, start = state.first_data_step, state.step
    num_steps = config.train.steps or first + (config.train.epochs or 0) * plan.num_steps_per_epoch
    if start > num_steps:
        raise ValueError(
            f"checkpoint.resume: {checkpoint} has {start} steps, more than the {num_steps} of "
            "train.steps or train.epochs; raise them, or choose another output_dir"
        )
    # Not before the run is known to belong here: a refused one leaves no records.
    phases.confirm_run()
    metrics.write("launch", world_size=parallel.world_size, device=parallel.device.type)
    metrics.write("data", **asdict(inputs.store.report))
    metrics.write("lengths", **length_histogram(inputs.store.lengths))
    metrics.write("packing", **packing.record())
    if warning := warm_up_warning(config.optim, num_steps):
        metrics.log(warning)
    early_stopping = EarlyStopping(**state.early_stopping)
    if early_stopping.should_stop(config.evaluation.patience):
        num_steps = start
    if checkpoint is not None and start == num_steps and is_exported(checkpoint, config):
        metrics.log(f"{checkpoint} is at step {start} of {num_steps}: nothing to do")
        return finish(metrics)
    phases.enter("model", can_leave=True, is_loading=True)
    run = build_run(
        config,
        inputs.model.architecture,
        inputs.model.weights,
        num_steps,
        parallel,
        phases.tensor_done,
    )
    memory = describe_memory(config.model, config.lora, parallel)
    metrics.log(f"attention: {unwrap(run.model[0]).attention}; {memory}")
    add_noise(run.model, config.train, config.seed, inputs.store.lengths, parallel)
    if checkpoint is not None:
        load_checkpoint(checkpoint, run.model, run.optimizer, run.schedule, phases.tensor_done)
        metrics.log(f"resumed from {checkpoint} at step {start} of {num_steps}")
    if parallel.is_main:
        save_config(config, output / "config.yaml")
    checkpoints = CheckpointWriter(
        output / "checkpoints", config.checkpoint, metrics.log, run.copier, phases
    )
    if config.checkpoint.asynchronous and config.checkpoint.every_steps is not None:
        checkpoints.prepare(sharded_state(run.model, run.optimizer, run.schedule))
    guard = Guard(config.guard, config.optim.clip_grad, state.guard)

    evaluator = Evaluator(inputs.eval_store, config, parallel, metrics, early_stopping, phases)
    phases.enter("train")
    phases.heartbeat(step=start, num_steps=num_steps)
    evaluator.before_training(run.model, start)
    plan_steps = range(start - first, num_steps - first)
    meter = step_meter(metrics, config, inputs.model.architecture, num_steps, parallel)
    profiler = ProfilerWindow(config, parallel.is_main)
    with open_batches(inputs.store, plan, plan_steps, config, parallel) as loader:
        batches = Timed(loader)
        for step in range(start, num_steps):
            if phases.all_stop:
                break
            profiler.before(step + 1)
            began = time.perf_counter()
            counts = plan.counts(step - first)
            seed_dropout(config.lora, config.seed, step, parallel)
            begin_step(run.model, step)
            outcome = train_step(run, batches, counts, config, parallel, guard, phases)
            done = step + 1
            elapsed_s = time.perf_counter() - began
            phases.heartbeat(step=done, loss=outcome.loss)
            checkpoints.poll()
            if outcome.is_of_guard:
                samples = np.concatenate(plan.step_bins(*plan.locate(step - first)))
                report_warning(done, outcome, samples, inputs.store, output / "skipped", metrics)
                check_limit(guard, done, outcome.warning, output / "skipped")
            meter.step(done, outcome, counts, elapsed_s, batches.take_waited_s())
            trace = profiler.after(done)
            if trace is not None:
                metrics.log(f"profile: {trace}")
            if (done == num_steps or evaluator.is_due(done)) and not phases.all_stop:
                evaluator.after_step(run.model, done)
            state = replace(
                state,
                step=done,
                early_stopping=asdict(evaluator.early_stopping),
                guard=guard.state(),
            )
            is_last = done == num_steps or evaluator.should_stop() or phases.all_stop
            is_wanted = is_due(config.checkpoint.every_steps, done) or evaluator.should_save(done)
            if is_last or is_wanted or phases.all_save:
                save_run(checkpoints, state, run, is_last, phases)
            if is_last:
                break
    metrics.end_progress()
    checkpoints.finish(is_last=True)
    run.copier.release()
    if phases.all_stop:
        metrics.log(
            f"stopped at step {state.step} of {num_steps}; rerun the same command to resume"
        )
        return finish(metrics)

    phases.enter("export", can_leave=True)
    disable_progress_bar()  # of transformers, for each look at the export
    evaluator.report_best()
    if config.export.best:
        load_best(run, state, config, metrics, phases)
    if config.export.enabled:
        gather_parameters(run.model)
        models = [unwrap(chunk) for chunk in run.model]
        export_model(
            models,
            output / "export",
            origin,
            config.model,
            config.export,
            config.output_dir,
            parallel,
            phases,
        )
        if config.lora.rank > 0:
            export_adapter(
                run.model, output / "adapter", config.model, config.lora, config.export, parallel
            )
        metrics.log(f"exported to {output / 'export'}")
        del run, models  # their memory is wanted for the models that answer
        free_memory()
        if parallel.is_main and config.evaluation.exact_match_samples > 0:
            report_exact_match(output / "export", inputs, config, metrics)
    if parallel.is_main and config.metrics.pictures:
        draw(output, config, metrics)
    if config.export.enabled:
        metrics.log(f"talk to it: sft_fast chat {output}")
    return finish(metrics)


def draw(output: Path, config: Config, metrics: MetricsWriter) -> None:
    """Writes the pictures; a run that is done does not fail for want of them."""
    try:
        if config.metrics.samples > 0:
            write_samples(output, config.metrics.samples, config.evaluation.max_new_tokens)
        metrics.log(f"pictures: {', '.join(map(str, write_report(output)))}")
    except (ValueError, OSError) as error:
        metrics.log(f"no pictures: {error}")


def finish(metrics: MetricsWriter) -> int:
    """Ends the run on all ranks; returns the exit code."""
    metrics.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def describe(parallel: Parallel) -> str:
    """The layout in words."""
    kind = "CPU" if parallel.device.type == "cpu" else "GPU"
    ranks = f"{parallel.world_size} {kind} rank{'s' if parallel.world_size > 1 else ''}"
    return (
        f"{ranks}: tensor {parallel.tp_size} x pipeline {parallel.pp_size} x "
        f"context {parallel.cp_size} x data {parallel.dp_size}"
    )


def is_due(every_steps: int | None, done: int) -> bool:
    """Whether something that is done every so many steps is due now; never with None."""
    return every_steps is not None and done % every_steps == 0


def load_best(
    run: Run, state: TrainState, config: Config, metrics: MetricsWriter, phases: Phases
) -> None:
    """Goes back to the checkpoint of the best evaluation."""
    best = EarlyStopping(**state.early_stopping).best_step
    if best in (0, state.step):
        return
    checkpoint = checkpoint_path(Path(config.output_dir) / "checkpoints", best)
    if not checkpoint.is_dir():
        metrics.log(f"warning: {checkpoint}, the best one, was not saved; the last weights stay")
        return
    load_checkpoint(checkpoint, run.model, run.optimizer, run.schedule, phases.tensor_done)
    metrics.log(f"loaded the best weights from {checkpoint}")


def save_run(
    checkpoints: CheckpointWriter, state: TrainState, run: Run, is_last: bool, phases: Phases
) -> None:
    """Saves all that a resume needs."""
    with phases.paused("save"):
        parts = sharded_state(run.model, run.optimizer, run.schedule)
        checkpoints.save(state, parts, is_last)
