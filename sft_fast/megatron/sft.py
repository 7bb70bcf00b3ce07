"""The `("megatron", "sft")` trainer: what happens to a token, from store to optimizer step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn import ModuleList

from sft_fast.architecture import Architecture
from sft_fast.balance import DEFAULT_COST_MODEL, CostModel
from sft_fast.batch import MicroBatch, RowLayout
from sft_fast.config import Config, save_config
from sft_fast.data.conversation import Conversation
from sft_fast.data.demo import chance_accuracy
from sft_fast.data.formats import read_conversations
from sft_fast.data.store import TokenStore
from sft_fast.evaluate import exact_match
from sft_fast.fingerprint import DECIDE_DATA_ORDER, changed_fields, run_fields
from sft_fast.manifest import MANIFEST_FILE
from sft_fast.megatron.checkpoint import (
    CheckpointWriter,
    TrainState,
    list_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    read_train_state,
    remove_leftovers,
    sharded_state,
)
from sft_fast.megatron.export import export_model
from sft_fast.megatron.forward_step import forward_step
from sft_fast.megatron.hf import WeightSource, load_weights
from sft_fast.megatron.inputs import Inputs, read_inputs
from sft_fast.megatron.lora import adapter_fingerprint, add_adapters, seed_dropout
from sft_fast.megatron.lora_export import export_adapter
from sft_fast.megatron.model import build_model, unwrap
from sft_fast.megatron.optim import (
    build_lr_schedule,
    build_optimizer,
    connect_schedule,
    gather_parameters,
    normalise_by,
    one_or_all,
    parts_of,
    wrap_model,
)
from sft_fast.megatron.parallel import Parallel, init_parallel
from sft_fast.metrics import MetricsWriter, StepResult
from sft_fast.packing import PackingOptions, StepPlan
from sft_fast.prefetch import BatchLoader, Row


@dataclass(frozen=True)
class Run:
    """What an optimizer step changes."""

    model: ModuleList
    """DistributedDataParallel parts: one, or one for each interleaved pipeline stage."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def packed_rows(
    store: TokenStore, plan: StepPlan, steps: range, config: Config, parallel: Parallel
) -> Iterator[Row]:
    """Yields (sample ids, rows) of each of this rank's micro-batches, step after step."""
    size, alignment = config.train.micro_batch_size, config.packing.alignment
    for step in steps:
        for bins in plan.micro_batches(step, parallel.dp_rank, parallel.dp_size, size):
            sample_ids = np.concatenate(bins)
            num_rows = config.packing.capacity * len(bins)
            if parallel.pp_size == 1:
                # Without pipeline stages nothing needs a fixed shape, so the padding is cut off.
                used = -(-store.lengths[sample_ids] // alignment) * alignment
                num_rows = -(-max(int(used.sum()), 1) // parallel.tp_size) * parallel.tp_size
            yield sample_ids, num_rows


def open_batches(
    store: TokenStore, plan: StepPlan, steps: range, config: Config, parallel: Parallel
) -> BatchLoader:
    """This rank's micro-batches of `steps`, filled ahead in a thread; to be used in a `with`."""
    max_rows = config.packing.capacity * config.train.micro_batch_size + parallel.tp_size
    return BatchLoader(
        store,
        packed_rows(store, plan, steps, config, parallel),
        parallel.device,
        max_rows=max_rows,
        max_samples=max_rows,
        layout=RowLayout(alignment=config.packing.alignment),
    )


def run_schedule(
    model: ModuleList,
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
        data_iterator=one_or_all(list(tee(batches, len(model)))),
        model=list(model),
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
    run: Run,
    batches: Iterator[MicroBatch],
    num_supervised: int,
    config: Config,
    parallel: Parallel,
) -> StepResult:
    """One optimizer step; the only place where gradients happen."""
    for chunk in parts_of(run.model):
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    normalise_by(run.model, num_supervised)
    total = run_schedule(run.model, batches, config, parallel, forward_only=False)
    lr = run.optimizer.param_groups[0]["lr"]
    was_updated, grad_norm, _ = run.optimizer.step()
    if was_updated:
        run.schedule.step(increment=1)
    loss_sum, counted = total.tolist()
    assert counted == num_supervised, (counted, num_supervised)
    return StepResult(loss_sum / max(counted, 1), grad_norm or 0.0, lr, not was_updated)


@torch.no_grad()
def evaluate(model: ModuleList, store: TokenStore, config: Config, parallel: Parallel) -> float:
    """Mean loss per supervised token over the whole evaluation set, nats."""
    plan = make_plan(store, config, max_samples=config.evaluation.max_samples)
    steps = range(plan.num_steps_per_epoch)
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    with open_batches(store, plan, steps, config, parallel) as batches:
        for _ in steps:
            total += run_schedule(model, batches, config, parallel, forward_only=True)
    model.train()
    return float(total[0] / total[1].clamp(min=1))


def make_plan(
    store: TokenStore,
    config: Config,
    architecture: Architecture | None = None,
    max_samples: int | None = None,
) -> StepPlan:
    """The order of the (first) samples: a function of lengths, packing options and seed.

    The architecture only decides which rank computes what, so that ranks finish together.
    """
    packing = config.packing
    cost_model = DEFAULT_COST_MODEL
    if architecture is not None:
        cost_model = CostModel.of_shape(
            architecture.hidden_size, architecture.num_layers, architecture.vocab_size
        )
    return StepPlan(
        lengths=store.lengths[:max_samples],
        num_supervised=store.num_supervised[:max_samples],
        capacity=packing.capacity,
        strategy=packing.strategy,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        options=PackingOptions(packing.alignment, packing.max_samples_per_bin, packing.pool_size),
        cost_model=cost_model,
    )


def build_run(
    config: Config,
    architecture: Architecture,
    weights: WeightSource,
    num_steps: int,
    parallel: Parallel,
) -> Run:
    """Allocates the model, loads its weights, and adds the optimizer and the schedule."""
    modules = build_model(architecture, config, parallel)
    for module in modules:
        load_weights(module, weights, architecture, parallel)
        if config.lora.rank > 0:
            add_adapters(module, architecture, config, parallel)
    model = wrap_model(modules, config)
    optimizer = build_optimizer(model, config)
    connect_schedule(model, optimizer)
    return Run(model, optimizer, build_lr_schedule(optimizer, config, num_steps))


def find_checkpoint(config: Config, parallel: Parallel, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `checkpoint.resume` names; None = begin at step 0.

    Raises:
        ValueError: it is damaged, or the run may not begin anew beside others.
    """
    options = config.checkpoint
    folder = Path(config.output_dir) / "checkpoints"
    existing = list_checkpoints(folder)
    if options.resume == "never" and existing:
        raise ValueError(
            f"checkpoint.resume is never, but {config.output_dir} holds {existing[-1].name}; "
            "choose another output_dir, or checkpoint.resume=auto"
        )
    if options.resume not in ("auto", "never"):
        existing = [Path(options.resume)]
    dist.barrier()  # every rank has seen the same folder before rank 0 tidies it up
    if parallel.is_main:
        remove_leftovers(folder)
    return newest_whole_checkpoint(existing, say, options.timeout_minutes * 60)


def continued_state(
    config: Config, checkpoint: Path, fields: dict[str, str], say: Callable[[str], None]
) -> TrainState:
    """Where `checkpoint` stands, and where the data begins anew if other data is allowed.

    Args:
        fields: of this run; see fingerprint.run_fields.

    Raises:
        ValueError: the checkpoint belongs to other data, another order of it or another model.
    """
    found = read_train_state(checkpoint)
    changed = changed_fields(found.fields, fields, config.checkpoint.allow_change, checkpoint)
    if not changed & DECIDE_DATA_ORDER:
        return replace(found, fields=fields)
    say(f"changed: {', '.join(sorted(changed))}; the data begins anew")
    return replace(found, fields=fields, first_data_step=found.step)


def is_exported(checkpoint: Path, config: Config) -> bool:
    """Whether the export was made after `checkpoint`."""
    if not config.export.enabled:
        return True
    made = Path(config.output_dir) / "export" / MANIFEST_FILE
    return made.is_file() and made.stat().st_mtime >= (checkpoint / MANIFEST_FILE).stat().st_mtime


def train(config: Config) -> int:
    """Runs supervised fine-tuning as `config` says; every rank of the job calls it.

    Returns: the process exit code, 0.

    Raises:
        ValueError: the config does not fit the data, the model or the world size.
    """
    parallel = init_parallel(config)
    output = Path(config.output_dir)
    metrics = MetricsWriter(output, parallel.is_main)
    metrics.say(describe(parallel))
    inputs = read_inputs(config)
    metrics.write("data", **asdict(inputs.store.report))
    metrics.say(inputs.store.report.summary())
    plan = make_plan(inputs.store, config, inputs.model.architecture)
    packing = plan.report(parallel.dp_size, config.train.micro_batch_size)
    metrics.write("packing", **packing.record())
    metrics.say(f"packing: {packing}")
    adapters = adapter_fingerprint(config, inputs.model.architecture, inputs.model.weights)
    fields = run_fields(
        config, inputs.store, inputs.tokenizer, plan, inputs.model.architecture, adapters
    )
    state = TrainState(0, fields)
    checkpoint = find_checkpoint(config, parallel, metrics.say)
    if checkpoint is not None:
        state = continued_state(config, checkpoint, fields, metrics.say)
    first, start = state.first_data_step, state.step
    num_steps = config.train.steps or first + (config.train.epochs or 0) * plan.num_steps_per_epoch
    if start > num_steps:
        raise ValueError(
            f"checkpoint.resume: {checkpoint} has {start} steps, more than the {num_steps} of "
            "train.steps or train.epochs; raise them, or choose another output_dir"
        )
    if checkpoint is not None and start == num_steps and is_exported(checkpoint, config):
        metrics.say(f"{checkpoint} is at step {start} of {num_steps}: nothing to do")
        return finish(metrics)
    run = build_run(config, inputs.model.architecture, inputs.model.weights, num_steps, parallel)
    metrics.say(f"attention: {unwrap(run.model[0]).attention}")
    if checkpoint is not None:
        load_checkpoint(checkpoint, run.model, run.optimizer, run.schedule)
        metrics.say(f"resumed from {checkpoint} at step {start} of {num_steps}")
    if parallel.is_main:
        save_config(config, output / "config.yaml")
    checkpoints = CheckpointWriter(output / "checkpoints", config.checkpoint, metrics.say)

    report_evaluation(start, run, inputs.eval_store, config, parallel, metrics)
    plan_steps = range(start - first, num_steps - first)
    with open_batches(inputs.store, plan, plan_steps, config, parallel) as batches:
        for step in range(start, num_steps):
            began = time.perf_counter()
            counts = plan.counts(step - first)
            seed_dropout(config, step, parallel)
            result = train_step(run, batches, counts.num_supervised, config, parallel)
            done = step + 1
            if done == num_steps or is_due(config.metrics.log_every_steps, done):
                metrics.step(done, num_steps, result, counts, time.perf_counter() - began)
            if done == num_steps or is_due(config.checkpoint.every_steps, done):
                save_run(checkpoints, replace(state, step=done), run, is_last=done == num_steps)
            if done == num_steps or is_due(config.evaluation.every_steps, done):
                report_evaluation(done, run, inputs.eval_store, config, parallel, metrics)

    if config.export.enabled:
        gather_parameters(run.model)
        export_model(
            [unwrap(chunk) for chunk in run.model], output / "export", inputs, config, parallel
        )
        if config.lora.rank > 0:
            export_adapter(run.model, output / "adapter", config, parallel)
        metrics.say(f"exported to {output / 'export'}")
        if parallel.is_main and config.evaluation.exact_match_samples > 0:
            report_exact_match(output / "export", inputs, config, metrics)
    return finish(metrics)


def finish(metrics: MetricsWriter) -> int:
    metrics.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def describe(parallel: Parallel) -> str:
    return (
        f"{parallel.world_size} {parallel.device.type} ranks: tensor {parallel.tp_size} x "
        f"pipeline {parallel.pp_size} x data {parallel.dp_size}"
    )


def is_due(every_steps: int | None, done: int) -> bool:
    return every_steps is not None and done % every_steps == 0


def save_run(checkpoints: CheckpointWriter, state: TrainState, run: Run, is_last: bool) -> None:
    gather_parameters(run.model)
    parts = sharded_state(run.model, run.optimizer, run.schedule, is_loading=False)
    checkpoints.save(state, parts, is_last)


def report_evaluation(
    step: int,
    run: Run,
    store: TokenStore | None,
    config: Config,
    parallel: Parallel,
    metrics: MetricsWriter,
) -> None:
    """Evaluates and reports, when there is an evaluation set."""
    if store is None:
        return
    loss = evaluate(run.model, store, config, parallel)
    metrics.write("eval", step=step, loss=loss)
    metrics.say(f"eval at step {step}: loss {loss:.4f}")


def up_to_last_answer(chat: Conversation) -> list[dict[str, Any]]:
    turns = [turn.as_dict() for turn in chat.messages]
    while turns[-1]["role"] != "assistant":
        turns.pop()
    return turns


def report_exact_match(
    folder: Path, inputs: Inputs, config: Config, metrics: MetricsWriter
) -> None:
    """Lets transformers answer held-out questions with the exported model."""
    assert inputs.eval_rows is not None, "the config demands data.eval for exact_match_samples"
    chats = read_conversations(inputs.eval_rows, config.data.format, config.data.fields)
    questions = list(islice(chats, config.evaluation.exact_match_samples))
    messages = [up_to_last_answer(chat) for _, chat in questions]
    matches = exact_match(folder, messages, config.evaluation.max_new_tokens)
    accuracy = sum(matches) / len(matches)
    text = f"exact match on {len(matches)} held-out questions: {accuracy:.1%}"
    values = {"exact_match": accuracy, "num_questions": len(matches)}
    if config.data.eval == "demo":
        values["chance"] = chance_accuracy([row for row, _ in questions])
        text += f" (chance {values['chance']:.1%})"
    metrics.write("exact_match", **values)
    metrics.say(text)
