"""The sections of the configuration: every key, its default, its unit and its limits.

Paths are relative to the working directory.
"""

import os
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sft_fast.data.choices import (
    ChangingHistory,
    NearDuplicates,
    OnBadRecord,
    OverLength,
    TrainOn,
)
from sft_fast.kernels.loss_options import LossBackend, LossOptions, Policy
from sft_fast.metrics.choices import TrackerName
from sft_fast.models.choices import FP8_MULTIPLES, AttentionBackend, Dtype, Fp8Recipe
from sft_fast.packing.choices import (
    MAX_CAPACITY,
    MAX_POOL_SIZE,
    MAX_SAMPLES_PER_BIN,
    STRATEGY_HELP,
    Strategy,
)

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
ChangeableField = Literal[
    "data", "tokenizer", "template", "seed", "packing", "batch", "model", "adapter"
]


LLAMA_PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""Matrices of a layer of a Llama, as Hugging Face names them."""


StageLayers = Literal["auto", "balanced"] | Annotated[list[Positive], Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no coercion ("1e-5" is no number), no changes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ShapeConfig(Section):
    """Architecture of a randomly initialised Llama, or Mixtral where it has experts; the vocabulary
    comes from the tokenizer."""

    hidden_size: Positive
    """Width of the residual stream."""
    num_layers: Positive
    """Transformer layers."""
    num_attention_heads: Positive
    """Query heads."""
    num_key_value_heads: Positive
    """Key and value heads; num_attention_heads for plain multi-head attention."""
    ffn_hidden_size: Positive
    """Width of the SwiGLU MLP, or of an expert."""
    num_experts: NotNegative = 0
    """Experts of each layer; 0 = an MLP in their place."""
    experts_per_token: Positive = 2
    """Experts that a token goes to."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of RMSNorm."""
    tie_word_embeddings: bool = True
    """Share the weight of the embedding and the LM head."""
    max_position_embeddings: Positive = 4096
    """Longest sample the model is meant for, in tokens."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the random weights; a narrow model learns faster with 0.05 to 0.08."""

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def dense_ffn_size(self) -> int:
        """Of layers without experts, where others have some."""
        return 0

    @property
    def shared_ffn_size(self) -> int:
        """Of shared experts, which a Llama has not."""
        return 0

    @property
    def head_cost(self) -> float:
        """Unknown: the tokenizer says how large the vocabulary is."""
        return 0.0

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of a layer that adapters can stand beside; experts get none."""
        return LLAMA_PROJECTIONS[:4] if self.num_experts else LLAMA_PROJECTIONS

    def layer_projections(self, layer: int) -> tuple[str, ...]:
        """Those of `layer`: all are alike."""
        return self.projections


OWN_PARTS = ("norm", "activation")
"""Parts of recompute_modules that our own layer computes again, not megatron-core."""


class ModelConfig(Section):
    """The weights to start from."""

    path: PathText | None = None
    """Directory or hub id with config.json and *.safetensors; null = random weights of `shape`."""
    random_init: bool = False
    """Take config.json of `path`, but random weights."""
    revision: Text | None = None
    """Branch, tag or commit of the hub repository `path`."""
    dtype: Dtype = "bf16"
    """Type of parameters and activations; the optimizer keeps fp32 copies."""
    shape: ShapeConfig | None = None
    """Architecture when `path` is null."""
    new_embeddings: Literal["error", "mean"] = "error"
    """Embeddings of tokens that are new to the model's vocabulary: mean = the mean of its own."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Before the first step compute one sequence: weights that know nothing of it stop the run, so
    do other logits than transformers'; auto = loads it with transformers up to 4e9 parameters."""
    attention: AttentionBackend = "auto"
    """Kernel; auto = the first that this device has and that passes a numeric test at start."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Norms, rotary positions and gates of the layers; auto = triton on a GPU where it passes a
    numeric test at start."""
    transformer_impl: Literal["auto", "te", "local"] = "auto"
    """Linear layers: of Transformer Engine or of megatron-core; auto = te where fp8 needs it."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """8-bit products in the layers, by Transformer Engine: hybrid has gradients in e5m2."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """What shares a scale: a tensor; a block of 128 (Hopper and newer); 32 values (Blackwell,
    MI355X). All of them scale by the tensor at hand, so a resumed run needs no history."""
    recompute: Literal["none", "selective", "block", "full"] = "none"
    """What the backward pass computes again to save memory: nothing; the parts of each layer in
    recompute_modules; the first recompute_layers layers of each pipeline stage; all layers."""
    recompute_modules: Annotated[
        list[Literal["core_attn", "norm", "activation", "mlp", "moe"]], Field(min_length=1)
    ] = ["core_attn", "norm", "activation"]
    """Parts for recompute selective. norm and activation are one kernel each and cost about 1 % of
    the time; attention kernels other than sdpa do core_attn anyway."""
    recompute_layers: Positive | None = None
    """Layers of each (interleaved) pipeline stage for recompute block, and for selective with no
    other parts than norm and activation; null = all."""
    offload_layers: NotNegative = 0
    """Layers whose activations wait in host memory; needs a GPU and Transformer Engine."""

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether the linear layers are Transformer Engine's."""
        return self.transformer_impl == "te" or self.fp8 != "none"

    @property
    def fp8_multiple(self) -> int:
        """What divides the rows and columns of a matrix in an 8-bit product; 1 without them."""
        return 1 if self.fp8 == "none" else FP8_MULTIPLES[self.fp8_recipe]


