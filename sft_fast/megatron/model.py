"""GPTModel with packed attention and the masked loss at the LM head."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from sft_fast.config.layout import stage_layers
from sft_fast.config.sections import LoraConfig, LossConfig, ModelConfig, ParallelConfig
from sft_fast.kernels import block_torch
from sft_fast.kernels.block_backends import BlockChoice, BlockSizes, choose_block_kernels
from sft_fast.kernels.loss_options import OPTION_NAMES
from sft_fast.loss import (
    HeadSettings,
    LossOptions,
    custom_losses,
    masked_linear_cross_entropy,
    masked_linear_outputs,
)
from sft_fast.megatron.attention.backends import AttentionChoice, choose_attention
from sft_fast.megatron.attention.context_parallel import ContextGroup, check_context, context_group
from sft_fast.megatron.attention.core import PackedAttention
from sft_fast.megatron.attention.packed_samples import AttentionFn, PackedSamples, ScoreOptions
from sft_fast.megatron.attention.self_test import AttentionShape
from sft_fast.megatron.embedding import use_row_embedding
from sft_fast.megatron.experts import connect_experts, experts_config, use_grouped_experts
from sft_fast.megatron.latent_attention import LatentAttention
from sft_fast.megatron.layer import FusedSelfAttention, FusedTransformerLayer, use_kernels
from sft_fast.megatron.memory import memory_options, recomputed_parts
from sft_fast.megatron.norm import HeadNorm, NormThenAdd, ResidualNorm, RMSNorm
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.rotary import (
    frequencies_by_length,
    longest_short_sample,
    rotary_factor,
    rotary_frequencies,
    rotary_tables,
    rotated_channels,
)
from sft_fast.megatron.stage_head import StageHead, token_losses
from sft_fast.megatron.transformer_engine import transformer_engine_options, use_transformer_engine
from sft_fast.megatron.without_apex import provide_products
from sft_fast.models.architecture import Architecture, padded_vocab_size
from sft_fast.stages import SFT_STAGE, Stage

NO_SAMPLES = PackedSamples()
"""Of a caller of megatron's own, which knows neither active tokens nor weights."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LossOutputLayer(ColumnParallelLinear):
    """The LM head. With labels it returns the loss; logits of other tokens are never computed.

    The loss runs inside this module's forward so that DDP's parameter-gather hooks fire. An
    existing output layer becomes one by assigning `__class__`: same parameters and checkpoint keys.
    """

    settings: HeadSettings
    custom_loss: str | None
    """Name of a registered loss."""
    stage: Stage

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        samples: PackedSamples = NO_SAMPLES,
        **kwargs: Any,
    ) -> Any:
        """Logits as megatron gives them, or with `labels` [b, s] the per-token loss [b, s] fp32.

        With samples.wants_outputs: [3, b, s] fp32, log probability of the label without label
        smoothing and z-loss, entropy, correctness; in a stage with a loss of its own what
        `token_losses` returns.

        samples.token_weights [b, s] multiplies the loss, a custom one too.
        """
        if labels is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output, **kwargs)
            if softcap := self.settings.options.logit_softcap:
                logits = softcap * torch.tanh(logits / softcap)
            return logits, bias
        settings, is_custom = self.settings, self.custom_loss is not None
        active_tokens, token_weights = samples.active_tokens, samples.token_weights
        if samples.loss_rows is not None:
            settings = replace(settings, only_active=True)
            # They are on the device already; without active tokens there is one row too many.
            assert active_tokens is not None, "the rows come from them"
            active_tokens = samples.loss_rows[: len(active_tokens)]
        weight = self.weight if weight is None else weight
        if self.stage.has_loss:
            outputs = masked_linear_outputs(
                input_, weight, labels, settings, active_tokens=active_tokens
            )
            assert active_tokens is not None, "a micro-batch knows them"
            active = active_tokens.to(labels.device, non_blocking=True)
            logprobs = outputs.logprob.t().flatten().index_select(0, active)  # [A]
            return token_losses(self.stage, logprobs, labels, samples)
        if samples.wants_outputs:
            plain = settings.options.without_penalties()
            settings = replace(settings, options=plain, summed=False, policy="auto")
            outputs = masked_linear_outputs(
                input_, weight, labels, settings, active_tokens=active_tokens
            )
            return torch.stack([outputs.logprob, outputs.entropy, outputs.correct.float()])
        # DDP's fp32 buffer: no 16-bit gradient of the head is made and rounded.
        settings = replace(settings, accumulate_into_main_grad=hasattr(weight, "main_grad"))
        losses = masked_linear_cross_entropy(
            input_,
            weight,
            labels,
            settings,
            active_tokens=active_tokens,
            token_weights=None if is_custom else token_weights,
        )
        if self.custom_loss is None:
            return losses
        losses = custom_losses(self.custom_loss, losses, labels)
        return losses if token_weights is None else losses * token_weights


