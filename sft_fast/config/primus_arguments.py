"""What each Megatron argument of a Primus experiment means here: tables only.

An argument has a key of ours, or must say what this trainer always does, or only concerns speed
or logging, or belongs to a feature that must be off. One in no table is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODULE_FILE = "sft_trainer.yaml"


@dataclass(frozen=True)
class Target:
    """Our key for an argument, and how its value changes on the way."""

    key: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Fixed:
    """The values of an argument that agree with what this trainer always does, and why."""

    values: tuple[Any, ...]
    reason: str


def as_flag(value: Any) -> Any:
    """Returns 0 and 1 as false and true, as Primus files have them; all else as it is."""
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _negated(value: Any) -> Any:
    flag = as_flag(value)
    return not flag if isinstance(flag, bool) else value


def _one_if_none(value: Any) -> Any:
    return 1 if value is None else value


def _none_if_off(value: Any) -> Any:
    return "none" if value in (False, 0) else value


def _strategy(value: Any) -> Any:
    flag = as_flag(value)
    return ("auto" if flag else "none") if isinstance(flag, bool) else value


def _format(value: Any) -> Any:
    return FORMATS.get(value, value) if isinstance(value, str) else value


# Formats of Primus whose name here is another.
FORMATS = {
    "bridge_squad": "squad",
    "chat_template": "auto",
    "hf_chat": "auto",
    "qwen_chat": "auto",
}
# Formats of Primus that write a prompt of their own, whatever the template of the tokenizer.
TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "messages": "chatml", "openai": "chatml"}

TARGETS = {
    "seed": Target("seed"),
    "save": Target("output_dir"),
    "hf_path": Target("model.path"),
    "tokenizer_model": Target("tokenizer.path"),
    "sft_dataset_name": Target("data.train"),
    "sft_dataset_split": Target("data.train_split"),
    "sft_conversation_format": Target("data.format", _format),
    "seq_length": Target("packing.capacity"),
    "enable_packed_sequences": Target("packing.strategy", _strategy),
    "train_iters": Target("train.steps"),
    "global_batch_size": Target("train.global_batch_size"),
    "micro_batch_size": Target("train.micro_batch_size"),
    "tensor_model_parallel_size": Target("parallel.tensor"),
    "pipeline_model_parallel_size": Target("parallel.pipeline"),
    "context_parallel_size": Target("parallel.context"),
    "virtual_pipeline_model_parallel_size": Target("parallel.virtual_pipeline", _one_if_none),
    "expert_model_parallel_size": Target("parallel.expert"),
    "expert_tensor_parallel_size": Target("parallel.expert_tensor"),
    "fp8": Target("model.fp8", _none_if_off),
    "fp8_recipe": Target("model.fp8_recipe"),
    "sequence_parallel": Target("parallel.sequence", as_flag),
    "use_distributed_optimizer": Target("parallel.distributed_optimizer", as_flag),
    "overlap_grad_reduce": Target("parallel.overlap_grad_reduce", as_flag),
    "overlap_param_gather": Target("parallel.overlap_param_gather", as_flag),
    "distributed_timeout_minutes": Target("parallel.timeout_minutes"),
    "lr": Target("optim.lr"),
    "min_lr": Target("optim.min_lr"),
    "lr_warmup_iters": Target("optim.warmup_steps"),
    "lr_decay_style": Target("optim.decay"),
    "lr_decay_iters": Target("optim.decay_steps"),
    "lr_wsd_decay_iters": Target("optim.wsd_decay_steps"),
    "lr_wsd_decay_style": Target("optim.wsd_decay"),
    "weight_decay": Target("optim.weight_decay"),
    "end_weight_decay": Target("optim.end_weight_decay"),
    "adam_beta1": Target("optim.beta1"),
    "adam_beta2": Target("optim.beta2"),
    "adam_eps": Target("optim.eps"),
    "clip_grad": Target("optim.clip_grad"),
    "moe_aux_loss_coeff": Target("router.aux_loss_coef"),
    "moe_z_loss_coeff": Target("router.z_loss_coef"),
    "moe_router_bias_update_rate": Target("router.bias_update_rate"),
    "eval_interval": Target("evaluation.every_steps"),
    "save_interval": Target("checkpoint.every_steps"),
    "log_interval": Target("metrics.log_every_steps"),
}

SIZES = {
    "num_layers": Target("model.shape.num_layers"),
    "hidden_size": Target("model.shape.hidden_size"),
    "ffn_hidden_size": Target("model.shape.ffn_hidden_size"),
    "num_attention_heads": Target("model.shape.num_attention_heads"),
    "num_query_groups": Target("model.shape.num_key_value_heads"),
}
DETAILS = {
    "max_position_embeddings": Target("model.shape.max_position_embeddings"),
    "init_method_std": Target("model.shape.initializer_range"),
    "norm_epsilon": Target("model.shape.norm_eps"),
    "rotary_base": Target("model.shape.rope_theta"),
    "untie_embeddings_and_output_weights": Target("model.shape.tie_word_embeddings", _negated),
}

_LLAMA = "a random model here is a Llama: RMSNorm, SwiGLU, rotary positions, no biases, no dropout"
_ONE_SIZE = "the optimizer state is sharded by use_distributed_optimizer, not the weights"
_EIGHT_BITS = "of 8-bit training only fp8 and fp8_recipe can be chosen"
_EXPERTS = "a mixture-of-experts model is what the config.json of hf_path says"
_SCHEDULE = "the schedule is lr, min_lr, lr_warmup_iters, lr_decay_iters and lr_decay_style"
_STATES = "gradients and optimizer states are fp32, which is exact and takes more memory"
_BATCH = "the batch size is the same in every step"
ARCHITECTURE = {
    "add_bias_linear": Fixed((False,), _LLAMA),
    "add_qkv_bias": Fixed((False,), _LLAMA),
    "attention_dropout": Fixed((0,), _LLAMA),
    "disable_bias_linear": Fixed((True,), _LLAMA),
    "hidden_dropout": Fixed((0,), _LLAMA),
    "normalization": Fixed(("RMSNorm",), _LLAMA),
    "position_embedding_type": Fixed(("rope",), _LLAMA),
    "qk_layernorm": Fixed((False,), _LLAMA),
    "rotary_percent": Fixed((1,), _LLAMA),
    "swiglu": Fixed((True,), _LLAMA),
    "use_rope_scaling": Fixed((False,), _LLAMA),
    "use_rotary_position_embeddings": Fixed((True,), _LLAMA),
}
FIXED = {
    "calculate_per_token_loss": Fixed(
        (True,),
        "the loss is always the mean over the supervised tokens of the global batch; a mean of "
        "micro-batch means would depend on micro_batch_size, packing and the number of ranks",
    ),
    "decoupled_lr": Fixed((), _SCHEDULE),
    "eod_mask_loss": Fixed(
        (False,), "the end of an answer is trained, so the model learns to stop"
    ),
    "fp8_wgrad": Fixed((True,), _EIGHT_BITS),
    "lr_decay_samples": Fixed((0,), _SCHEDULE),
    "lr_warmup_init": Fixed((0,), _SCHEDULE),
    "lr_warmup_samples": Fixed((0,), _SCHEDULE),
    "main_params_dtype": Fixed(("fp32",), "the optimizer keeps fp32 copies of the weights"),
    "moe_router_load_balancing_type": Fixed(
        ("aux_loss", "global_aux_loss"), "the balance loss is that of the tokens of a global batch"
    ),
    "moe_router_dtype": Fixed(("fp32",), "routers compute in fp32"),
    "moe_router_force_load_balancing": Fixed(
        (False,), "random experts teach nothing: it is for measurements of speed alone"
    ),
    "optimizer": Fixed(("adam",), "the optimizer is AdamW"),
    "rampup_batch_size": Fixed((), _BATCH),
    "skip_train": Fixed((False,), "this is a trainer"),
    "tokenizer_type": Fixed(("HuggingFaceTokenizer",), "tokenizers are Hugging Face tokenizers"),
    "train_samples": Fixed((), "the length is train_iters"),
    "trust_remote_code": Fixed((False,), "code from a model's repository is never run"),
}

# Prefix of arguments that are fine while they are null, false or 0.
OFF = {
    "data_path": "training data comes from sft_dataset_name",
    "enable_odc": "on-demand communication is not part of this trainer",
    "fp4": "there is no 4-bit training",
    "fp8_dot_product_attention": _EIGHT_BITS,
    "fp8_margin": _EIGHT_BITS,
    "fp8_multi_head_attention": _EIGHT_BITS,
    "mock_data": "training data comes from sft_dataset_name",
    "moe_": _EXPERTS,
    "mtp_": "there is no multi-token prediction",
    "num_experts": _EXPERTS,
    "num_layers_per_virtual_pipeline_stage": "write virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "write virtual_pipeline_model_parallel_size",
    "recompute_activations": "recomputation is recompute_granularity: full",
    "sft_bridge_compat_inline_bos": "a BOS inside a conversation is for comparisons with Bridge",
    "use_custom_fsdp": _ONE_SIZE,
    "use_megatron_fsdp": _ONE_SIZE,
    "use_torch_fsdp2": _ONE_SIZE,
}

# Accepted with whatever value, and why they change less than they say; null and false say nothing.
NOTED = {
    "exp_avg_dtype": _STATES,
    "exp_avg_sq_dtype": _STATES,
    "grad_reduce_in_bf16": "gradients are reduced in fp32",
    "main_grads_dtype": _STATES,
    "use_precision_aware_optimizer": _STATES,
}

# What describes multi-head latent attention: one refusal names all of them.
LATENT = (
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("qk_pos_emb_head_dim", "v_head_dim", "mscale", "mscale_all_dim"),
)

# Keys of the mapping `lora`, and what they mean here.
LORA = {
    "dim": Target("lora.rank"),
    "alpha": Target("lora.alpha"),
    "dropout": Target("lora.dropout"),
}
LORA_DEFAULTS = {"dim": 32, "alpha": 32, "dropout": 0.0}
_FROZEN = "A begins at random and B at zero"
LORA_FIXED = {
    "a2a_experimental": Fixed((False,), "the exchange of tensor-parallel ranks is not to choose"),
    "dropout_position": Fixed(("pre",), "dropout acts on the input of A"),
    "exclude_modules": Fixed(([],), "target_modules names what is adapted"),
    "lora_A_init_method": Fixed(("xavier", "kaiming", "uniform"), _FROZEN),
    "lora_B_init_method": Fixed(("zero",), _FROZEN),
    "lora_dtype": Fixed((), "adapters have the type of the weights"),
}
# Megatron's matrices and the projections of Hugging Face models that they hold.
LORA_TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
    "linear_q": ("q_proj",),
    "linear_k": ("k_proj",),
    "linear_v": ("v_proj",),
    "linear_fc1_gate": ("gate_proj",),
    "linear_fc1_up": ("up_proj",),
    "linear_q_proj": ("q_proj",),
    "linear_q_down_proj": ("q_a_proj",),
    "linear_q_up_proj": ("q_b_proj",),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa",),
    "linear_kv_up_proj": ("kv_b_proj",),
}
ALL_LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

# Parts of a layer that can be computed again.
RECOMPUTED = {
    "core_attn": "core_attn",
    "layernorm": "norm",
    "mlp": "mlp",
    "moe": "moe",
    "moe_act": "activation",
}

# Speed, logging and file formats: the trained weights do not depend on them.
IGNORED = _names(
    """
    accumulate_allreduce_grads_in_fp32 align_grad_reduce align_param_gather app_tag_run_name
    app_tag_run_version apply_rope_fusion async_save async_tensor_model_parallel_allreduce
    attention_backend attention_softmax_in_fp32 auto_detect_ckpt_format barrier_with_L1_time
    bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion check_for_large_grads
    check_for_nan_in_loss check_for_nan_in_loss_and_grad check_for_spiky_loss ckpt_format
    ckpt_fully_parallel_load ckpt_fully_parallel_save cp_comm_type cross_entropy_fusion_impl
    cross_entropy_loss_fusion data_cache_path data_sharding dataloader_mp_context dataloader_type
    ddp_average_in_collective ddp_bucket_size ddp_num_buckets deterministic_mode
    disable_compile_dependencies disable_last_saving disable_mlflow disable_tensorboard
    disable_wandb dist_ckpt_strictness distributed_backend empty_unused_memory_level
    enable_experimental enable_fused_linear_ce enable_gloo_process_groups enable_one_logger
    enable_primus_turbo exit_on_missing_checkpoint exit_signal_handler file_sink_level finetune
    fp8_amax_compute_algo fp8_amax_history_len fp8_interval fully_parallel_save
    gradient_accumulation_fusion gradient_reduce_div_fusion lb_mini_cost_model lb_mini_max_token_len
    log_avg_reset_interval log_avg_skip_iterations log_batch_size_to_tensorboard
    log_learning_rate_to_tensorboard log_loss_scale_to_tensorboard log_memory_to_tensorboard
    log_num_zeros_in_grad log_params_norm log_progress log_throughput log_timers_to_tensorboard
    log_validation_ppl_to_tensorboard log_world_size_to_tensorboard logging_level
    make_vocab_size_divisible_by manual_gc manual_gc_eval manual_gc_interval masked_softmax_fusion
    memory_snapshot_path mlflow_experiment_name mlflow_run_name mlflow_upload_logs
    mlflow_upload_performance_metrics mlflow_upload_traces moe_enable_deepep
    moe_flex_dispatcher_backend moe_grouped_gemm moe_per_layer_logging moe_permute_fusion
    moe_shared_expert_overlap moe_token_dispatcher_type moe_use_fused_router_with_aux_score
    moe_use_legacy_grouped_gemm native_ckpt_convert native_ckpt_dtype native_ckpt_out
    no_fp8_weight_transpose_cache no_load_optim no_load_rng no_persist_layer_norm no_save_optim
    no_save_rng num_dataset_builder_threads num_workers nvtx_ranges overlap_moe_expert_parallel_comm
    overlap_p2p_comm override_opt_param_scheduler pp_warmup profile profile_ranks profile_step_end
    profile_step_start pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra
    pytorch_profiler_collect_shapes record_memory_history record_shapes reset_attention_mask
    reset_position_ids scatter_gather_tensors_in_pipeline sink_level split stderr_sink_level
    tensorboard_dir tensorboard_log_interval tensorboard_queue_size timing_log_level
    timing_log_option torch_profiler_record_shapes torch_profiler_use_gzip torch_profiler_with_stack
    tp_comm_overlap trainable transformer_impl turbo_deepep_num_cu turbo_deepep_use_comm_stream
    turbo_sync_free_moe_stage use_checkpoint_opt_param_scheduler use_flash_attn use_nsys_profiler
    use_pytorch_profiler use_rocm_mem_info use_rocm_mem_info_iters use_turbo_attention
    use_turbo_deepep use_turbo_gemm use_turbo_grouped_gemm use_turbo_rms_norm wall_clock_step_timer
    wandb_entity wandb_exp_name wandb_project wandb_save_dir
    """
)

# Read by name in `primus.py`, because they act together with others.
COMBINED = _names(
    """
    auto_continue_train bf16 eval_iters fp16 fp8_param_gather group_query_attention load lora
    lr_warmup_fraction pipeline_model_parallel_layout pretrained_checkpoint recompute_granularity
    recompute_method recompute_modules recompute_num_layers sft_dataset_config
    sft_sanitize_nan_grads stage start_weight_decay use_packed_attention weight_decay_incr_style
    """
)

# What an SFT experiment gets where it says nothing (its module file, sft_trainer.yaml).
DEFAULTS = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "bf16": True,
    "distributed_timeout_minutes": 60,
    "enable_packed_sequences": False,
    "eval_interval": 50,
    "eval_iters": 10,
    "global_batch_size": 128,
    "log_interval": 1,
    "lr": 1e-5,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 50,
    "micro_batch_size": 1,
    "min_lr": 0.0,
    "save_interval": 100,
    "seq_length": 2048,
    "sft_conversation_format": "alpaca",
    "train_iters": 1000,
    "use_distributed_optimizer": True,
    "weight_decay": 0.1,
}
