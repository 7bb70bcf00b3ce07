"""Checks of keys that must fit together; each names its keys, so a message can point at them."""

from collections.abc import Iterator, Mapping

from sft_fast.config.sections import (
    OWN_PARTS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    ParallelConfig,
    ShapeConfig,
    TokenizerConfig,
    TrainConfig,
)
from sft_fast.constants import round_up
from sft_fast.errors import Problem
from sft_fast.evaluation.choices import BUILT_IN_METRICS


def model_problems(model: ModelConfig, tokenizer: TokenizerConfig) -> Iterator[Problem]:
    """What is wrong with the choice of model, weights and tokenizer."""
    if (model.path is None) == (model.shape is None):
        yield Problem(
            ("model.path", "model.shape"),
            "neither" if model.path is None else "both",
            "exactly one: trained weights (path) or an architecture for random weights (shape)",
            "model.path=<directory or hub id>" if model.path is None else "model.shape=null",
        )
    if model.path is None and model.random_init:
        yield Problem(("model.random_init", "model.path"), "true without a path", "a path")
    if model.path is None and model.revision is not None:
        yield Problem(("model.revision", "model.path"), "a revision without a path", "a path")
    if model.path is None and tokenizer.path is None:
        found = "null, and there is no model.path to take it from"
        yield Problem(("tokenizer.path",), found, "a directory or hub id, or demo")
    if model.path is not None and tokenizer.path == "demo":
        yield Problem(
            ("tokenizer.path", "model.path"),
            "the demo tokenizer with a model that has its own vocabulary",
            "the model's own tokenizer",
            "tokenizer.path=null",
        )


def memory_problems(
    model: ModelConfig, parallel: ParallelConfig, optim: OptimConfig
) -> Iterator[Problem]:
    """What is wrong with recomputation and offloading."""
    if model.recompute == "block" and model.recompute_layers is None:
        yield Problem(
            ("model.recompute", "model.recompute_layers"),
            "block with recompute_layers null",
            "block with a number of layers",
            "model.recompute_layers=4",
        )
    takes_layers = model.recompute == "block" or (
        model.recompute == "selective" and set(model.recompute_modules) <= set(OWN_PARTS)
    )
    if model.recompute_layers is not None and not takes_layers:
        parts = f" of {', '.join(model.recompute_modules)}"
        found = model.recompute + (parts if model.recompute == "selective" else "")
        yield Problem(
            ("model.recompute", "model.recompute_layers"),
            f"{found} with recompute_layers {model.recompute_layers}",
            "a number of layers with block, or with selective of norm and activation alone",
            "model.recompute=block, or model.recompute_modules=[norm,activation]",
        )
    if model.offload_layers > 0 and model.recompute != "none":
        yield Problem(
            ("model.offload_layers", "model.recompute"),
            f"{model.offload_layers} layers are kept in host memory, and recompute is "
            f"{model.recompute}",
            "one of the two",
            "model.recompute=none, or model.offload_layers=0",
        )
    if model.offload_layers > 0 and parallel.pipeline > 1:
        yield Problem(
            ("model.offload_layers", "parallel.pipeline"),
            f"{model.offload_layers} offloaded layers with parallel.pipeline {parallel.pipeline}",
            "no offloading of activations with pipeline stages",
            "model.offload_layers=0, or model.recompute=full",
        )
    if optim.offload_fraction > 0 and not parallel.distributed_optimizer:
        yield Problem(
            ("optim.offload_fraction", "parallel.distributed_optimizer"),
            f"{optim.offload_fraction} without the distributed optimizer",
            "parallel.distributed_optimizer true",
            "parallel.distributed_optimizer=true",
        )
    if optim.offload_fraction > 0 and model.dtype == "fp32":
        yield Problem(
            ("optim.offload_fraction", "model.dtype"),
            f"{optim.offload_fraction} with weights in fp32, of which megatron-core cannot "
            "load an offloaded optimizer",
            "weights in 16 bits",
            "model.dtype=bf16, or optim.offload_fraction=0",
        )