class TokenizerConfig(Section):
    """The tokenizer and its chat template."""

    path: PathText | None = None
    """Directory or hub id; null = model.path; "demo" = the embedded one."""
    chat_template: PathText | None = None
    """Jinja file, or alpaca, chatml, gemma, llama2, llama3, zephyr, that replaces the tokenizer's
    own chat template."""

    add_tokens: list[Text] = []
    """Special tokens to add to the tokenizer, see also model.new_embeddings."""


class DataSource(Section):
    """One of several sources; what is null here is as in the section `data`."""

    path: PathText
    """As data.train."""
    split: Text | None = None
    """Split or split expression, e.g. train[:1%]; null = the split of the section."""
    format: Text | None = None
    """As data.format."""
    fields: dict[str, str | None] | None = None
    """As data.fields."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples, relative to the other weights; null for all = every sample is used."""
    repeat: Positive = 1
    """How many times each sample is used in one epoch; with a weight: at most."""


def _sources(value: object) -> object:
    """Checks a path, or a list of paths and sources."""
    if isinstance(value, list):
        if not value or not all(isinstance(item, str | dict | DataSource) for item in value):
            raise PydanticCustomError("sources", "a path, or a list of paths and sources")
        items = [{"path": item} if isinstance(item, str) else item for item in value]
        return _SOURCE_LIST.validate_python(items)
    return _PATH.validate_python(value)


_PATH: TypeAdapter[str] = TypeAdapter(PathText)


_SOURCE_LIST: TypeAdapter[list[DataSource]] = TypeAdapter(list[DataSource])


Sources = Annotated[
    str | list[DataSource],
    PlainValidator(_sources, json_schema_input_type=str | list[str | DataSource]),
]


