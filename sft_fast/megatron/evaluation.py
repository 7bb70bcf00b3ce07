"""Evaluation during training: loss, accuracy, perplexity and custom metrics, per source.

The loss is the cross-entropy of the supervised tokens, without weights, label smoothing, z-loss or
custom loss, so that runs with other training losses can be compared. A stage with a loss of its own
reports that, and what it measures.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import ModuleList

from sft_fast.config.schema import Config
from sft_fast.config.sections import DataConfig, EvaluationConfig
from sft_fast.data.questions import read_questions
from sft_fast.data.store import TokenStore
from sft_fast.evaluation.early_stopping import EarlyStopping
from sft_fast.evaluation.exact_match import chance_accuracy, exact_match
from sft_fast.megatron.batches import BatchShape, batch_shape, open_batches
from sft_fast.megatron.forward_step import check_once, labelled_outputs, packed_samples
from sft_fast.megatron.load_inputs import Inputs
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.schedule import run_schedule, sum_over_ranks
from sft_fast.metrics.writer import MetricsWriter
from sft_fast.packing.from_config import make_plan
from sft_fast.packing.micro_batch import MicroBatch, sample_index
from sft_fast.packing.steps import StepPlan
from sft_fast.registry import Metric, SampleOutputs, get_metric, is_greater_better
from sft_fast.runtime.phases import Phases
from sft_fast.runtime.run_files import checkpoint_path
from sft_fast.stages import Stage, stage_of

Values = dict[str, float]
LOSS, NUM_TOKENS, NUM_CORRECT, NUM_BUILT_IN = range(4)


class Evaluator:
    """Evaluates a run at the steps that the config names, and remembers how it went."""

    def __init__(
        self,
        store: TokenStore | None,
        config: Config,
        parallel: Parallel,
        metrics: MetricsWriter,
        early_stopping: EarlyStopping,
        phases: Phases,
    ):
        """
        Args:
            store: the evaluation set; None = there is nothing to do.
            config: of the run.
            parallel: the layout.
            metrics: where results go.
            early_stopping: after the evaluations of the checkpoint that the run resumes from.
            phases: told what this rank is doing.

        Raises:
            ValueError: a metric that the config names is not registered.
        """
        self.store, self.config, self.parallel, self.metrics = store, config, parallel, metrics
        self.early_stopping, self.phases = early_stopping, phases
        self.custom = [get_metric(name) for name in config.evaluation.metrics]
        self.stage = stage_of(config)
        best_by, measures = config.evaluation.best_by, self.stage.reported()
        self.greater_is_better = (
            measures[best_by] if best_by in measures else is_greater_better(best_by)
        )

    def before_training(self, model: ModuleList, step: int) -> None:
        """Evaluates where the run begins; it does not count, unless the checkpoint missed it."""
        if step == 0:
            self.measure(model, 0)
        elif self.is_due(step) and self.early_stopping.last_step < step:
            self.after_step(model, step)

    def after_step(self, model: ModuleList, step: int) -> None:
        """Evaluates, and compares with the evaluations before."""
        values = self.measure(model, step)
        if values is not None:
            evaluation = self.config.evaluation
            value = values[evaluation.best_by]
            self.early_stopping = self.early_stopping.after(
                step, value, self.greater_is_better, evaluation.min_delta
            )

    def is_due(self, step: int) -> bool:
        """Whether an evaluation belongs behind this step."""
        every = self.config.evaluation.every_steps
        return every is not None and step % every == 0

    def should_save(self, step: int) -> bool:
        """Whether the weights of `step` are the best so far and are to be kept."""
        return self.config.checkpoint.keep_best and self.early_stopping.best_step == step > 0

    def should_stop(self) -> bool:
        """Whether early stopping ends the run."""
        return self.early_stopping.should_stop(self.config.evaluation.patience)

    def report_best(self) -> None:
        """Logs the best evaluation and its checkpoint."""
        best = self.early_stopping
        if best.best is not None:
            name = self.config.evaluation.best_by
            kept = None
            if self.config.checkpoint.keep_best:
                folder = Path(self.config.output_dir) / "checkpoints"
                kept = str(checkpoint_path(folder, best.best_step))
            self.metrics.write(
                "best", step=best.best_step, metric=name, value=best.best, checkpoint=kept
            )
            stopped = ", training stopped early" if self.should_stop() else ""
            self.metrics.log(f"best {name} {best.best:.4f} at step {best.best_step}{stopped}")

    def measure(self, model: ModuleList, step: int) -> Values | None:
        """Evaluates and reports; None without an evaluation set, or when told to stop."""
        if self.store is None:
            return None
        with self.phases.paused("evaluate"):
            tally: Tally = AnswerTally(self.custom, self.parallel)
            if self.stage.has_loss:
                tally = StageTally(self.stage)
            config = self.config
            plan = make_plan(
                self.store,
                config.packing,
                config.train,
                config.seed,
                max_samples=config.evaluation.max_samples,
                group_size=self.stage.group_size,
            )
            shape = batch_shape(config.train, config.packing, config.model, self.parallel)
            values = evaluate(model, self.store, plan, shape, self.parallel, tally, self.phases)
        if values is None:
            return None
        overall, by_source = values
        self.metrics.write("eval", step=step, **clean(overall), **listed(by_source))
        shown = [name for name in overall if name not in ("perplexity", "num_supervised")]
        text = "  ".join(f"{name} {overall[name]:.4f}" for name in shown)
        self.metrics.log(f"eval at step {step}: {text}")
        return overall


def listed(by_source: dict[str, Values]) -> dict[str, Any]:
    """Sources for the log; a lone one would only say everything twice."""
    if len(by_source) < 2:
        return {}
    return {"by_source": {source: clean(values) for source, values in by_source.items()}}


def clean(values: Values) -> dict[str, float | None]:
    """Values that are not finite become None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


