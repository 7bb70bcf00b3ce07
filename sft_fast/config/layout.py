"""Whether a model, a batch and a number of ranks fit together as the configuration says.

The schema asks of `model.shape`; check, plan and the trainer ask of the model's architecture, and
of the number of ranks once they know it.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from sft_fast.config.sections import (
    LoraConfig,
    ModelConfig,
    PackingConfig,
    ParallelConfig,
    ShapeConfig,
    TrainConfig,
)
from sft_fast.constants import round_up
from sft_fast.errors import ConfigError, Problem

ALL_LINEAR = "all-linear"


class ModelSizes(Protocol):
    """What decides how a model can be split: an Architecture or a ShapeConfig has it."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_dim(self) -> int:
        """Channels of a head."""

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the MLP, or of one expert."""

    @property
    def num_experts(self) -> int:
        """Experts per layer; 0 = a dense MLP."""

    @property
    def dense_ffn_size(self) -> int:
        """Width of the MLP of layers without experts, where others have some; 0 = all are alike."""

    @property
    def shared_ffn_size(self) -> int:
        """Width of the expert that every token has; 0 = there is none."""

    @property
    def head_cost(self) -> float:
        """Of the head's product in layers, where every token is trained."""

    @property
    def max_position_embeddings(self) -> int:
        """Longest sample, in tokens."""

    @property
    def projections(self) -> Sequence[str]:
        """Matrices of a layer that adapters can stand beside, such as self_attn.q_proj."""

    def layer_projections(self, layer: int) -> Sequence[str]:
        """Those of `layer` (from 0)."""


def check_layout(
    sizes: ModelSizes,
    model: ModelConfig,
    packing: PackingConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
) -> None:
    """Raises ConfigError with everything that `layout_problems` yields."""
    problems = list(layout_problems(sizes, model, packing, parallel, lora))
    if problems:
        raise ConfigError(problems, "the layout of this model")


def layout_problems(
    sizes: ModelSizes,
    model: ModelConfig,
    packing: PackingConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
) -> Iterator[Problem]:
    """Yields everything that keeps a model from being split and trained as the sections say."""
    yield from _split_problems(sizes, parallel)
    yield from _stage_problems(sizes, parallel)
    yield from _expert_problems(sizes, parallel)
    yield from _transformer_engine_problems(sizes, model, parallel)
    if lora.rank > 0:
        yield from _adapter_problems(sizes, parallel, lora)
    if packing.capacity > sizes.max_position_embeddings:
        keys, name = _place(sizes, "max_position_embeddings")
        yield Problem(
            ("packing.capacity", *keys),
            f"packs of {packing.capacity} tokens, and {name} is {sizes.max_position_embeddings}",
            f"packing.capacity <= {sizes.max_position_embeddings}",
        )