class DataConfig(Section):
    """Where the samples come from and what of them is trained."""

    train: Sources
    """Training data: a file (json, jsonl, csv, tsv, parquet, arrow; .gz, .zst), a directory, a
    glob, a hub id `owner/name[:config][@revision]`, "demo"; or a list of sources."""
    eval: Sources | None = None
    """Evaluation data, same forms; null = no evaluation."""
    train_split: Text = "train"
    """Split or split expression of `train`, e.g. train[:1%]."""
    eval_split: Text | None = None
    """Split or split expression of `eval`; null = the source decides."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the records of `train` that is held out for evaluation; equal ones stay together."""
    eval_overlap: Literal["error", "allow"] = "error"
    """What happens when evaluation samples are training samples too."""
    near_duplicates: NearDuplicates = "keep"
    """drop = leave out training samples that are nearly an earlier one, and evaluation samples that
    are nearly a training sample; needs datasketch (the extra `dedup`)."""
    streaming: bool = False
    """Read `train` while it trains and store nothing of it, so it may be larger than the disk or
    have no end; needs train.steps. Slices are record numbers only."""
    shuffle_buffer: Positive = 10_000
    """Samples of a stream that the next one is drawn from; every checkpoint has them. 1 = in the
    order of the source."""
    format: Text = "auto"
    """Format of a record (alpaca, chatml, openai, messages, sharegpt, ...) or a file with your own,
    my_format.py or my_formats.py:name; auto = by columns."""
    fields: dict[str, str | None] = {}
    """Our field -> the source's column, e.g. {instruction: question, response: answer}; a column ->
    null: it is left unread on purpose."""
    row_functions: list[Text] = []
    """Registered functions, or files with them, that change what is read and not what is learnt."""
    train_on: TrainOn = "all_turns"
    """Assistant turns with a loss."""
    train_tool_calls: bool = True
    """Whether assistant turns with tool calls have a loss."""
    train_reasoning: bool = True
    """Whether the reasoning in front of an answer has a loss."""
    changing_history: ChangingHistory = "error"
    """A template that rewrites earlier answers: expand = one sample per answer."""
    trim_tail: bool | None = None
    """Cut off what follows the last supervised token; null = unless the model has experts, whose
    balance loss counts every token."""
    over_length: OverLength = "error"
    """What happens to a sample longer than packing.capacity."""
    on_bad_row: OnBadRecord = "error"
    """A record that cannot be used stops the run, or is left out, counted and listed."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of records that may be left out because they cannot be used."""
    cache_dir: PathText | None = None
    """Directory of the tokenised data; null = <output_dir>/data."""
    num_processes: Positive | None = None
    """Processes that tokenise; null = one for small data, else one per core."""


class PackingConfig(Section):
    """How samples share packs."""

    strategy: Annotated[Strategy, Field(description=STRATEGY_HELP)] = "auto"
    capacity: Annotated[int, Field(ge=2, le=MAX_CAPACITY)] = 2048
    """Tokens of a pack."""
    alignment: Positive = 1
    """A sample takes up a multiple of this many tokens of its pack; divides capacity."""
    max_samples_per_bin: Annotated[int, Field(ge=1, le=MAX_SAMPLES_PER_BIN)] | None = None
    """Most samples that share a pack; null = no limit."""
    pool_size: Annotated[int, Field(ge=1, le=MAX_POOL_SIZE)] = 1000
    """Samples that window chooses from, at least; more where they are less than 8 packs' worth."""