def transformer_engine_problems(
    model: ModelConfig, packing: PackingConfig, parallel: ParallelConfig, lora: LoraConfig
) -> Iterator[Problem]:
    """What Transformer Engine and 8-bit products do not go with."""
    if model.fp8 != "none" and model.transformer_impl == "local":
        yield Problem(
            ("model.fp8", "model.transformer_impl"),
            f"{model.fp8} with megatron-core's own linear layers, which have no 8-bit products",
            "Transformer Engine",
            "model.transformer_impl=auto, or model.fp8=none",
        )
    if model.fp8 != "none" and model.dtype != "bf16":
        yield Problem(
            ("model.fp8", "model.dtype"),
            f"{model.fp8} with {model.dtype}",
            "bf16 for what is not computed in 8 bits",
            "model.dtype=bf16",
        )
    if model.uses_transformer_engine and lora.rank > 0:
        yield Problem(
            ("lora.rank", "model.transformer_impl", "model.fp8"),
            f"{lora.rank} with Transformer Engine's linear layers",
            "adapters beside megatron-core's own, which know how to add them",
            "model.transformer_impl=local model.fp8=none, or lora.rank=0",
        )
    rows = model.fp8_multiple * parallel.tensor * parallel.context
    if model.fp8 != "none" and parallel.pipeline > 1 and packing.capacity % rows != 0:
        better = round_up(packing.capacity, rows)
        yield Problem(
            ("packing.capacity", "model.fp8"),
            f"{packing.capacity} with model.fp8_recipe {model.fp8_recipe}",
            f"a multiple of {rows}, so that each rank has a multiple of {model.fp8_multiple}",
            f"packing.capacity={better}",
        )


def shape_problems(shape: ShapeConfig) -> Iterator[Problem]:
    """What contradicts itself in a shape of random weights."""
    heads, groups = "model.shape.num_attention_heads", "model.shape.num_key_value_heads"
    values = {f"model.shape.{name}": value for name, value in shape.model_dump().items()}
    for divisor, key in ((heads, "model.shape.hidden_size"), (groups, heads)):
        if values[key] % values[divisor] != 0:
            yield Problem(
                (key, divisor),
                f"{values[key]} is not a multiple of {values[divisor]}",
                f"{divisor} divides {key}",
            )
    chosen, experts = "model.shape.experts_per_token", "model.shape.num_experts"
    if 0 < shape.num_experts < shape.experts_per_token:
        yield Problem(
            (chosen, experts),
            f"{values[chosen]} of {values[experts]} experts",
            f"{chosen} <= {experts}",
        )
    if values["model.shape.hidden_size"] % values[heads] == 0 and shape.head_dim % 2 != 0:
        yield Problem(
            ("model.shape.hidden_size", heads),
            f"{shape.head_dim} channels per head",
            "an even number, because the rotary embedding turns pairs of channels",
        )


def train_problems(train: TrainConfig) -> Iterator[Problem]:
    """What is wrong with the length of a run and its batch sizes."""
    if (train.steps is None) == (train.epochs is None):
        yield Problem(
            ("train.steps", "train.epochs"),
            "neither" if train.steps is None else "both",
            "exactly one of the two",
            "train.epochs=1" if train.steps is None else "train.steps=null or train.epochs=null",
        )
    if train.global_batch_size % train.micro_batch_size != 0:
        yield Problem(
            ("train.global_batch_size", "train.micro_batch_size"),
            f"{train.global_batch_size} is not a multiple of {train.micro_batch_size}",
            "train.micro_batch_size divides train.global_batch_size",
        )


def stream_problems(
    data: DataConfig, packing: PackingConfig, train: TrainConfig
) -> Iterator[Problem]:
    """What a source that is never read whole cannot have."""
    if not data.streaming:
        return
    if train.epochs is not None:
        yield Problem(
            ("data.streaming", "train.epochs"),
            "a stream with train.epochs; where it ends is not known before",
            "train.steps: a stream that has ended begins anew until they are done",
            "train.epochs=null train.steps=1000, or data.streaming=false",
        )
    if data.eval_fraction is not None:
        yield Problem(
            ("data.streaming", "data.eval_fraction"),
            "a share of a stream for evaluation, which would have to be read whole first",
            "data.eval, which is stored",
            "data.eval_fraction=null data.eval=<source>",
        )
    if data.near_duplicates != "keep":
        yield Problem(
            ("data.streaming", "data.near_duplicates"),
            f"{data.near_duplicates} for a stream, whose samples are not known before",
            "keep, or data that is stored",
            "data.near_duplicates=keep, or data.streaming=false",
        )
    if packing.strategy not in ("auto", "window"):
        yield Problem(
            ("data.streaming", "packing.strategy"),
            f"{packing.strategy} for a stream",
            "window, which packs from the samples next in line",
            "packing.strategy=window",
        )
    if train.neftune_alpha > 0:
        yield Problem(
            ("data.streaming", "train.neftune_alpha"),
            "noise for a stream, whose samples have no number that is known to all ranks",
            "0",
            "train.neftune_alpha=0, or data.streaming=false",
        )
    sources = [] if isinstance(data.train, str) else data.train
    if len(sources) > 1 and any(source.weight is None for source in sources):
        yield Problem(
            ("data.streaming", "data.train"),
            f"{len(sources)} sources of a stream, not all with a weight",
            "a weight for each: the share of a source whose length is not known",
        )
    if any(source.repeat > 1 for source in sources):
        yield Problem(
            ("data.streaming", "data.train"),
            "a source of a stream with repeat",
            "no repeat: a source that has ended begins anew, until train.steps are done",
        )