def stage_layers(sizes: ModelSizes, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, in the order of the model; of a layout without problems.

    Balanced, the most expensive stage is as cheap as it can be: the last one has the head as well.
    Where that leaves a choice, earlier stages get fewer layers: the first has the embedding, and
    all of them hold more micro-batches than those behind them.
    """
    wanted, num_stages = parallel.stage_layers, parallel.num_stages
    if isinstance(wanted, list):
        return wanted
    if wanted == "auto" and sizes.num_layers % num_stages == 0:
        return [sizes.num_layers // num_stages] * num_stages
    layers = [1] * num_stages
    others = [0.0] * (num_stages - 1) + [sizes.head_cost]
    for _ in range(sizes.num_layers - num_stages):
        cheapest = min(range(num_stages), key=lambda stage: (layers[stage] + others[stage], -stage))
        layers[cheapest] += 1
    return layers


def check_world_size(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> int:
    """The data-parallel size of a run on `world_size` ranks.

    Raises:
        ConfigError: The ranks or the batch cannot be split as configured.
    """
    problem = rank_problem(parallel, train, world_size)
    if problem is not None:
        raise ConfigError([problem], f"the layout of {world_size} ranks")
    return world_size // parallel.model_parallel_size


def rank_problem(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> Problem | None:
    """The first thing that keeps a run from being spread over `world_size` ranks."""
    model_ranks = parallel.model_parallel_size
    keys: tuple[str, ...] = ("parallel.tensor", "parallel.pipeline")
    sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if parallel.context > 1:
        keys, sizes = (*keys, "parallel.context"), f"{sizes} x context {parallel.context}"
    if world_size < 1 or world_size % model_ranks != 0:
        multiples = f"{model_ranks}, {2 * model_ranks}, {4 * model_ranks}, ..."
        return Problem(
            keys,
            f"{world_size} ranks for {sizes} = {model_ranks} ranks per model",
            f"a number of ranks that {model_ranks} divides",
            f"start with --nproc-per-node (times nodes) of {multiples}, "
            f"or lower {' or '.join(keys)}",
        )
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world_size % expert_ranks != 0:
        return Problem(
            ("parallel.expert", "parallel.expert_tensor"),
            f"{world_size} ranks for experts over {parallel.expert} x "
            f"{parallel.expert_tensor} ranks of each of {parallel.pipeline} stages",
            f"a number of ranks that {expert_ranks} divides",
            "lower parallel.expert or parallel.expert_tensor",
        )
    dp_size = world_size // model_ranks
    batch = train.global_batch_size
    problem = batch_problem(batch, train.micro_batch_size, dp_size)
    if problem is not None:
        return problem
    num_micro_batches = batch // (dp_size * train.micro_batch_size)
    if parallel.virtual_pipeline > 1 and num_micro_batches % parallel.pipeline != 0:
        enough = dp_size * train.micro_batch_size * parallel.pipeline
        return Problem(
            ("parallel.virtual_pipeline", "train.global_batch_size"),
            f"{num_micro_batches} micro-batches per step and data-parallel rank on "
            f"{parallel.pipeline} interleaved pipeline ranks",
            f"a multiple of {parallel.pipeline}",
            f"train.global_batch_size={round_up(batch, enough)}, or parallel.virtual_pipeline=1",
        )
    return None


def batch_problem(global_batch_size: int, micro_batch_size: int, dp_size: int) -> Problem | None:
    """What keeps a step's packs from being split evenly over data-parallel ranks."""
    packs = dp_size * micro_batch_size
    if global_batch_size % packs == 0:
        return None
    return Problem(
        ("train.global_batch_size", "train.micro_batch_size"),
        f"global_batch_size {global_batch_size} on {dp_size} data-parallel ranks with "
        f"micro_batch_size {micro_batch_size}",
        f"a multiple of {dp_size} x {micro_batch_size} = {packs}",
        f"train.global_batch_size={round_up(global_batch_size, packs)}, or another "
        "--nproc-per-node",
    )


def adapted_projections(sizes: ModelSizes, targets: str | Sequence[str]) -> list[str]:
    """Full names, model.layers.0.self_attn.q_proj and so on, that `lora.targets` selects; those of
    experts have * for the expert's number."""
    names = _projection_names(sizes)
    if targets == ALL_LINEAR:
        return names
    return [name for name in names if any(_matches(name, pattern) for pattern in targets)]


def mistaken_for_experts(sizes: ModelSizes, targets: str | Sequence[str]) -> list[str]:
    """Adapted projections of shared experts and of layers without experts that PEFT 0.21 does not
    load with transformers 5: it takes the last part of their names for a matrix of experts."""
    last = {name.rpartition(".")[2] for name in _projection_names(sizes) if "*" in name}
    names = adapted_projections(sizes, targets)
    return [name for name in names if "*" not in name and name.rpartition(".")[2] in last]


def _projection_names(sizes: ModelSizes) -> list[str]:
    return [
        f"model.layers.{layer}.{name}"
        for layer in range(sizes.num_layers)
        for name in sizes.layer_projections(layer)
    ]


def _matches(name: str, pattern: str) -> bool:
    """A pattern without a dot is for the last part of the name, any other for all of it."""
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def _place(sizes: ModelSizes, field: str) -> tuple[tuple[str, ...], str]:
    """(keys of the configuration that hold a size, its name in a message)."""
    if isinstance(sizes, ShapeConfig):
        return (f"model.shape.{field}",), f"model.shape.{field}"
    return (), f"{field} of the model"


def _split_problems(sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[Problem]:
    """Sizes that the ranks which share them do not divide."""
    splits = [
        (("parallel.tensor",), parallel.tensor, "num_attention_heads"),
        (("parallel.tensor",), parallel.tensor, "num_key_value_heads"),
    ]
    if sizes.num_experts > 0:
        splits.append((("parallel.expert",), parallel.expert, "num_experts"))
        splits.append((("parallel.expert_tensor",), parallel.expert_tensor, "ffn_hidden_size"))
        for width in ("dense_ffn_size", "shared_ffn_size"):
            splits.append((("parallel.tensor",), parallel.tensor, width))
    else:
        splits.append((("parallel.tensor",), parallel.tensor, "ffn_hidden_size"))
    for keys, size, field in splits:
        count = getattr(sizes, field)
        if count % size == 0:
            continue
        own_keys, name = _place(sizes, field)
        divisors = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
        yield Problem(
            (*own_keys, *keys),
            f"{' x '.join(keys)} is {size}, and {name} is {count}",
            f"a divisor of {count}",
            f"one of {divisors}",
        )


def _stage_problems(sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[Problem]:
    """Pipeline stages that the layers do not suffice for, or a list of other numbers."""
    wanted, num_stages, num_layers = parallel.stage_layers, parallel.num_stages, sizes.num_layers
    own_keys, name = _place(sizes, "num_layers")
    keys: tuple[str, ...] = ("parallel.pipeline",)
    if parallel.virtual_pipeline > 1:
        keys += ("parallel.virtual_pipeline",)
    if isinstance(wanted, list):
        if len(wanted) != num_stages or sum(wanted) != num_layers:
            yield Problem(
                (*own_keys, "parallel.stage_layers", *keys),
                f"{len(wanted)} stages with {sum(wanted)} layers, for {' x '.join(keys)} = "
                f"{num_stages} stages, and {name} is {num_layers}",
                f"a number of layers for each of {num_stages} stages, {num_layers} in all",
                "parallel.stage_layers=auto",
            )
    elif num_layers < num_stages:
        yield Problem(
            (*own_keys, *keys),
            f"{' x '.join(keys)} is {num_stages}, and {name} is {num_layers}",
            "a layer for each stage",
            f"at most {num_layers} stages",
        )


def _expert_problems(sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[Problem]:
    """Sizes of expert parallelism without experts, and experts without sequence parallel."""
    if sizes.num_experts == 0 and (parallel.expert > 1 or parallel.expert_tensor > 1):
        yield Problem(
            ("parallel.expert", "parallel.expert_tensor"),
            f"{parallel.expert} and {parallel.expert_tensor} for a model without experts",
            "1 and 1",
        )
    if sizes.num_experts > 0 and parallel.tensor > 1 and not parallel.sequence:
        yield Problem(
            ("parallel.sequence", "parallel.tensor"),
            "tensor parallel without sequence parallel, for a model with experts",
            "parallel.sequence true, because each rank routes its own tokens",
            "parallel.sequence=true",
        )


def _transformer_engine_problems(
    sizes: ModelSizes, model: ModelConfig, parallel: ParallelConfig
) -> Iterator[Problem]:
    """Yields everything that Transformer Engine's linear layers cannot do for this model."""
    if not model.uses_transformer_engine:
        return
    if sizes.num_experts > 0:
        yield Problem(
            ("model.transformer_impl", "model.fp8"),
            f"{model.transformer_impl} and {model.fp8} for a model with experts",
            "local and none: Transformer Engine keeps experts in matrices of another form",
            "model.transformer_impl=local model.fp8=none",
        )
    widths = {
        "hidden_size": sizes.hidden_size,
        "num_attention_heads x head_dim": sizes.num_attention_heads * sizes.head_dim,
        "num_key_value_heads x head_dim": sizes.num_key_value_heads * sizes.head_dim,
        "ffn_hidden_size": sizes.ffn_hidden_size,
    }
    for name, width in widths.items():
        count = width if name == "hidden_size" else width // parallel.tensor
        if count % model.fp8_multiple != 0:
            yield Problem(
                ("model.fp8_recipe", "parallel.tensor"),
                f"{model.fp8_recipe} with {count} columns on a rank ({name} of the model)",
                f"a multiple of {model.fp8_multiple}",
                "a smaller parallel.tensor, model.fp8_recipe=tensorwise, or model.fp8=none",
            )


def _adapter_problems(
    sizes: ModelSizes, parallel: ParallelConfig, lora: LoraConfig
) -> Iterator[Problem]:
    """Targets without a projection, and pipeline stages without a target."""
    names = _projection_names(sizes)
    patterns = [] if lora.targets == ALL_LINEAR else lora.targets
    missing = [
        pattern for pattern in patterns if not any(_matches(name, pattern) for name in names)
    ]
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if missing:
        yield Problem(
            ("lora.targets",),
            f"{', '.join(missing)}: selects no projection",
            f"among {', '.join(known)}, or a pattern for names such as {names[0]}",
            f"lora.targets={ALL_LINEAR}, or lora.targets=[{','.join(known)}]",
        )
        return
    selected = adapted_projections(sizes, lora.targets)
    if lora.dora and any("*" in name for name in selected):
        of_experts = {name.rpartition(".")[2] for name in names if "*" in name}
        others = [name for name in known if name not in of_experts]
        yield Problem(
            ("lora.dora", "lora.targets"),
            "DoRA beside the matrices of experts",
            "LoRA there, or DoRA beside the others alone: PEFT defines none for experts",
            f"lora.dora=false, or lora.targets=[{','.join(others)}]",
        )
    adapted = {int(name.split(".")[2]) for name in selected}
    counts = [] if list(_stage_problems(sizes, parallel)) else stage_layers(sizes, parallel)
    for stage, count in enumerate(counts):
        layers = range(sum(counts[:stage]), sum(counts[:stage]) + count)
        if adapted.isdisjoint(layers):
            yield Problem(
                ("lora.targets", "parallel.pipeline"),
                f"nothing selected in layers {layers[0]} to {layers[-1]}, which pipeline stage "
                f"{stage} holds, so it would have nothing to train",
                "adapters on every stage",
                "more layers in lora.targets, or a smaller parallel.pipeline",
            )