class TrainConfig(Section):
    """How long and in which batches; exactly one of steps and epochs."""

    steps: Positive | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the training data."""
    global_batch_size: Positive = 8
    """Rows per optimizer step, over all data-parallel ranks."""
    micro_batch_size: Positive = 1
    """Rows per forward pass of one rank."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the embeddings of a sample of L tokens, at most neftune_alpha / sqrt(L *
    hidden_size); 0 = none."""


class ParallelConfig(Section):
    """How the model is spread over ranks; data parallel size = ranks / (tensor * pipeline)."""

    tensor: Positive = 1
    """Tensor-parallel size, in ranks."""
    pipeline: Positive = 1
    """Pipeline-parallel size, in ranks."""
    virtual_pipeline: Positive = 1
    """Interleaved stages of each pipeline rank; more = smaller bubble, more communication."""
    stage_layers: StageLayers = "auto"
    """Layers of each (interleaved) pipeline stage, in the order of the model, as [24, 24, 24, 22];
    balanced = by cost, the LM head counted; auto = as many for each, else balanced."""
    context: Positive = 1
    """Context-parallel size: ranks that share each pack. Needs packing.alignment to be a
    multiple of twice this size."""
    expert: Positive = 1
    """Expert-parallel size: ranks that the experts of a layer are spread over, out of the tensor-
    and data-parallel ranks of a pipeline stage."""
    expert_tensor: Positive = 1
    """Ranks that each expert is split over."""
    sequence: bool = False
    """Also split norms and dropout along the sequence; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the next forward pass runs; needs the two keys above."""
    timeout_minutes: Annotated[int, Field(gt=0, le=525_600)] = 30
    """Time limit of a collective, in minutes."""
    hang_timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] = 120.0
    """Seconds without an ended step after which the run is ended with the stacks of all ranks; ten
    times as many for the first step, and for a tensor where weights are read or written; never less
    than ten of the slowest step so far."""
    warm_restarts: NotNegative = 0
    """How often a lost rank is replaced at once: all ranks are forked anew from processes that have
    imported everything, and resume from the newest checkpoint. 0 = never. Needs Linux, and torchrun
    where there are several ranks."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages, interleaved ones each by itself."""
        return self.pipeline * self.virtual_pipeline

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor * self.pipeline * self.context


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights."""

    rank: NotNegative = 0
    """Rank of the adapters; 0 = off, all weights are trained."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Also train the length of each row of the adapted weights; not with dropout."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs set to zero in training."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of every B over that of the rest, optim.lr; above 1 for LoRA+."""
    targets: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """Projections with adapters: all of attention, MLP and experts; or last parts of names, such as
    q_proj, or patterns of full names, such as model.layers.1?.self_attn.* and
    model.layers.*.mlp.experts.*.down_proj. The experts of a layer have adapters together."""


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after the warm-up; WSD = constant, then wsd_decay in wsd_decay_steps."""
    decay_steps: Positive | None = None
    """Step at which min_lr is reached, warm-up included; null = the last step."""
    wsd_decay: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last steps of WSD."""
    wsd_decay_steps: Positive | None = None
    """How many they are, out of decay_steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; not applied to norms and biases."""
    end_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay at the last step; null = it does not grow."""
    weight_decay_growth: Literal["linear", "cosine"] = "linear"
    """How it grows from weight_decay to end_weight_decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the optimizer state that stays in host memory and is updated there; needs a GPU and
    Transformer Engine."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class LossConfig(Section, LossOptions):
    """The masked linear cross-entropy."""

    backend: LossBackend = "auto"
    """Kernel; auto = the fastest that this device has."""
    custom: Text | None = None
    """Name given to register_loss by a file of `plugins`; null = cross-entropy. It gets plain log
    probabilities, so label_smoothing and z_loss must be 0."""
    policy: Policy = "auto"
    """Logits between forward and backward: kept, turned into gradients at once, or computed again;
    auto = the first that memory_budget_gib allows."""
    memory_budget_gib: Annotated[float, Field(gt=0)] = 2.0
    """GiB of logits in memory at a time; never less than 4096 rows of them."""

    @model_validator(mode="after")
    def _fits_together(self) -> "LossConfig":
        if self.custom is not None and self.penalties():
            names = " and ".join(self.penalties())
            raise ValueError(f"custom does not combine with {names}, which must be 0")
        if self.custom is not None and self.policy == "gradient_in_forward":
            raise ValueError("custom needs policy auto, stored or recompute")
        return self