@torch.no_grad()
def evaluate(
    model: ModuleList,
    store: TokenStore,
    plan: StepPlan,
    shape: BatchShape,
    parallel: Parallel,
    tally: "Tally",
    phases: Phases,
) -> tuple[Values, dict[str, Values]] | None:
    """Runs the whole evaluation set through the model; None when all ranks agreed to stop.

    Returns: what the tally reports, over everything and for each source; equal on every rank. NaN
        where a source has no supervised token.
    """
    steps = range(plan.num_steps_per_epoch)
    names, source_of = sources_of(store)
    size = (len(names), tally.num_sums)
    total = torch.zeros(size, dtype=torch.float64, device=parallel.device)
    model.eval()
    step = partial(eval_step, partial(count_by_source, tally, source_of, len(names)))
    with open_batches(store, plan, steps, shape, parallel) as batches:
        for _ in steps:
            reports = run_schedule(model, batches, shape, step, forward_only=True)
            added, votes, _ = sum_over_ranks(reports, "tally", size, parallel, phases.votes())
            total += added
            phases.heartbeat()
            phases.apply_votes(*votes.tolist())
            if phases.all_stop:
                break
    model.train()
    if phases.all_stop:
        return None
    sums = total.cpu().numpy()
    by_source = {name: tally.values(row) for name, row in zip(names, sums, strict=True)}
    return tally.values(sums.sum(axis=0)), by_source


def sources_of(store: TokenStore) -> tuple[list[str], np.ndarray]:
    """Names of the files that samples come from, and the number of each sample's, int64 [N]."""
    firsts = [first for first, _ in store.files]
    names = list(dict.fromkeys(name for _, name in store.files))
    numbers = np.array([names.index(name) for _, name in store.files], dtype=np.int64)
    samples = np.arange(len(store.offsets) - 1)
    return names, numbers[np.searchsorted(firsts, samples, side="right") - 1]


