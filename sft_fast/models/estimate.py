"""Memory of a rank and time of a run, from the configuration alone.

Bytes are counted for what this trainer keeps; every formula below says what it counts. Symbols:
t, p, d = tensor, pipeline and data parallel sizes; b = bytes of model.dtype; h, q, k, f = hidden
size, width of the queries (heads * head_dim), of the keys, of the MLP; s = t with sequence
parallelism, else 1. The tokens of a micro-batch on a rank are packing.capacity *
train.micro_batch_size / context-parallel size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from sft_fast.config.layout import check_layout, check_world_size, stage_layers
from sft_fast.config.schema import Config
from sft_fast.config.sections import (
    LoraConfig,
    LossConfig,
    ModelConfig,
    PackingConfig,
    ParallelConfig,
    TrainConfig,
)
from sft_fast.constants import DTYPE_BYTES
from sft_fast.kernels.memory_plan import MemoryPlan
from sft_fast.models.architecture import Architecture, padded_vocab_size
from sft_fast.models.flops import (
    LayerParameters,
    Workload,
    active_matrix_parameters,
    adapter_parameters,
    all_layers,
    training_flops,
)

RUNTIME_BYTES = 3 * 10**9
"""Context, collectives' buffers, kernels and allocator waste of a GPU process; an assumption."""
DEFAULT_MFU = 0.4
"""Share of the data sheet's bf16 rate that is assumed to be reached; an assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most.

    Attributes:
        weights: parameters in model.dtype.
        gradients: fp32, of what is trained.
        optimizer: fp32 master weights (not with fp32 parameters) and two moments.
        activations: what the layers keep for the backward pass, at the fullest moment.
        logits: rows of logits in memory at a time, what sums the head's gradient until the backward
            pass, and the rows' hidden states.
        workspace: what one layer's backward pass needs: gradients of its activations, and with
            recomputation the activations too.
        runtime: what is neither tensor nor cache, on a GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    runtime: int

    @property
    def total(self) -> int:
        """At the fullest moment; the logits are gone before the first layer runs backward."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.passing + self.runtime

    @property
    def passing(self) -> int:
        """What comes and goes with a micro-batch."""
        return self.activations + max(self.logits, self.workspace)