def packing_problems(packing: PackingConfig) -> Iterator[Problem]:
    """What is wrong with capacity and alignment of packs."""
    if packing.capacity % packing.alignment != 0:
        yield Problem(
            ("packing.alignment", "packing.capacity"),
            f"{packing.capacity} is not a multiple of {packing.alignment}",
            "packing.alignment divides packing.capacity",
        )


def lora_problems(lora: LoraConfig) -> Iterator[Problem]:
    """What does not go together in adapters."""
    if lora.dora and lora.dropout > 0:
        yield Problem(
            ("lora.dora", "lora.dropout"),
            f"DoRA with dropout {lora.dropout}",
            "one of the two: the dropout would have to reach the frozen weight too",
            "lora.dropout=0.0, or lora.dora=false",
        )


def optim_problems(train: TrainConfig, optim: OptimConfig) -> Iterator[Problem]:
    """What is wrong with the schedule of the learning rate."""
    if optim.min_lr > optim.lr:
        yield Problem(("optim.min_lr", "optim.lr"), f"{optim.min_lr} > {optim.lr}", "min_lr <= lr")
    end_key = "train.steps" if optim.decay_steps is None else "optim.decay_steps"
    end = train.steps if optim.decay_steps is None else optim.decay_steps
    if end is not None and optim.warmup_steps >= end:
        yield Problem(
            ("optim.warmup_steps", end_key),
            f"{optim.warmup_steps} warm-up steps, but the schedule ends at step {end}",
            f"optim.warmup_steps < {end_key}",
            f"optim.warmup_steps={end // 10}",
        )
    if (optim.decay == "WSD") != (optim.wsd_decay_steps is not None):
        found = f"{optim.wsd_decay_steps or 'null'} with optim.decay {optim.decay}"
        expected = "a number of steps with WSD, and null with any other decay"
        yield Problem(("optim.wsd_decay_steps", "optim.decay"), found, expected)
    elif optim.wsd_decay_steps is not None and end is not None and end > optim.warmup_steps:
        most = end - optim.warmup_steps
        if optim.wsd_decay_steps > most:
            found = f"{optim.wsd_decay_steps} of the {most} steps behind the warm-up"
            yield Problem(("optim.wsd_decay_steps", end_key), found, f"at most {most}")
    grown = optim.end_weight_decay
    if grown is not None and grown < optim.weight_decay:
        found = f"{grown} < {optim.weight_decay}"
        expected = "a weight decay that grows, or null"
        yield Problem(("optim.end_weight_decay", "optim.weight_decay"), found, expected)


