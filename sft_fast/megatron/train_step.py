"""One optimizer step: what it needs, and what happens in it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import ModuleList

from sft_fast.config.schema import Config
from sft_fast.megatron.batches import BatchShape, batch_shape
from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
from sft_fast.megatron.expert_load import ExpertLoad, move_biases, watch_experts
from sft_fast.megatron.forward_step import forward_step
from sft_fast.megatron.guard import Guard
from sft_fast.megatron.hf import WeightSource
from sft_fast.megatron.optim import (
    build_lr_schedule,
    build_optimizer,
    clip_and_update,
    connect_schedule,
    normalise_by,
    parts_of,
    ready_gradients,
    wrap_model,
)
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.schedule import ForwardStep, run_schedule, sum_over_ranks
from sft_fast.megatron.starting_model import starting_model
from sft_fast.metrics.writer import StepOutcome, StepReason
from sft_fast.models.architecture import Architecture
from sft_fast.packing.micro_batch import MicroBatch
from sft_fast.packing.steps import StepCounts
from sft_fast.runtime.phases import Phases, no_report


@dataclass(frozen=True)
class Run:
    """What an optimizer step needs, and what it changes."""

    model: ModuleList
    """DistributedDataParallel parts: one, or one for each interleaved pipeline stage."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    shape: BatchShape
    parallel: Parallel
    forward_step: ForwardStep = forward_step
    copier: HostCopier = field(default_factory=HostCopier)
    """What a save in the background still reads; the update waits for it."""
    load: ExpertLoad | None = None
    """How the routers spread the tokens; None = the model has no experts."""


def build_run(
    config: Config,
    architecture: Architecture,
    weights: WeightSource,
    num_steps: int,
    parallel: Parallel,
    tensor_done: Callable[[], None] = no_report,
) -> Run:
    """Allocates the model, loads its weights, and adds the optimizer and the schedule."""
    modules = starting_model(config, architecture, weights, parallel, tensor_done)
    load = watch_experts(modules, architecture, config.router, parallel.device)
    model = wrap_model(modules, config.model, config.parallel)
    optimizer = build_optimizer(
        model,
        config.model,
        config.parallel,
        config.optim,
        parallel,
        config.lora.loraplus_lr_ratio if config.lora.rank > 0 else 1.0,
    )
    connect_schedule(model, optimizer)
    schedule = build_lr_schedule(optimizer, config.optim, num_steps)
    shape = batch_shape(config.train, config.packing, config.model, parallel)
    return Run(model, optimizer, schedule, shape, parallel, load=load)


def train_step(
    run: Run,
    batches: Iterator[MicroBatch],
    counts: StepCounts,
    guard: Guard | None = None,
    phases: Phases | None = None,
) -> StepOutcome:
    """Makes one optimizer step; the only place where gradients happen.

    The objective is the weighted mean over the supervised tokens of the global batch: the sum of
    weight * loss over the sum of weights. Weights of the data are relative, then, and a token whose
    weight goes to 0 becomes one without a loss.

    Args:
        run: what is changed.
        batches: this rank's micro-batches, as many as one step has.
        counts: of the step, from the packing plan.
        guard: refuses updates; None = every update is made.
        phases: has this rank's votes and gets the sum of all ranks'; None = nobody votes.
    """
    phases = phases or Phases.unwatched()
    for chunk in parts_of(run.model):
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    normalise_by(run.model, counts.loss_weight)
    load = run.load
    if load is not None:
        load.begin_step(counts)
    reports = run_schedule(run.model, batches, run.shape, run.forward_step)
    total, votes, seen = sum_over_ranks(
        reports, "lm loss", (2,), run.parallel, phases.votes(), None if load is None else load.seen
    )
    if load is not None:
        total = torch.cat([total, load.end_step(seen, counts.num_tokens)])
    lr = run.optimizer.param_groups[0]["lr"]
    grad_norm = ready_gradients(run.optimizer)
    # The norm is on the host by now, so reading the loss waits for nothing.
    loss_sum, counted, *of_experts = total.tolist()
    assert counted == counts.num_supervised, (counted, counts)
    phases.apply_votes(*votes.tolist())
    loss = loss_sum / (counts.loss_weight or 1.0)
    reason, warning = StepReason.UPDATED, ""
    if grad_norm is None:
        reason, warning = StepReason.OVERFLOW, "fp16 overflow"
    elif guard is not None:
        reason, warning = guard.judge(loss, grad_norm)
    outcome = StepOutcome(
        loss,
        math.nan if grad_norm is None else grad_norm,
        lr,
        reason,
        warning,
        {} if load is None else load.figures(of_experts),
    )
    if outcome.updated:
        run.copier.before_update()
        clip_and_update(run.optimizer, outcome.grad_norm)
        run.schedule.step(increment=1)
        if load is not None:
            move_biases(run.model, load, seen)
    return outcome