def head_settings(
    layer: ColumnParallelLinear, architecture: Architecture, loss_config: LossConfig
) -> HeadSettings:
    """What the loss of this LM head does in every call."""
    options = {name: getattr(loss_config, name) for name in OPTION_NAMES}
    options["logit_softcap"] = softcap(architecture, loss_config)
    return HeadSettings(
        vocab_size=architecture.vocab_size,
        tp_group=layer.tp_group,
        sequence_parallel=layer.sequence_parallel,
        options=LossOptions(**options),
        backend=loss_config.backend,
        # forward_step's loss_func sums them; a custom loss is free to do anything.
        summed=loss_config.custom is None,
        policy=loss_config.policy,
        memory_budget=round(loss_config.memory_budget_gib * 2**30),
    )


class SFTModel(GPTModel):
    """megatron-core's GPTModel; rotary tables follow position_ids, labels give per-token losses."""

    attention: AttentionChoice
    kernels: BlockChoice
    output_layer: Any
    computes_loss_rows = False
    """The last layer computes only tokens whose loss counts, see loss_rows.py."""
    noise: Any = None
    """neftune.EmbeddingNoise in training runs that want it."""

    def __init__(
        self,
        *args: Any,
        architecture: Architecture,
        loss_config: LossConfig,
        stage: Stage,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.rotary_frequencies = rotary_frequencies(architecture)
        self.rotary_factor = rotary_factor(architecture)
        self.longest_short_sample = longest_short_sample(architecture)
        scale = architecture.embedding_scale
        self.embedding_scale = None if scale == 1.0 else torch.tensor(scale)
        if self.pre_process:
            has_head = self.post_process and stage.num_outputs is None
            use_row_embedding(self, has_head and self.share_embeddings_and_output_weights)
        if not self.post_process:
            return
        layer: Any = self.output_layer
        if stage.num_outputs is None:
            layer.__class__ = LossOutputLayer
            layer.settings = head_settings(layer, architecture, loss_config)
            layer.custom_loss, layer.stage = loss_config.custom, stage
            # Experts count the tokens that they get; 8-bit products want multiples of rows.
            is_dense = architecture.num_layers - 1 in architecture.dense_layers
            is_whole = not (self.config.sequence_parallel or self.config.fp8)
            self.computes_loss_rows = is_whole and (is_dense or not architecture.num_experts)
        else:
            sizes = self.config.hidden_size, stage, self.config.params_dtype
            self.output_layer = StageHead(*sizes, layer.tp_group, layer.sequence_parallel)

    @property
    def has_stage_head(self) -> bool:
        """Whether this part of the model ends in a head that is no LM head."""
        return self.post_process and isinstance(self.output_layer, StageHead)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As megatron's, with the rotary tables of `position_ids` [b, s]; see rotary_tables."""
        # decoder_input [s, b, h]; None on later pipeline stages.
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.embedding_scale is not None and decoder_input is not None:
            decoder_input = decoder_input * self.embedding_scale.to(decoder_input)
        samples = kwargs.get("packed_seq_params")
        if self.noise is not None and self.training and decoder_input is not None and samples:
            decoder_input = self.noise.add(decoder_input, position_ids, samples)
        self.rotary_frequencies = self.rotary_frequencies.to(position_ids.device)
        frequencies = self.rotary_frequencies  # [kinds, n]
        if self.longest_short_sample is not None:
            frequencies = frequencies_by_length(
                frequencies,
                self.longest_short_sample,
                samples.cu_seqlens_q if samples else None,
                position_ids.shape[1],
                self.config.context_parallel_size,
            )
        tables = rotary_tables(position_ids, frequencies, self.rotary_factor)
        return (decoder_input, tables, *rest)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [s, b, h] -> what the head returns, logits or losses."""
        samples = packed_seq_params if isinstance(packed_seq_params, PackedSamples) else NO_SAMPLES
        if self.has_stage_head:
            return self.output_layer(hidden_states, labels, samples)
        if labels is None or not self.post_process:
            return super()._postprocess(
                hidden_states, *args, labels=labels, packed_seq_params=packed_seq_params, **kwargs
            )
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return self.output_layer(hidden_states, weight=weight, labels=labels, samples=samples)


def softcap(architecture: Architecture, loss_config: LossConfig) -> float:
    """The logits' soft cap: the model's own, or the one of the config.

    Raises:
        ValueError: they differ.
    """
    own, asked = architecture.logit_softcap or 0.0, loss_config.logit_softcap
    if own and asked not in (0.0, own):
        raise ValueError(
            f"loss.logit_softcap is {asked}, but the model was trained with {own}; leave it at 0"
        )
    return own or asked


def scorings(architecture: Architecture) -> list[ScoreOptions]:
    """What each layer does with its attention scores."""
    scale = architecture.attention_scale or 1.0 / math.sqrt(architecture.head_dim)
    return [
        ScoreOptions(scale, architecture.window(layer), architecture.attention_softcap)
        for layer in range(architecture.num_layers)
    ]


def block_spec(
    config: TransformerConfig,
    architecture: Architecture,
    attend: AttentionFn,
    context: ContextGroup | None,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Our layers of this pipeline stage around megatron's linear ones, or where the config says so
    Transformer Engine's."""
    num_layers = get_num_layers_to_build(config, vp_stage, None)
    first = get_transformer_layer_offset(config, vp_stage)
    kinds = [layer in architecture.dense_layers for layer in range(first, first + num_layers)]
    specs = {
        is_dense: layer_spec(
            config, architecture, 0 if is_dense else architecture.num_experts, attend, context
        )
        for is_dense in dict.fromkeys(kinds)
    }
    return TransformerBlockSubmodules([specs[is_dense] for is_dense in kinds], layer_norm=RMSNorm)


def layer_spec(
    config: TransformerConfig,
    architecture: Architecture,
    num_experts: int,
    attend: AttentionFn,
    context: ContextGroup | None,
) -> ModuleSpec:
    """One of the layers, which has `num_experts` or an MLP; see `block_spec`."""
    spec = get_gpt_layer_local_spec(num_experts or None, normalization="RMSNorm")
    spec.module, layer = FusedTransformerLayer, spec.submodules
    if config.transformer_impl == "transformer_engine":
        use_transformer_engine(layer)
    if num_experts:
        use_grouped_experts(layer)
    layer.input_layernorm = layer.pre_mlp_layernorm = ResidualNorm
    if "self_attn_bda.weight" in architecture.layer:
        params = {
            "config": config,
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        layer.self_attn_bda = layer.mlp_bda = ModuleSpec(module=NormThenAdd, params=params)
    attention = layer.self_attention.submodules
    core = {"attend": attend, "context": context, "scorings": scorings(architecture)}
    attention.core_attention = ModuleSpec(module=PackedAttention, params=core)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = HeadNorm
    is_latent = architecture.kv_rank > 0
    layer.self_attention.module = LatentAttention if is_latent else FusedSelfAttention
    layer.self_attention.params["architecture"] = architecture
    return spec


def pipeline_layout(architecture: Architecture, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each pipeline stage holds, in megatron's words; None = as many layers in each."""
    counts = stage_layers(architecture, parallel)
    if len(set(counts)) == 1:
        return None
    stages = [["decoder"] * count for count in counts]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def transformer_config(
    architecture: Architecture,
    model: ModelConfig,
    parallel_config: ParallelConfig,
    lora: LoraConfig,
    parallel: Parallel,
) -> TransformerConfig:
    """megatron's own config for this architecture and run."""
    dtype = DTYPES[model.dtype]
    on_gpu = parallel.device.type == "cuda"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.dense_ffn_size or architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=block_torch.ACTIVATIONS[architecture.activation],
        layernorm_zero_centered_gamma=architecture.has_zero_centered_norms,
        add_bias_linear=False,
        add_qkv_bias="self_attention.linear_qkv.bias" in architecture.layer,
        qk_layernorm=architecture.has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        virtual_pipeline_model_parallel_size=parallel.vp_size if parallel.vp_size > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(architecture, parallel_config),
        # Interleaved stages of two ranks have the same neighbour on both sides.
        overlap_p2p_comm=parallel.vp_size > 1,
        batch_p2p_comm=parallel.vp_size == 1,
        sequence_parallel=parallel_config.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        fp16=model.dtype == "fp16",
        calculate_per_token_loss=True,
        # gloo still sends an interleaved stage's output when megatron would free it.
        deallocate_pipeline_outputs=on_gpu or parallel.vp_size == 1,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        **memory_options(model, lora, parallel),
        **transformer_engine_options(model, parallel),
        **experts_config(architecture, parallel),
    )


def build_model(
    architecture: Architecture,
    model: ModelConfig,
    layout: ParallelConfig,
    lora: LoraConfig,
    loss: LossConfig,
    parallel: Parallel,
    stage: Stage = SFT_STAGE,
) -> list[SFTModel]:
    """Allocates this rank's part of the model; weights are undefined until they are loaded.

    Returns: one module, with interleaved pipeline stages one for each of them, in their order.
    """
    megatron_config = transformer_config(architecture, model, layout, lora, parallel)
    shape = AttentionShape(
        parallel.device,
        megatron_config.params_dtype,
        architecture.num_attention_heads // parallel.tp_size,
        architecture.num_key_value_heads // parallel.tp_size,
        architecture.head_dim,
        architecture.value_dim,
    )
    if megatron_config.gradient_accumulation_fusion:
        provide_products()
    context, further_test = context_group(parallel), None
    if context is not None:
        further_test = partial(check_context, context, shape)
    attention = choose_attention(model.attention, shape, scorings(architecture), further_test)
    sizes = block_sizes(architecture, parallel)
    kernels = choose_block_kernels(model.kernels, shape.device, shape.dtype, sizes)
    chunks = [
        build_chunk(architecture, loss, stage, parallel, megatron_config, attention, number)
        for number in range(parallel.vp_size)
    ]
    for chunk in chunks:
        chunk.kernels = kernels
        use_kernels(
            chunk,
            kernels.kernels,
            architecture.activation,
            recomputed_parts(model),
            model.recompute_layers,
        )
    return chunks


def block_sizes(architecture: Architecture, parallel: Parallel) -> BlockSizes:
    """What the kernels of a rank's layers work on."""
    a = architecture
    mlp_ranks = parallel.etp_size if a.num_experts else parallel.tp_size
    return BlockSizes(
        hidden_size=a.hidden_size,
        num_groups=a.num_key_value_heads // parallel.tp_size,
        queries_per_group=a.num_attention_heads // a.num_key_value_heads,
        head_dim=a.head_dim,
        rotated_channels=rotated_channels(a),
        has_qk_norm=a.has_qk_norm,
        ffn_size=a.ffn_hidden_size // mlp_ranks,
        activation=a.activation,
        has_scale=a.num_experts > 0,
        is_zero_centered=a.has_zero_centered_norms,
        eps=a.norm_eps,
    )


def build_chunk(
    architecture: Architecture,
    loss: LossConfig,
    stage: Stage,
    parallel: Parallel,
    megatron_config: TransformerConfig,
    attention: AttentionChoice,
    number: int,
) -> SFTModel:
    """Allocates chunk `number` of this rank's `parallel.vp_size`."""
    vp_stage = number if parallel.vp_size > 1 else None
    model = SFTModel(
        config=megatron_config,
        transformer_layer_spec=block_spec(
            megatron_config, architecture, attention.attend, context_group(parallel), vp_stage
        ),
        vocab_size=padded_vocab_size(architecture.vocab_size, parallel.tp_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel.is_first_stage and number == 0,
        post_process=parallel.is_last_stage and number == parallel.vp_size - 1,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="none",
        architecture=architecture,
        loss_config=loss,
        stage=stage,
        vp_stage=vp_stage,
    )
    model.attention = attention
    connect_experts(model, architecture)
    mark_sharded_weights(model)
    return model.to(parallel.device)


def mark_sharded_weights(model: SFTModel) -> None:
    """Tells megatron which weights are shards, so that the gradient norm counts each value once.

    Up to 0.17 only its own initialisation does, which is off because the weights are loaded.
    """
    split_dims = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        for kind, dim in split_dims.items():
            weight = module.weight if isinstance(module, kind) else None
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dim, stride=1)


def unwrap(model: torch.nn.Module) -> SFTModel:
    """Takes DDP and mixed-precision wrappers off."""
    wrapped: Any = model
    while not isinstance(wrapped, SFTModel):
        wrapped = wrapped.module
    return wrapped