def eval_step(count: Any, data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
    """megatron's forward_step; on the last stage the outputs [n, 1, T] fp32 that are counted."""
    batch = next(data_iterator)
    check_once(batch, model)
    outputs = labelled_outputs(model, batch, packed_samples(batch, wants_outputs=True))
    return outputs, partial(eval_loss_func, count, batch)


def eval_loss_func(
    count: Any, batch: MicroBatch, outputs: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `loss_func`, for outputs [n, b, s]; the report is what was counted."""
    num_tokens = torch.tensor(batch.num_supervised, dtype=torch.int32, device=outputs.device)
    return outputs.sum(), num_tokens, {"tally": count(batch, outputs)}


def count_by_source(
    tally: "Tally", source_of: np.ndarray, num_sources: int, batch: MicroBatch, outputs: Tensor
) -> Tensor:
    """Sums of a micro-batch for each source.

    Args:
        tally: what is counted.
        source_of: int64 [N], number of each sample's source.
        num_sources: how many sources there are.
        batch: the micro-batch.
        outputs: fp32 [n, 1, T], of the model.

    Returns: fp64 [num_sources, tally.num_sums].
    """
    active = batch.active_tokens.cpu()
    index = sample_index(active, batch.seqlens, batch.layout.cp_size)  # [A]
    assert batch.sample_ids is not None, "fill_micro_batch knows them"
    sources = torch.from_numpy(source_of[batch.sample_ids])  # [samples]
    columns = outputs[:, 0].index_select(1, active.to(outputs.device)).double()  # [n, A]
    sums = torch.zeros(num_sources, tally.num_sums, dtype=torch.float64, device=outputs.device)
    tally.add(sums, sources, index, batch, columns)
    return sums


class Tally(Protocol):
    """What an evaluation counts of the active tokens, and what it reports."""

    num_sums: int
    """Sums for each source."""

    def add(
        self, sums: Tensor, sources: Tensor, index: Tensor, batch: MicroBatch, columns: Tensor
    ) -> None:
        """Adds a micro-batch.

        Args:
            sums: fp64 [num_sources, num_sums], changed in place.
            sources: int64 [samples], each sample's source.
            index: int64 [A], ascending: each active token's sample.
            batch: the micro-batch.
            columns: fp64 [n, A], the model's outputs at the active tokens.
        """

    def values(self, sums: np.ndarray) -> Values:
        """From the sums [num_sums] of one source, or of all, to what is reported."""


class StageTally:
    """The loss of a stage and what it measures: means over the active tokens, by weight."""

    def __init__(self, stage: Stage):
        self.names = ("loss", *stage.measures)
        self.num_sums = 1 + len(self.names)

    def add(
        self, sums: Tensor, sources: Tensor, index: Tensor, batch: MicroBatch, columns: Tensor
    ) -> None:
        """Adds a micro-batch; see `Tally`. columns are the loss and the measures."""
        device = columns.device
        weights = torch.ones_like(columns[0])  # [A]
        if batch.weights is not None:
            active = batch.active_tokens.to(device)
            weights = batch.weights[0].index_select(0, active).double()
        rows = torch.cat([weights[None], columns * weights])  # [num_sums, A]
        sums.index_add_(0, sources[index].to(device), rows.t())

    def values(self, sums: np.ndarray) -> Values:
        """The mean of each; see `Tally`."""
        pairs = zip(self.names, sums[1:], strict=True)
        return {name: divide(total, sums[0]) for name, total in pairs}


class AnswerTally:
    """Loss, accuracy and the user's metrics of the supervised tokens of answers."""

    def __init__(self, custom: list[Metric], parallel: Parallel):
        self.custom, self.parallel = custom, parallel
        self.num_sums = NUM_BUILT_IN + 2 * len(custom)

    def add(
        self, sums: Tensor, sources: Tensor, index: Tensor, batch: MicroBatch, columns: Tensor
    ) -> None:
        """Adds a micro-batch; see `Tally`.

        columns are the log probability of the label, entropy, correctness; sums LOSS, NUM_TOKENS,
        NUM_CORRECT, then two for each custom metric.
        """
        device, parallel, custom = columns.device, self.parallel, self.custom
        built_in = torch.stack([-columns[0], torch.ones_like(columns[0]), columns[2]], dim=1)
        sums[:, :NUM_BUILT_IN].index_add_(0, sources[index].to(device), built_in)
        if not custom:
            return
        active = batch.active_tokens.to(device)
        labels = batch.labels[0].index_select(0, active)
        answers = columns, labels, index
        if parallel.cp_size > 1:
            positions = batch.position_ids[0].index_select(0, active)
            answers = whole_answers(columns, labels, index, positions, parallel)
        by_sample = custom_sums(custom, *answers, num_samples=len(sources))
        if parallel.cp_rank > 0:
            by_sample.zero_()  # the first rank has counted them
        added = torch.zeros(len(sums), 2 * len(custom), dtype=torch.float64)
        added.index_add_(0, sources, by_sample)
        sums[:, NUM_BUILT_IN:] += added.to(device)

    def values(self, sums: np.ndarray) -> Values:
        """Loss (nats per supervised token), perplexity, accuracy, num_supervised, the metrics."""
        loss = divide(sums[LOSS], sums[NUM_TOKENS])
        values = {
            "loss": loss,
            "perplexity": math.exp(loss) if not loss > 700 else math.inf,
            "accuracy": divide(sums[NUM_CORRECT], sums[NUM_TOKENS]),
            "num_supervised": int(sums[NUM_TOKENS]),
        }
        pairs = sums[NUM_BUILT_IN:].reshape(-1, 2)
        for metric, (numerator, denominator) in zip(self.custom, pairs, strict=True):
            values[metric.name] = divide(numerator, denominator)
        return values


def whole_answers(
    active: Tensor, labels: Tensor, sample_index: Tensor, positions: Tensor, parallel: Parallel
) -> tuple[Tensor, Tensor, Tensor]:
    """Joins what the context-parallel ranks know of the samples that they share.

    Args:
        active: [3, A], as for `custom_sums`, of this rank's tokens.
        labels: int64 [A].
        sample_index: int64 [A], ascending.
        positions: int64 [A], of the tokens in their samples.
        parallel: the layout.

    Returns: the first three, of all ranks' tokens.
    """
    parts: list[Any] = [None] * parallel.cp_size
    own = active.cpu(), labels.cpu(), sample_index, positions.cpu()
    dist.all_gather_object(parts, own, group=parallel.cp_group)
    active, labels, sample_index, positions = (
        torch.cat(part, -1) for part in zip(*parts, strict=True)
    )
    # Sample by sample, and in each by position.
    order = positions.argsort(stable=True)
    order = order[sample_index[order].argsort(stable=True)]
    return active[:, order], labels[order], sample_index[order]


def custom_sums(
    custom: list[Metric], active: Tensor, labels: Tensor, sample_index: Tensor, *, num_samples: int
) -> Tensor:
    """fp64 [num_samples, 2 * metrics]: numerator and denominator of each metric for each sample.

    Args:
        custom: the user's metrics.
        active: [3, A], as the outputs of `eval_step`, of the supervised tokens.
        labels: int64 [A].
        sample_index: int64 [A], ascending: which sample of the sequence.
        num_samples: samples of the sequence.
    """
    sums = torch.zeros(num_samples, 2 * len(custom), dtype=torch.float64)
    active, labels = active.float().cpu(), labels.cpu()
    counts = torch.bincount(sample_index, minlength=num_samples).tolist()
    parts = zip(active.split(counts, dim=1), labels.split(counts), strict=True)
    for number, (outputs, sample_labels) in enumerate(parts):
        if len(sample_labels) == 0:
            continue
        sample = SampleOutputs(sample_labels, outputs[0], outputs[1], outputs[2].bool())
        for place, metric in enumerate(custom):
            numerator, denominator = metric.function(sample)
            sums[number, 2 * place] = numerator
            sums[number, 2 * place + 1] = denominator
    return sums


def divide(numerator: float, denominator: float) -> float:
    """The ratio; NaN where there is nothing to divide by."""
    return float(numerator / denominator) if denominator else math.nan


def report_exact_match(
    folder: Path,
    inputs: Inputs,
    data: DataConfig,
    evaluation: EvaluationConfig,
    metrics: MetricsWriter,
) -> None:
    """Lets transformers answer held-out questions with the exported model."""
    assert inputs.eval_sources is not None, "the config demands data.eval for exact_match_samples"
    questions = read_questions(inputs.eval_sources, evaluation.exact_match_samples)
    if not questions:
        metrics.log("no exact match: the evaluation rows hold no question with an answer in words")
        return
    try:
        matches = exact_match(folder, questions, evaluation.max_new_tokens)
    except torch.OutOfMemoryError:
        metrics.log(f"no exact match: {folder} does not fit one device beside the run")
        return
    accuracy = sum(matches) / len(matches)
    text = f"exact match on {len(matches)} held-out questions: {accuracy:.1%}"
    values = {"exact_match": accuracy, "num_questions": len(matches)}
    if data.eval == "demo":
        values["chance"] = chance_accuracy([question.record for question in questions])
        text += f" (chance {values['chance']:.1%})"
    metrics.write("exact_match", **values)
    metrics.log(text)