def parallel_problems(packing: PackingConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """What does not go together in a layout, whatever the model."""
    if parallel.sequence and parallel.tensor == 1:
        yield Problem(
            ("parallel.sequence", "parallel.tensor"),
            "sequence parallel with parallel.tensor 1",
            "parallel.tensor > 1",
            "parallel.sequence=false, or parallel.tensor=2",
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield Problem(
            ("parallel.virtual_pipeline", "parallel.pipeline"),
            f"{parallel.virtual_pipeline} interleaved stages with parallel.pipeline 1",
            "parallel.pipeline > 1",
            "parallel.virtual_pipeline=1, or parallel.pipeline=2",
        )
    capacity, alignment = packing.capacity, packing.alignment
    if parallel.context > 1 and alignment % (2 * parallel.context) != 0:
        multiple = 2 * parallel.context
        better = round_up(alignment, multiple)
        yield Problem(
            ("packing.alignment", "parallel.context"),
            f"{alignment}, but each sample is cut into 2 x parallel.context = {multiple} chunks of "
            "equal length",
            f"a multiple of {multiple}",
            f"packing.alignment={better}, or parallel.context=1",
        )
    if parallel.sequence and capacity % (parallel.tensor * parallel.context) != 0:
        divisor = (
            "parallel.tensor" if parallel.context == 1 else "parallel.tensor x parallel.context"
        )
        yield Problem(
            ("packing.capacity", *divisor.split(" x ")),
            f"{capacity} is not a multiple of {parallel.tensor * parallel.context}, with "
            "parallel.sequence",
            f"{divisor} divides packing.capacity",
        )
    if parallel.overlap_param_gather and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        names = ("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce")
        yield Problem(
            tuple(f"parallel.{name}" for name in names),
            "overlap_param_gather without the other two",
            "all three true, or overlap_param_gather false",
        )


def restart_problems(parallel: ParallelConfig, checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """What warm restarts have to go back to."""
    if parallel.warm_restarts > 0 and checkpoint.every_steps is None and not checkpoint.keep_best:
        yield Problem(
            ("parallel.warm_restarts", "checkpoint.every_steps"),
            f"{parallel.warm_restarts} restarts, each of which would begin at step 0",
            "checkpoints while training",
            "checkpoint.every_steps=100, or parallel.warm_restarts=0",
        )


def evaluation_problems(
    data: DataConfig,
    evaluation: EvaluationConfig,
    checkpoint: CheckpointConfig,
    export: ExportConfig,
    reported: Mapping[str, bool] = BUILT_IN_METRICS,
) -> Iterator[Problem]:
    """What evaluation, checkpoints and export ask of each other.

    `reported` is what the stage's evaluation reports without being asked.
    """
    if data.eval is not None and data.eval_fraction is not None:
        yield Problem(
            ("data.eval", "data.eval_fraction"),
            "both",
            "evaluation data of its own, or a share of the training data",
            "data.eval_fraction=null",
        )
    wanted = {
        "data.eval_split": data.eval_split,
        "evaluation.every_steps": evaluation.every_steps,
        "evaluation.max_samples": evaluation.max_samples,
        "evaluation.exact_match_samples": evaluation.exact_match_samples,
        "evaluation.metrics": evaluation.metrics,
        "evaluation.patience": evaluation.patience,
        "checkpoint.keep_best": checkpoint.keep_best,
    }
    for key, value in wanted.items():
        if value and data.eval is None and data.eval_fraction is None:
            yield Problem(
                (key, "data.eval"),
                f"{value}, but there is no evaluation data",
                "data.eval",
                "data.eval=<file or hub id>",
            )
    for key in ("evaluation.patience", "checkpoint.keep_best"):
        if wanted[key] and evaluation.every_steps is None:
            yield Problem(
                (key, "evaluation.every_steps"),
                f"{wanted[key]}, but nothing is evaluated before the last step",
                "evaluation.every_steps",
                "evaluation.every_steps=100",
            )
    for name in reported.keys() & evaluation.metrics:
        yield Problem(
            ("evaluation.metrics",),
            f"{name}, which is always there",
            "names of custom metrics",
            f"leave {name} out",
        )
    names = (*reported, *evaluation.metrics)
    if evaluation.best_by not in names:
        yield Problem(
            ("evaluation.best_by", "evaluation.metrics"),
            evaluation.best_by,
            f"one of {', '.join(names)}; others are named in evaluation.metrics first",
        )
    if export.best and not checkpoint.keep_best:
        yield Problem(
            ("export.best", "checkpoint.keep_best"),
            "the best weights are to be exported, but they are not kept",
            "checkpoint.keep_best true, or export.best false",
            "checkpoint.keep_best=true",
        )
    if evaluation.exact_match_samples and not export.enabled:
        yield Problem(
            ("evaluation.exact_match_samples", "export.enabled"),
            "questions for the exported model, but nothing is exported",
            "export.enabled true, or evaluation.exact_match_samples 0",
        )


def metrics_problems(metrics: MetricsConfig, export: ExportConfig) -> Iterator[Problem]:
    """What is wrong with profiles and with answers for the report."""
    steps = metrics.profile_steps
    if steps is not None and steps[0] > steps[1]:
        found = f"first step {steps[0]}, last step {steps[1]}"
        yield Problem(("metrics.profile_steps",), found, "first <= last")
    if metrics.samples and not (metrics.pictures and export.enabled):
        yield Problem(
            ("metrics.samples", "metrics.pictures", "export.enabled"),
            f"{metrics.samples} answers for a report that is not written, or of a model "
            "that is not exported",
            "pictures and the export, or no samples",
            "metrics.samples=0",
        )