class RouterConfig(Section):
    """What keeps the experts of a mixture evenly used, beside what its config.json says.

    All of it is off: a trained router is balanced, and each of these pulls it from what it has
    learnt; few steps of fine-tuning unbalance it little. Watch expert_load in the metrics.
    """

    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the load-balancing loss, E sum(copies of a token * probability) over the tokens of
    the global batch, the mean over the layers; that of transformers is router_aux_loss_coef."""
    z_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Factor of log(sum(exp(logits)))**2 of a token's router, the mean over tokens and layers."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """How far a step moves the bias of an expert that was chosen more or less often than the mean;
    for models whose experts have one."""

    @property
    def has_losses(self) -> bool:
        """Whether a loss of the router is trained."""
        return self.aux_loss_coef > 0 or self.z_loss_coef > 0


class EvaluationConfig(Section):
    """What is measured on data.eval."""

    every_steps: Positive | None = None
    """Steps between evaluations; null = before the first and after the last step only."""
    max_samples: Positive | None = None
    """Samples of data.eval to use; null = all."""
    exact_match_samples: NotNegative = 0
    """Held-out questions that the exported model answers (greedy) at the end; 0 = off."""
    max_new_tokens: Positive = 64
    """Longest answer to such a question, in tokens."""
    metrics: list[Text] = []
    """Names given to register_metric by a file of `plugins`; loss, perplexity and accuracy are
    always there."""
    best_by: Text = "loss"
    """Metric that early stopping and the best checkpoint go by."""
    patience: Positive | None = None
    """Evaluations in a row without an improvement after which training stops; null = never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A change of best_by counts as an improvement if it is larger."""


class CheckpointConfig(Section):
    """Checkpoints, written to <output_dir>/checkpoints."""

    every_steps: Positive | None = None
    """Steps between checkpoints; null = only at the end."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest whole checkpoints that are kept; two, because the newest may turn out damaged."""
    keep_best: bool = False
    """Also save and keep the checkpoint of the best evaluation so far; see evaluation.best_by."""
    resume: PathText = "auto"
    """auto = from the newest whole checkpoint of output_dir; never; or a checkpoint's path, where
    this run begins; rerun, it resumes from what it has saved since."""
    allow_change: list[ChangeableField] = []
    """What may differ from the run that made the checkpoint; --allow-change sets it. With other
    data or another order of it the run resumes with a new epoch."""
    asynchronous: bool = False
    """A thread writes, from a copy in host memory (in bf16, 14 bytes per parameter over all ranks)
    that a GPU makes beside the next step."""
    timeout_minutes: Annotated[float, Field(gt=0, le=525_600)] = 30.0
    """Time limit of a save, for each of its phases."""
    max_failures: NotNegative = 3
    """Saves in a row that may fail (full disk, broken writer) before the run stops; the last one
    must succeed."""


class GuardConfig(Section):
    """What happens to an optimizer step with a strange loss or gradient norm. A value that is not
    finite is never taken; the samples are written to <output_dir>/skipped."""

    on_spike: Literal["skip", "warn", "ignore"] = "skip"
    """A value far above the recent ones: leave the step out, take it and say so, or do not look."""
    spike_sigmas: Annotated[float, Field(gt=0)] = 20.0
    """Distance from the median, in robust standard deviations, from which on it is a spike; loss
    must also be 1 nat above the median, a gradient norm 10 times the median and over clip_grad."""
    window: Annotated[int, Field(ge=3)] = 200
    """Steps that median and deviation are taken from."""
    min_history: Annotated[int, Field(ge=3)] = 50
    """Steps before anything counts as a spike."""
    max_skips: Positive = 3
    """Skipped steps in a row that end the run."""


class MetricsConfig(Section):
    """The log, written to <output_dir>/metrics.jsonl."""

    log_every_steps: Positive = 1
    """Steps between log lines."""
    trackers: list[TrackerName] = []
    """Where the figures also go; each needs its package."""
    project: Text = "sft_fast"
    """Project of the trackers."""
    run_name: Text | None = None
    """Name of the run there; null = the last part of output_dir."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense matrix rate of one device in 10**12 FLOP/s, for the MFU; null = by the GPU's name."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step, from 1, of a profile of the main rank: <output_dir>/profile.json.gz."""
    pictures: bool = True
    """Write curves.png and report.html at the end."""
    samples: NotNegative = 0
    """Held-out questions that the models before and after training answer for report.html, in at
    most evaluation.max_new_tokens tokens; needs pictures and the export."""


class ExportConfig(Section):
    """The Hugging Face model written to <output_dir>/export at the end; LoRA adapters are merged,
    and written to <output_dir>/adapter as well, as PEFT reads them."""

    enabled: bool = True
    """Write it."""
    dtype: Dtype | None = None
    """Type of the exported weights; null = model.dtype."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Load it with transformers and compare its logits; auto = up to 4e9 parameters."""
    best: bool = False
    """Write the best checkpoint in place of the last weights; needs checkpoint.keep_best."""
    adapter_per_expert: bool = False
    """Write adapters of experts one by one, as vLLM reads them; else as one matrix for all experts
    of a layer, as PEFT keeps them in memory."""