def stage_parameters(
    architecture: Architecture, parallel: ParallelConfig, lora: LoraConfig
) -> tuple[int, int]:
    """Parameters of the fullest rank: (frozen or trained base weights, trained ones).

    Matrices are split over t, experts over expert and expert_tensor, layers over p; the first stage
    has the embedding and the last one the head and the final norm; with tied weights each has the
    matrix. The vocabulary is padded to a multiple of 128 t.
    """
    a, tensor, pipeline = architecture, parallel.tensor, parallel.pipeline
    vocab = shard_columns(a, parallel)
    layers = sum(layer.matrices // tensor + layer.vectors for layer in fullest_layers(a, parallel))
    embedding = vocab * a.hidden_size
    if pipeline == 1:
        ends = embedding * a.num_vocab_matrices + a.num_head_parameters + a.hidden_size
    else:
        ends = embedding + a.hidden_size
    base = layers + ends + stage_expert_parameters(a, parallel)
    if lora.rank == 0:
        return base, base
    adapters = adapter_parameters(a, lora.rank, lora.targets)
    return base, adapters // (pipeline * tensor) + stage_expert_adapters(a, parallel, lora)


def fullest_layers(architecture: Architecture, parallel: ParallelConfig) -> list[LayerParameters]:
    """The layers of the pipeline rank with most parameters."""
    layers = all_layers(architecture)
    ranks: list[list[LayerParameters]] = [[] for _ in range(parallel.pipeline)]
    for stage, count in enumerate(stage_layers(architecture, parallel)):
        ranks[stage % parallel.pipeline] += islice(layers, count)
    weight = architecture.num_experts
    return max(ranks, key=lambda own: sum(item.matrices + weight * item.expert for item in own))


def shard_columns(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Columns of the padded vocabulary on a tensor-parallel rank."""
    tensor = parallel.tensor
    return padded_vocab_size(architecture.vocab_size, tensor) // tensor


def logits_bytes(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
    loss: LossConfig,
    active_tokens: int,
) -> int:
    """What the loss of that many trained tokens holds, by the rule that the loss itself follows."""
    size = DTYPE_BYTES[model.dtype]
    columns, is_trained = shard_columns(architecture, parallel), lora.rank == 0
    sums = 4 * columns * architecture.hidden_size if is_trained else 0
    plan = MemoryPlan.choose(
        loss.policy,
        round(loss.memory_budget_gib * 2**30),
        num_tokens=active_tokens,
        bytes_per_token=columns * size,
        weight_grad_bytes=sums,
        adds_to_main_grad=is_trained,
        summed=loss.custom is None,
    )
    held = (plan.chunk_tokens * columns + active_tokens * architecture.hidden_size) * size
    return held + (sums if plan.policy == "gradient_in_forward" else 0)


def stage_expert_parameters(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Those of them that belong to experts."""
    weights = sum(layer.expert for layer in fullest_layers(architecture, parallel))
    return architecture.num_experts * weights // (parallel.expert * parallel.expert_tensor)


def stage_expert_adapters(
    architecture: Architecture, parallel: ParallelConfig, lora: LoraConfig
) -> int:
    """Parameters of LoRA adapters of experts on a rank."""
    ranks = parallel.pipeline * parallel.expert * parallel.expert_tensor
    return adapter_parameters(architecture, lora.rank, lora.targets, of_experts=True) // ranks


def layer_bytes_per_token(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    is_gpu: bool = True,
    is_dense: bool = False,
) -> float:
    """What a layer keeps of a token: b * (4 h / s + (2 q + 2 k + 3 f) / t).

    h: input and output of both norms; without the outputs (2 h) where they are recomputed. q:
    rotated queries, attention output. k: rotated keys, values. f: gate and up (2 f) and their
    product, which may be recomputed too. A QK norm keeps its input: (q + k) / t. Latent attention,
    whose values are of another width, keeps its narrow vectors too, before and after their norms.
    Attention on a CPU or over context-parallel ranks has a copy of its output: q / t. Without fused
    kernels (a CPU, or model.kernels torch) also SiLU's output, f / t, and the norms' unscaled
    outputs, 2 h / s; with 16-bit parameters these are there in fp32 as well, 6 h / s. Experts have
    `expert_widths` in place of 3 f, and that of a shared expert beside it; is_dense: a layer that
    has none of them.
    """
    a, tensor = architecture, parallel.tensor
    sequence = tensor if parallel.sequence else 1
    query, key = a.query_size, a.key_size
    value, attended = a.num_key_value_heads * a.value_dim, a.value_size
    norms, silu = 0, 0
    if not has_fused_kernels(model, is_gpu):
        norms, silu = (2 if model.dtype == "fp32" else 6), 1
    norms -= 2 * is_recomputed(model, "norm")
    silu -= is_recomputed(model, "activation")
    heads = query + key + value + attended
    heads += query + key if a.has_qk_norm or a.has_wide_qk_norm else 0
    heads += 0 if is_gpu and parallel.context == 1 else attended
    hidden = (4 + norms) * a.hidden_size / sequence
    hidden += 2 * (a.kv_rank + a.query_rank) / sequence
    mlp = float((3 + silu) * mlp_width(a, is_dense))
    if a.num_experts and not is_dense:
        mlp += expert_widths(a, parallel)[0]
    return DTYPE_BYTES[model.dtype] * (hidden + (heads + mlp) / tensor)


def mean_layer_bytes(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    layers: int,
    is_gpu: bool,
    is_dense: bool,
) -> float:
    """`layer_bytes_per_token`, of layers of which the first `recompute_layers` recompute parts."""
    plain = model.model_copy(update={"recompute": "none"})
    with_parts, without = (
        layer_bytes_per_token(architecture, each, parallel, is_gpu, is_dense)
        for each in (model, plain)
    )
    again = min((model.recompute_layers or layers) / layers, 1.0)
    return again * with_parts + (1 - again) * without


def mlp_width(architecture: Architecture, is_dense: bool) -> int:
    """Of the MLP of a layer, or of its shared expert."""
    if not architecture.num_experts:
        return architecture.ffn_hidden_size
    return architecture.dense_ffn_size if is_dense else architecture.shared_ffn_size


def has_fused_kernels(model: ModelConfig, is_gpu: bool) -> bool:
    """Whether norms and gates are one kernel each, which keep their inputs only."""
    return is_gpu and model.kernels != "torch"


def is_recomputed(model: ModelConfig, part: str) -> bool:
    """Whether the backward pass computes that part of every layer again."""
    return model.recompute == "selective" and part in model.recompute_modules


def expert_widths(
    architecture: Architecture, parallel: ParallelConfig, is_fused: bool = True
) -> tuple[int, int]:
    """Numbers a token has in a layer of experts, evenly spread: kept, and in its backward pass.

    Kept with n experts a token are gate and up, 2 n f, and what comes from other ranks: n copies of
    h from expert-parallel ones, each from all ranks that share an expert. The backward pass makes
    n copies of the gradient and the gradients of gate, up and their product, and the product again;
    without fused kernels also SiLU's output and the product without the router's factor.
    """
    a, sharing = architecture, parallel.expert_tensor
    copies, arriving = a.experts_per_token * a.hidden_size, 0
    if parallel.expert > 1:
        arriving = sharing * copies
    elif sharing > 1:
        arriving = sharing * a.hidden_size
    width = a.experts_per_token * a.ffn_hidden_size
    return 2 * width + arriving, (4 if is_fused else 6) * width + sharing * copies


def in_flight(parallel: ParallelConfig, num_microbatches: int) -> float:
    """Micro-batches whose activations the first stage holds at once, in whole stages.

    1F1B: p; interleaved over v parts: p (1 + (p - 1) / (p v)). Source: Narayanan et al. 2021,
    arXiv 2104.04473, and Korthikanti et al. 2022, arXiv 2205.05198.
    """
    pipeline, parts = parallel.pipeline, parallel.virtual_pipeline
    held = float(min(pipeline, num_microbatches))
    return held if parts == 1 else held * (1 + (pipeline - 1) / (pipeline * parts))


def estimate_memory(
    architecture: Architecture,
    config: Config,
    num_ranks: int,
    supervised_share: float = 1.0,
    is_gpu: bool = True,
) -> Memory:
    """Memory of the fullest rank.

    Args:
        architecture: the model.
        config: of a layout that `check_world_size` accepts for `num_ranks`.
        num_ranks: over all machines.
        supervised_share: of the tokens of a row, 0 to 1; decides the rows of logits.
        is_gpu: False: a CPU, which has no fused norms and no runtime to count.
    """
    a, parallel, train = architecture, config.parallel, config.train
    data_parallel = max(num_ranks // parallel.model_parallel_size, 1)
    size = DTYPE_BYTES[config.model.dtype]
    base, trained = stage_parameters(a, config.parallel, config.lora)
    state = (8 if config.model.dtype == "fp32" else 12) * trained
    if parallel.distributed_optimizer:
        # Context-parallel ranks hold the same weights, so they share the state as well. Experts
        # are held by fewer ranks than the rest is, or by more.
        experts = (
            stage_expert_parameters(a, parallel)
            if config.lora.rank == 0
            else stage_expert_adapters(a, parallel, config.lora)
        )
        expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
        part = experts / trained / max(num_ranks // expert_ranks, 1)
        part += (1 - experts / trained) / (data_parallel * parallel.context)
        state = round(state * part)
    tokens = config.packing.capacity * train.micro_batch_size / parallel.context
    micro_batches = max(train.global_batch_size // (train.micro_batch_size * data_parallel), 1)
    own = fullest_layers(a, parallel)
    layers, num_dense = len(own), sum(not layer.expert for layer in own)
    share = num_dense / layers if a.num_experts else 0.0

    def mean(of_layer: Callable[[bool], float]) -> float:
        """Over the layers with experts and those without."""
        return share * of_layer(True) + (1 - share) * of_layer(False)

    one_layer = tokens * mean(
        lambda is_dense: mean_layer_bytes(a, config.model, parallel, layers, is_gpu, is_dense)
    )
    sequence = parallel.tensor if parallel.sequence else 1
    # The gradients of two residual streams and of the product of gate and up; theirs take their
    # place where the kernels are fused, and as much again as the product elsewhere.
    is_fused = has_fused_kernels(config.model, is_gpu)
    inside = (1 if is_fused else 2) * max(mlp_width(a, False), mlp_width(a, share > 0))
    if a.num_experts:
        inside = max(inside, expert_widths(a, parallel, is_fused)[1])
    workspace = size * tokens * (inside / parallel.tensor + 2 * a.hidden_size)
    layer_input = size * a.hidden_size / sequence * tokens
    again = recomputed_layers(config.model, layers)
    if again:
        workspace += one_layer
    kept = again * layer_input + (layers - again) * (
        one_layer
        - mean(lambda is_dense: recomputed_part(a, config.model, config.parallel, tokens, is_dense))
    )
    kept *= 1 - min(config.model.offload_layers, layers) / layers
    activations = kept * in_flight(config.parallel, micro_batches)
    return Memory(
        weights=size * base,
        gradients=4 * trained,
        optimizer=state,
        activations=round(activations),
        logits=logits_bytes(
            a,
            config.model,
            config.parallel,
            config.lora,
            config.loss,
            round(tokens * supervised_share),
        ),
        workspace=round(workspace),
        runtime=RUNTIME_BYTES if is_gpu else 0,
    )


def recomputed_layers(model: ModelConfig, layers: int) -> int:
    """Layers of a stage that keep their input only."""
    if model.recompute == "full":
        return layers
    if model.recompute == "block":
        return min(model.recompute_layers or 0, layers)
    return 0


def recomputed_part(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    tokens: float,
    is_dense: bool = False,
) -> float:
    """Bytes of a layer that recompute selective does not keep: 3 f / t with mlp in its parts, what
    experts keep with moe; is_dense as in `layer_bytes_per_token`."""
    width, name = mlp_width(architecture, is_dense), "mlp"
    width *= 3 - is_recomputed(model, "activation")
    if architecture.num_experts and not is_dense:
        width, name = width + expert_widths(architecture, parallel)[0], "moe"
    if not is_recomputed(model, name):
        return 0.0
    return DTYPE_BYTES[model.dtype] * tokens * width / parallel.tensor


def computed_again(architecture: Architecture) -> float:
    """Share of a token's products that are those of MLPs and experts."""
    a = architecture
    weights = sum(layer.mlp + a.experts_per_token * layer.expert for layer in all_layers(a))
    return weights / active_matrix_parameters(a)


def bubble(train: TrainConfig, parallel: ParallelConfig, num_ranks: int) -> float:
    """Share of useful time that pipeline stages wait: (p - 1) / (m v), Narayanan et al. 2021."""
    data_parallel = max(num_ranks // parallel.model_parallel_size, 1)
    micro_batches = max(train.global_batch_size // (train.micro_batch_size * data_parallel), 1)
    return (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline)


def estimate_seconds(
    architecture: Architecture,
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
    workload: Workload,
    num_ranks: int,
    tflops: float,
    mfu: float = DEFAULT_MFU,
) -> float:
    """Seconds of training on `work`.

    FLOPs / (ranks * rate * mfu), times 1 + r / 3 where the share r of the layers is run forward
    again, times 1 + bubble. Evaluation, checkpoints and start-up are not counted.
    """
    flops = training_flops(architecture, workload, lora=lora.rank > 0)
    seconds = flops / (num_ranks * tflops * 1e12 * mfu)
    layers = len(fullest_layers(architecture, parallel))
    again = recomputed_layers(model, layers) / layers
    if recomputed_part(architecture, model, parallel, 1) > 0:
        again += computed_again(architecture)
    return seconds * (1 + again / 3) * (1 + bubble(train, parallel, num_ranks))


def override_value(value: object) -> str:
    """A value as it is written on the command line."""
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value).lower()


@dataclass(frozen=True)
class Suggestion:
    """A change of the configuration, and what it would do.

    Attributes:
        overrides: keys to change, as for the command line.
        memory_bytes: total of the fullest rank then.
        seconds: of the run then.
    """

    overrides: str
    memory_bytes: int
    seconds: float


def changes(
    architecture: Architecture,
    model: ModelConfig,
    packing: PackingConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    lora: LoraConfig,
    num_ranks: int,
) -> Iterator[dict[str, dict[str, object]]]:
    """Yields sections to update; not all of them are allowed for every model."""
    if model.recompute == "none":
        yield {"model": {"recompute": "full"}}
        for part in ("mlp", "moe"):
            yield {"model": {"recompute": "selective", "recompute_modules": [part]}}
    else:
        yield {"model": {"recompute": "none"}}
    if parallel.context == 1 and packing.capacity % 4 == 0:
        yield {"parallel": {"context": 2}, "packing": {"alignment": 4}}
    if not parallel.distributed_optimizer and num_ranks > 1:
        yield {"parallel": {"distributed_optimizer": True}}
    for tensor in (2, 4, 8):
        if tensor != parallel.tensor and num_ranks % tensor == 0:
            yield {"parallel": {"tensor": tensor, "sequence": True}}
    if parallel.tensor > 1:
        yield {"parallel": {"tensor": 1, "sequence": False}}
        if not parallel.sequence:
            yield {"parallel": {"sequence": True}}
    for pipeline in (1, 2, 4):
        if pipeline != parallel.pipeline:
            yield {"parallel": {"pipeline": pipeline, "virtual_pipeline": 1}}
    if train.micro_batch_size > 1:
        yield {"train": {"micro_batch_size": train.micro_batch_size // 2}}
    if lora.rank == 0:
        yield {"lora": {"rank": 16}}


def best_suggestions(
    architecture: Architecture,
    config: Config,
    workload: Workload,
    num_ranks: int,
    memory_bytes: float,
    tflops: float,
    mfu: float = DEFAULT_MFU,
    supervised_share: float = 1.0,
    count: int = 3,
) -> list[Suggestion]:
    """The changes that would help most.

    A run that does not fit: what makes it fit at the least time, else what saves most memory. One
    that fits: what saves time and still fits. Training adapters instead of all weights is another
    task, so it is offered only where the run does not fit.
    """

    def cost(changed: Config) -> tuple[int, float]:
        memory = estimate_memory(architecture, changed, num_ranks, supervised_share)
        seconds = estimate_seconds(
            architecture,
            changed.model,
            changed.train,
            changed.parallel,
            changed.lora,
            workload,
            num_ranks,
            tflops,
            mfu,
        )
        return memory.total, seconds

    total, seconds = cost(config)
    fits = total <= memory_bytes
    suggestions = []
    for sections in changes(
        architecture,
        config.model,
        config.packing,
        config.train,
        config.parallel,
        config.lora,
        num_ranks,
    ):
        values = config.model_dump()
        for section, update in sections.items():
            values[section] |= update
        try:
            changed = Config.model_validate(values)
            check_world_size(changed.parallel, changed.train, num_ranks)
            check_layout(
                architecture, changed.model, changed.packing, changed.parallel, changed.lora
            )
        except ValueError:
            continue
        overrides = " ".join(
            f"{section}.{key}={override_value(value)}"
            for section, update in sections.items()
            for key, value in update.items()
        )
        suggestion = Suggestion(overrides, *cost(changed))
        if fits and "lora" not in sections and suggestion.memory_bytes <= memory_bytes:
            suggestions += [suggestion] if suggestion.seconds < seconds else []
        elif not fits and suggestion.memory_bytes < total:
            suggestions.append(suggestion)
    suggestions.sort(
        key=lambda suggestion: (suggestion.memory_bytes > memory_bytes, suggestion.seconds)
    )
    if not fits and all(suggestion.memory_bytes > memory_bytes for suggestion in suggestions):
        suggestions.sort(key=lambda suggestion: suggestion.memory_bytes)
    return suggestions[:count]
