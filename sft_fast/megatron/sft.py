"""The `("megatron", "sft")` trainer: what happens to a token, from the store to the optimizer step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from sft_fast.architecture import Architecture
from sft_fast.batch import MicroBatch, fill_micro_batch
from sft_fast.config import Config, save_config
from sft_fast.data.store import TokenStore
from sft_fast.megatron.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    read_train_state,
    save_checkpoint,
)
from sft_fast.megatron.export import export_model
from sft_fast.megatron.forward_step import forward_step
from sft_fast.megatron.hf import load_weights
from sft_fast.megatron.model import build_model
from sft_fast.megatron.optim import (
    build_lr_schedule,
    build_optimizer,
    connect_schedule,
    normalise_by,
    wrap_model,
)
from sft_fast.megatron.parallel import Parallel, init_parallel, once_per_node
from sft_fast.metrics import MetricsWriter, StepCounts, step_line, step_rates
from sft_fast.packing import StepPlan


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave; equal on every rank."""

    loss: float
    """Mean over the global batch's supervised tokens, nats."""
    grad_norm: float
    lr: float
    was_skipped: bool
    """True when fp16 loss scaling overflowed and the weights did not move."""


def micro_batches(
    store: TokenStore, plan: StepPlan, step: int, config: Config, parallel: Parallel
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of one step, filled on the CPU and moved to the device."""
    rows = plan.micro_batches(
        step, parallel.dp_rank, parallel.dp_size, config.train.micro_batch_size
    )
    for bins in rows:
        sample_ids = torch.cat([torch.as_tensor(bin_) for bin_ in bins]).numpy()
        num_rows = config.packing.capacity * len(bins)
        if parallel.pp_size == 1:
            # Without pipeline stages nothing needs a fixed shape, so the padding is cut off.
            used = int(store.lengths[sample_ids].sum())
            num_rows = max(-(-used // parallel.tp_size), 1) * parallel.tp_size
        yield fill_micro_batch(store, sample_ids, num_rows).to(parallel.device)


def run_schedule(
    model: DistributedDataParallel,
    batches: Iterator[MicroBatch],
    config: Config,
    parallel: Parallel,
    forward_only: bool,
) -> torch.Tensor:
    """Runs megatron's schedule over one global batch.

    Returns: [loss_sum, num_supervised] fp64 over all data-parallel ranks, on every rank.
    """
    train = config.train
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=train.global_batch_size // (train.micro_batch_size * parallel.dp_size),
        seq_length=config.packing.capacity * train.micro_batch_size,
        micro_batch_size=1,  # a micro-batch is one row that holds all its bins
        forward_only=forward_only,
    )
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    for report in reports:
        total += report["lm loss"]
    if parallel.pp_size > 1:
        last_rank = dist.get_global_rank(parallel.pp_group, parallel.pp_size - 1)
        dist.broadcast(total, src=last_rank, group=parallel.pp_group)
    dist.all_reduce(total, group=parallel.dp_group)
    return total


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    batches: Iterator[MicroBatch],
    num_supervised: int,
    config: Config,
    parallel: Parallel,
) -> StepResult:
    """One optimizer step; the only place where gradients happen."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    normalise_by(model, num_supervised)
    total = run_schedule(model, batches, config, parallel, forward_only=False)
    lr = optimizer.param_groups[0]["lr"]
    was_updated, grad_norm, _ = optimizer.step()
    if was_updated:
        schedule.step(increment=1)
    loss_sum, counted = total.tolist()
    assert counted == num_supervised, (counted, num_supervised)
    return StepResult(loss_sum / max(counted, 1), grad_norm or 0.0, lr, not was_updated)


@torch.no_grad()
def evaluate(
    model: DistributedDataParallel, store: TokenStore, config: Config, parallel: Parallel
) -> float:
    """Mean loss per supervised token over the whole evaluation set, nats."""
    plan = make_plan(store, config)
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    for step in range(plan.num_steps_per_epoch):
        batches = micro_batches(store, plan, step, config, parallel)
        total += run_schedule(model, batches, config, parallel, forward_only=True)
    model.train()
    return float(total[0] / total[1].clamp(min=1))


def make_plan(store: TokenStore, config: Config) -> StepPlan:
    """The order of the data: a function of the lengths, the packing options and the seed."""
    return StepPlan(
        lengths=store.lengths,
        num_supervised=store.num_supervised,
        capacity=config.packing.capacity,
        strategy=config.packing.strategy,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
    )


def train(config: Config) -> int:
    """Runs supervised fine-tuning as `config` says; every rank of the job calls it.

    Returns: the process exit code, 0.

    Raises:
        ValueError: the config does not fit the data, the model or the world size.
    """
    parallel = init_parallel(config)
    output = Path(config.output_dir)
    if parallel.is_main:
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "config.yaml")
    dist.barrier()
    metrics = MetricsWriter(output, parallel.is_main)
    metrics.say(f"{parallel.world_size} x {parallel.device.type}: {describe_layout(parallel)}")
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer, metrics)
    source = read_model_source(config, tokenizer)
    model, optimizer, schedule, plan = build(config, data.train, source, parallel)
    num_steps = config.train.steps or config.train.epochs * plan.num_steps_per_epoch
    start = resume(config, model, optimizer, schedule, data.train, metrics)

    report_eval(start, model, data.eval, config, parallel, metrics)
    for step in range(start, num_steps):
        began = time.perf_counter()
        batches = micro_batches(data.train, plan, step, config, parallel)
        num_supervised = plan.num_supervised_of(step)
        result = train_step(
            model, optimizer, schedule, batches, num_supervised, config, parallel
        )
        report_step(step + 1, num_steps, result, plan, began, config, metrics)
        is_last = step + 1 == num_steps
        if is_last or is_due(config.checkpoint.every_steps, step + 1):
            save(config, step + 1, model, optimizer, schedule, data.train, parallel)
        if is_last or is_due(config.evaluation.every_steps, step + 1):
            report_eval(step + 1, model, data.eval, config, parallel, metrics)
    finish(config, model, source, tokenizer, data, parallel, metrics)
    metrics.close()
    return 0
