import logging
import re
import textwrap
from pathlib import Path

import pytest

from config_cases import only_problem, problems_of
from sft_fast.config import primus, primus_bridge
from sft_fast.config import primus_arguments as tables
from sft_fast.config.primus_lora import KEYS as LORA_KEYS
from sft_fast.config.primus_presets import PRESETS
from sft_fast.config.schema import Config, load_config
from sft_fast.config.validation import dotted_keys
from sft_fast.errors import ConfigError
from sft_fast.registry import stages, trainers

HEAD = """\
work_group: amd
user_name: someone
exp_name: llama-sft
workspace: ./output
modules:
  post_trainer:
    framework: megatron
    config: sft_trainer.yaml
    model: llama3_8B.yaml
    overrides:
"""
MINIMAL = """\
hf_path: some/model
sft_dataset_name: data.jsonl
"""
SIZES = """\
num_layers: 4
hidden_size: 64
ffn_hidden_size: 128
num_attention_heads: 8
sft_dataset_name: data.jsonl
tokenizer_model: demo
"""


@pytest.fixture
def load(tmp_path):
    def load_arguments(arguments: str, *overrides: str, head: str = HEAD) -> Config:
        path = tmp_path / "primus.yaml"
        path.write_text(head + textwrap.indent(arguments, " " * 6))
        return load_config(path, list(overrides))

    return load_arguments


def test_every_mapped_argument_reaches_its_key(load):
    config = load("""\
stage: sft
seed: 7
save: runs/a
hf_path: some/model
recompute_granularity: full
tokenizer_model: some/tokenizer
sft_dataset_name: tatsu-lab/alpaca
sft_dataset_split: train[:90%]
sft_conversation_format: chatml
seq_length: 512
enable_packed_sequences: true
use_packed_attention: true
train_iters: 300
global_batch_size: 64
micro_batch_size: 2
tensor_model_parallel_size: 2
pipeline_model_parallel_size: 4
sequence_parallel: 1
use_distributed_optimizer: true
overlap_grad_reduce: true
overlap_param_gather: true
distributed_timeout_minutes: 45
lr: 2e-5
min_lr: 1e-6
lr_warmup_iters: 30
lr_decay_style: linear
lr_decay_iters: 250
weight_decay: 0.01
adam_beta1: 0.8
adam_beta2: 0.99
adam_eps: 1.0e-6
clip_grad: 0.3
fp16: true
bf16: false
eval_interval: 40
eval_iters: 3
save_interval: 60
log_interval: 5
auto_continue_train: false
""", "data.eval=eval.jsonl")  # fmt: skip
    assert config.model_dump(exclude_defaults=True) == {
        "output_dir": "runs/a",
        "seed": 7,
        "model": {"path": "some/model", "dtype": "fp16", "recompute": "full"},
        "tokenizer": {"path": "some/tokenizer", "chat_template": "chatml"},
        "data": {
            "train": "tatsu-lab/alpaca",
            "eval": "eval.jsonl",
            "train_split": "train[:90%]",
            "format": "chatml",
        },
        "packing": {"capacity": 512},
        "train": {"steps": 300, "global_batch_size": 64, "micro_batch_size": 2},
        "parallel": {
            "tensor": 2,
            "pipeline": 4,
            "sequence": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "timeout_minutes": 45,
        },
        "optim": {
            "lr": 2e-5,
            "min_lr": 1e-6,
            "warmup_steps": 30,
            "decay": "linear",
            "decay_steps": 250,
            "weight_decay": 0.01,
            "beta1": 0.8,
            "beta2": 0.99,
            "eps": 1e-6,
            "clip_grad": 0.3,
        },
        "evaluation": {"every_steps": 40, "max_samples": 192},
        "checkpoint": {"every_steps": 60, "resume": "never"},
        "metrics": {"log_every_steps": 5},
    }
    assert config.packing.strategy == "auto"


def test_shape_arguments_reach_model_shape(load):
    config = load(SIZES + """\
num_query_groups: 2
group_query_attention: true
rotary_base: 500000
norm_epsilon: 1.0e-6
untie_embeddings_and_output_weights: true
max_position_embeddings: 8192
""")  # fmt: skip
    assert config.model.shape.model_dump() == {
        "hidden_size": 64,
        "num_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "ffn_hidden_size": 128,
        "num_experts": 0,
        "experts_per_token": 2,
        "rope_theta": 500000.0,
        "norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
    }


def test_without_query_groups_every_head_has_its_own_keys(load):
    assert load(SIZES).model.shape.num_key_value_heads == 8
    assert load(SIZES + "group_query_attention: false").model.shape.num_key_value_heads == 8
    text = SIZES + "group_query_attention: false\nnum_query_groups: 2"
    assert "num_query_groups" in only_problem(load, text).keys[0]


def test_what_is_not_given_has_the_defaults_of_primus(load):
    config = load(MINIMAL)
    assert config.output_dir == "output/amd/someone/llama-sft"
    assert config.packing.strategy == "none"
    assert (config.train.steps, config.train.global_batch_size) == (1000, 128)
    assert (config.optim.warmup_steps, config.checkpoint.every_steps) == (50, 100)
    assert config.model.dtype == "bf16"
    assert config.data.format == "alpaca"


def test_null_takes_a_default_away(load):
    config = load(MINIMAL + "save_interval: null\nload: null\nsave: null\nlr_decay_iters: null")
    assert config.checkpoint.every_steps is None
    assert config.output_dir == "output/amd/someone/llama-sft"


@pytest.mark.parametrize(
    "text, dtype",
    [("bf16: true", "bf16"), ("fp16: true", "fp16"), ("bf16: false", "fp32"), ("", "bf16")],
)
def test_dtype(load, text, dtype):
    assert load(MINIMAL + text).model.dtype == dtype


def test_both_half_types_are_a_contradiction(load):
    assert only_problem(load, MINIMAL + "bf16: true\nfp16: true").found == "fp16 and bf16"


@pytest.mark.parametrize("name", ["pre_trainer", "post_trainer", "trainer"])
def test_module_may_have_any_name(load, name):
    assert load(MINIMAL, head=HEAD.replace("post_trainer", name)).backend == "megatron"


def test_framework_and_stage_pick_the_pair(load, monkeypatch):
    text = {"arguments": MINIMAL + "stage: dpo"}
    text["head"] = HEAD.replace("megatron", "torchtitan")
    monkeypatch.setattr(stages, "entries", {})  # of what other tests of this process have run
    with pytest.raises(ConfigError, match="one of sft; others are registered"):
        load(**text)
    monkeypatch.setattr(trainers, "entries", {"(torchtitan, dpo)": print, **trainers.entries})
    config = load(**text)
    assert (config.backend, config.stage) == ("torchtitan", "dpo")


def test_arguments_that_agree_are_accepted(load):
    load(MINIMAL + """\
calculate_per_token_loss: true
context_parallel_size: 1
expert_model_parallel_size: 1
tokenizer_type: HuggingFaceTokenizer
optimizer: adam
trust_remote_code: false
num_experts: null
moe_grouped_gemm: false
mtp_num_layers: 0
cross_entropy_loss_fusion: true
cross_entropy_fusion_impl: te
profile: true
profile_ranks: [0]
wandb_project: sft
lora: {enabled: false, dim: 32}
attention_dropout: 0.0
swiglu: true
""")  # fmt: skip


@pytest.mark.parametrize(
    "line, reason",
    [
        ("calculate_per_token_loss: false", "mean over the supervised tokens"),
        ("lora: true", "a mapping with enabled"),
        ("moe_router_topk: 2", "mixture-of-experts"),
        ("num_experts: 8", "mixture-of-experts"),
        ("fp8_margin: 1", "8-bit"),
        ("moe_router_force_load_balancing: true", "measurements of speed"),
        ("moe_router_dtype: bf16", "routers compute in fp32"),
        ("moe_router_load_balancing_type: sinkhorn", "tokens of a global batch"),
        ("sft_bridge_compat_inline_bos: true", "comparisons with Bridge"),
        ("fp8_param_gather: true", "fp8: hybrid"),
        ("sft_sanitize_nan_grads: 3", "true or false"),
        ("sft_dataset_config: gov_report", "a hub id"),
        ("pipeline_model_parallel_layout: Et*2|m*3L", "ranks or a multiple"),
        ("recompute_granularity: full\nrecompute_method: some", "uniform or block"),
        ("num_layers_per_virtual_pipeline_stage: 2", "virtual_pipeline_model_parallel_size"),
        ("tokenizer_type: Llama2Tokenizer", "Hugging Face"),
        ("optimizer: sgd", "AdamW"),
        ("lr_warmup_fraction: 1.0", "not including, 1"),
        ("lr_warmup_fraction: true", "not including, 1"),
        ("lr_warmup_iters: 5\nlr_warmup_fraction: 0.1", "one of the two"),
        ("load: ckpt", "finetune: false"),
        ("num_layers: 4", "config.json"),
        ("eod_mask_loss: true", "learns to stop"),
        ("use_torch_fsdp2: true", "use_distributed_optimizer"),
        ("main_params_dtype: bf16", "fp32"),
    ],
)
def test_arguments_that_disagree_are_refused_with_the_reason(load, line, reason):
    problem = only_problem(load, MINIMAL + line)
    name = line.splitlines()[-1].split(":")[0]
    assert problem.keys[0].startswith(f"modules.post_trainer.overrides.{name}")
    assert reason in problem.expected
    assert problem.where.endswith(f":{13 + line.count(chr(10))}")


@pytest.mark.parametrize(
    "line",
    ["normalization: LayerNorm", "hidden_dropout: 0.1", "add_qkv_bias: true", "swiglu: false"],
)
def test_architecture_arguments_count_only_for_random_weights(load, line, caplog):
    assert "a Llama" in only_problem(load, SIZES + line).expected
    with caplog.at_level(logging.WARNING):
        load(MINIMAL + line)
    assert line.split(":")[0] in caplog.text


def test_experts_and_8_bits_have_keys_of_ours(load):
    config = load(MINIMAL + "expert_model_parallel_size: 8\nfp8: hybrid\nfp8_recipe: mxfp8")
    assert config.parallel.expert == 8
    assert (config.model.fp8, config.model.fp8_recipe) == ("hybrid", "mxfp8")
    assert load(MINIMAL + "fp8: false").model.fp8 == "none"
    assert "tensorwise" in only_problem(load, MINIMAL + "fp8_recipe: delayed").expected


def test_a_warm_up_can_be_a_fraction_of_the_schedule(load):
    def steps(lines: str) -> int:
        return load(MINIMAL + lines).optim.warmup_steps

    # 0.07 * 100 is 7.000000000000001.
    assert steps("train_iters: 100\nlr_warmup_fraction: 0.07") == 7
    assert steps("train_iters: 100\nlr_decay_iters: 80\nlr_warmup_fraction: 0.25") == 20
    assert steps("lr_warmup_iters: 0\nlr_warmup_fraction: 0.5") == 500
    # Zero is a warm-up too: none, and not the default of lr_warmup_iters.
    assert steps("lr_warmup_fraction: 0") == 0
    problem = only_problem(load, MINIMAL + "train_iters: 10\nlr_warmup_fraction: 0.26")
    assert "which is 2.6" in problem.found and "lr_warmup_iters: 3" in problem.fix


def test_load_resumes_when_finetune_is_off(load):
    assert load(MINIMAL + "load: ckpt\nfinetune: false").checkpoint.resume == "ckpt"


def test_sequence_parallel_means_nothing_without_tensor_parallel(load):
    assert load(MINIMAL + "sequence_parallel: true").parallel.sequence is False


def test_evaluation_needs_data(load, caplog):
    assert load(MINIMAL).evaluation.every_steps is None
    assert "data.eval=" in caplog.text
    config = load(MINIMAL, "data.eval=e.jsonl")
    assert (config.evaluation.every_steps, config.evaluation.max_samples) == (50, 1280)
    assert load(MINIMAL + "eval_iters: 0", "data.eval=e.jsonl").evaluation.every_steps is None


def test_evaluation_asked_for_on_the_command_line_is_not_dropped(load):
    problem = only_problem(load, MINIMAL, "evaluation.every_steps=5")
    assert problem.keys == ("evaluation.every_steps", "data.eval")


def test_overrides_use_our_keys(load):
    config = load(MINIMAL, "optim.lr=3e-4", "train.steps=null", "train.epochs=1")
    assert (config.optim.lr, config.train.epochs) == (3e-4, 1)


def test_all_errors_at_once_with_lines_and_names(load):
    text = MINIMAL + """\
lr_decay_style: exponential
micro_batch_sise: 2
seq_length: "2048"
calculate_per_token_loss: false
train_iters: 20
lr: 1.0e-5
"""  # fmt: skip
    problems = problems_of(load, text)
    found = {(problem.keys[0], problem.where.rpartition(":")[2]) for problem in problems}
    base = "modules.post_trainer.overrides"
    assert found == {
        ("lr_decay_style (optim.decay)", "13"),
        (f"{base}.micro_batch_sise", "14"),
        ("seq_length (packing.capacity)", "15"),
        (f"{base}.calculate_per_token_loss", "16"),
        ("lr_warmup_iters (optim.warmup_steps)", "17"),
    }
    typo = next(problem for problem in problems if "sise" in problem.keys[0])
    assert typo.fix == "did you mean micro_batch_size?"
    warmup = next(problem for problem in problems if "warmup" in problem.keys[0])
    assert "default of sft_trainer.yaml" in warmup.where


def test_missing_weights_point_at_an_unknown_preset(load):
    head = HEAD.replace("llama3_8B", "our_8B")
    problem = only_problem(load, "sft_dataset_name: a.jsonl\ntokenizer_model: t\n", head=head)
    assert problem.keys[0] == "hf_path (model.path)"
    assert problem.where.endswith(":9")


def test_sizes_come_from_the_preset_by_its_name(load, caplog):
    config = load("sft_dataset_name: a.jsonl\nnum_layers: 2\ninit_method_std: 0.01\n")
    assert config.model.path is None
    assert config.model.shape.model_dump() == {
        "hidden_size": 4096,
        "num_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "ffn_hidden_size": 14336,
        "num_experts": 0,
        "experts_per_token": 2,
        "rope_theta": 500000.0,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "initializer_range": 0.01,
    }
    assert config.tokenizer.path == "meta-llama/Meta-Llama-3-8B"
    assert "random weights" in caplog.text


def test_a_preset_that_is_no_llama_asks_for_its_weights(load):
    head = HEAD.replace("llama3_8B", "qwen3_30B_A3B")
    problem = only_problem(load, "sft_dataset_name: a.jsonl", head=head)
    assert problem.keys == ("modules.post_trainer.model",)
    assert problem.fix == "hf_path: Qwen/Qwen3-30B-A3B"


def test_megatron_checkpoint_is_not_read(load, caplog):
    assert load(MINIMAL + "pretrained_checkpoint: x").model.path == "some/model"
    assert "pretrained_checkpoint: not read" in caplog.text
    problem = only_problem(load, "sft_dataset_name: a.jsonl\npretrained_checkpoint: x")
    assert problem.fix == "hf_path: meta-llama/Meta-Llama-3-8B"


LORA = """\
lora:
  enabled: true
  dim: 8
  alpha: 16
  dropout: 0.1
  dropout_position: pre
  lora_A_init_method: xavier
  lora_B_init_method: zero
"""


def test_adapters_of_megatron_matrices_are_those_of_projections(load, caplog):
    lora = load(MINIMAL + LORA + "  target_modules: [linear_qkv, linear_fc2]").lora
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.1)
    assert lora.targets == ["q_proj", "k_proj", "v_proj", "down_proj"]
    assert "q, k and v have an A each" in caplog.text and "xavier" in caplog.text
    pattern = "  target_modules: ['*.layers.0.*.linear_proj', linear_fc1_gate]"
    lora = load(MINIMAL + LORA + pattern).lora
    assert lora.targets == ["*.layers.0.*.o_proj", "gate_proj"]


def test_all_matrices_are_the_default_targets(load):
    every = "  target_modules: [linear_fc1, linear_fc2, linear_proj, linear_qkv]"
    lora = load(MINIMAL + LORA + every).lora
    assert "targets" not in lora.model_fields_set
    lora = load(MINIMAL + "lora: {enabled: true}").lora
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 32.0, 0.0)


def test_latent_attention_is_that_of_the_model(load, caplog):
    text = MINIMAL + "multi_latent_attention: true\nkv_lora_rank: 512\n"
    lora = load(text + LORA + "  target_modules: [linear_qkv, linear_proj, linear_kv_up_proj]").lora
    assert lora.targets == ["o_proj", "kv_b_proj"]
    assert "not used: model, multi_latent_attention, kv_lora_rank" in caplog.text
    problem = only_problem(load, SIZES + "multi_latent_attention: true\nkv_lora_rank: 512\n")
    keys = ("multi_latent_attention", "kv_lora_rank")
    assert problem.keys == tuple(f"modules.post_trainer.overrides.{key}" for key in keys)


def test_losses_of_the_router(load):
    router = load(MINIMAL + "moe_aux_loss_coeff: 0.001\nmoe_z_loss_coeff: 0.01").router
    assert (router.aux_loss_coef, router.z_loss_coef) == (0.001, 0.01)


def test_schedules_as_megatron_spells_them(load):
    text = MINIMAL + "train_iters: 60\nlr_decay_style: "
    optim = load(text + "WSD\nlr_wsd_decay_style: minus_sqrt\nlr_wsd_decay_iters: 7").optim
    assert (optim.decay, optim.wsd_decay, optim.wsd_decay_steps) == ("WSD", "minus_sqrt", 7)
    assert load(text + "inverse-square-root").optim.decay == "inverse-square-root"
    problem = only_problem(load, text + "WSD")
    assert "optim.wsd_decay_steps" in problem.keys
    assert "at most 10" in only_problem(load, text + "WSD\nlr_wsd_decay_iters: 11").expected


def test_weight_decay_that_grows(load):
    text = MINIMAL + "weight_decay_incr_style: cosine\nstart_weight_decay: 0.01\n"
    optim = load(text + "end_weight_decay: 0.1").optim
    assert (optim.weight_decay, optim.end_weight_decay) == (0.01, 0.1)
    assert optim.weight_decay_growth == "cosine"
    assert "without end_weight_decay" in only_problem(load, text).found
    problem = only_problem(load, text + "end_weight_decay: 0.001")
    assert problem.keys[0] == "end_weight_decay (optim.end_weight_decay)"
    problem = only_problem(load, MINIMAL + "end_weight_decay: 0.2")
    assert "weight_decay_incr_style constant" in problem.expected


def test_adapters_that_are_off_say_so(load, caplog):
    assert load(MINIMAL + "lora: {dim: 8}").lora.rank == 0
    assert "enabled is not true" in caplog.text


@pytest.mark.parametrize(
    "line, key, fix",
    [
        ("target_modules: [linear_kqv]", "target_modules", "did you mean linear_qkv?"),
        ("target_modules: [router]", "target_modules", "remove router"),
        ("target_modules: linear_qkv", "target_modules", ""),
        ("dropout_position: post", "dropout_position", "remove dropout_position"),
        ("lora_B_init_method: xavier", "lora_B_init_method", "remove lora_B_init_method"),
        ("rank: 8", "rank", "remove rank"),
        ("enabled: maybe", "enabled", ""),
    ],
)
def test_adapters_that_are_not_ours(load, line, key, fix):
    text = (
        LORA if key not in LORA else LORA.replace(next(r for r in LORA.split("\n") if key in r), "")
    )
    problem = only_problem(load, f"{MINIMAL}{text}  {line}\n")
    assert problem.keys == (f"modules.post_trainer.overrides.lora.{key}",)
    assert problem.fix == fix


def test_packed_samples_are_isolated_whatever_the_file_says(load, caplog):
    config = load(MINIMAL + "enable_packed_sequences: true\nuse_packed_attention: false")
    assert config.packing.strategy == "auto"
    assert "never see each other" in caplog.text


@pytest.mark.parametrize(
    "line, note",
    [
        ("use_precision_aware_optimizer: true\nmain_grads_dtype: bf16", "states are fp32"),
        ("exp_avg_dtype: bf16", "exp_avg_dtype: gradients and optimizer states are fp32"),
        ("grad_reduce_in_bf16: true", "reduced in fp32"),
        ("moe_permute_fusion: true", "no effect on the weights, not used: moe_permute_fusion"),
        ("HSA_NO_SCRATCH_RECLAIM: 1", "which no file sets: HSA_NO_SCRATCH_RECLAIM"),
        ("fp8: hybrid\nfp8_param_gather: true", "gathered in bf16"),
        ("recompute_num_layers: 8", "no effect without recompute_granularity full"),
    ],
)
def test_what_has_no_effect_is_named(load, line, note, caplog):
    load(MINIMAL + line)
    assert note in caplog.text


def test_recomputation_has_a_granularity_and_a_method(load):
    text = MINIMAL + "recompute_granularity: full\nrecompute_num_layers: 1\n"
    assert load(text + "recompute_method: uniform").model.recompute == "full"
    model = load(text + "recompute_method: block").model
    assert (model.recompute, model.recompute_layers) == ("block", 1)
    text = MINIMAL + "recompute_granularity: selective\nrecompute_modules: [layernorm, moe_act]"
    model = load(text).model
    assert (model.recompute, model.recompute_modules) == ("selective", ["norm", "activation"])


def test_layout_of_the_pipeline(load):
    text = MINIMAL + "pipeline_model_parallel_size: 2\npipeline_model_parallel_layout: "
    assert load(text + "Et*4|t*4L").parallel.virtual_pipeline == 1
    uneven = load(text + "Et*2|t*3|t*3|t*2L").parallel
    assert (uneven.virtual_pipeline, uneven.stage_layers) == (2, [2, 3, 3, 2])
    assert load(text + "Ett|t*2|tt|t*2,L").parallel.virtual_pipeline == 2


def test_gradients_that_are_not_finite_never_end_a_sanitized_run(load, caplog):
    assert load(MINIMAL + "sft_sanitize_nan_grads: true\ntrain_iters: 77").guard.max_skips == 77
    assert "left out as a whole" in caplog.text


def test_context_parallel_samples_are_aligned(load):
    assert load(MINIMAL + "context_parallel_size: 4").packing.alignment == 8


def test_conversation_formats_bring_their_prompt(load):
    config = load(MINIMAL)
    assert (config.data.format, config.tokenizer.chat_template) == ("alpaca", "alpaca")
    config = load(MINIMAL + "sft_conversation_format: hf_chat")
    assert (config.data.format, config.tokenizer.chat_template) == ("auto", None)
    config = load(MINIMAL + "sft_conversation_format: squad")
    assert (config.data.format, config.tokenizer.chat_template) == ("squad", None)


def test_part_of_a_dataset(load):
    text = "hf_path: m\nsft_dataset_name: tau/scrolls\nsft_dataset_config: gov_report"
    assert load(text).data.train == "tau/scrolls:gov_report"


def test_a_file_extends_others(tmp_path, load, caplog):
    load(MINIMAL + "lr: 1e-5\nlora: {enabled: false, dim: 4}")
    above = tmp_path / "lora.yaml"
    above.write_text("extends: [primus.yaml]\nlr: 2e-4\nlora:\n  enabled: true\n  alpha: 1x\n")
    problem = only_problem(load_config, above, [])
    assert problem.keys == ("lora.alpha (lora.alpha)",)
    assert problem.where == f"{above}:5"
    above.write_text("extends: primus.yaml\nexp_name: b\nlr: 2e-4\nlora: {enabled: true}\n")
    config = load_config(above, [])
    assert (config.optim.lr, config.lora.rank) == (2e-4, 4)
    assert config.output_dir == "output/amd/someone/b"
    assert "taken as overrides of the module: lr, lora" in caplog.text
    above.write_text("extends: primus.yaml\nlearning_rate: 2e-4\n")
    assert only_problem(load_config, above, []).keys == ("learning_rate",)
    above.write_text("extends: lora.yaml\n")
    assert "extends this file" in only_problem(load_config, above, []).found
    above.write_text("extends: [3]\n")
    assert only_problem(load_config, above, []).keys == ("extends",)


def test_missing_sizes_have_their_megatron_names(load):
    text = "num_layers: 2\nhidden_size: 64\nsft_dataset_name: a.jsonl\ntokenizer_model: t\n"
    head = HEAD.replace("llama3_8B", "our_8B")
    problems = problems_of(load, text, head=head)
    keys = {problem.keys[0].split()[0] for problem in problems}
    assert keys == {"ffn_hidden_size", "num_attention_heads", "num_query_groups"}


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("    framework: megatron\n", "", "modules.post_trainer.framework"),
        ("sft_trainer.yaml", "pre_trainer.yaml", "modules.post_trainer.config"),
        ("    model:", "    modle:", "modules.post_trainer.modle"),
        ("workspace:", "workspaces:", "workspaces"),
        ("work_group: amd", "extends: [a.yaml]", "extends"),
        ("workspace: ./output", "optim: {lr: 1e-3}", "optim"),
        ("  post_trainer:", "  pre_trainer: {}\n  post_trainer:", "modules"),
    ],
)
def test_frame_of_the_file_is_checked(load, old, new, key):
    assert only_problem(load, MINIMAL, head=HEAD.replace(old, new, 1)).keys == (key,)


@pytest.mark.parametrize("modules", ["null", "[]", "{}", "x", "{a: null}", "{a: [1]}"])
def test_modules_that_are_none(tmp_path, modules):
    path = tmp_path / "primus.yaml"
    path.write_text(f"modules: {modules}\n")
    assert only_problem(load_config, path, []).keys[0].startswith("modules")


@pytest.mark.parametrize("value", ["3", "[1]", "x"])
def test_overrides_that_are_no_mapping(tmp_path, value):
    path = tmp_path / "primus.yaml"
    path.write_text(HEAD.rstrip() + f" {value}\n")
    assert "modules.post_trainer.overrides" in problems_of(load_config, path, [])[0].keys


@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "maybe", "2.5"])
@pytest.mark.parametrize("name", sorted({*tables.TARGETS, *tables.SIZES, *tables.COMBINED}))
def test_no_value_of_any_argument_escapes_as_another_error(load, name, value):
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(name))
    try:
        load(f"{text}\n{name}: {value}\n", "data.eval=e.jsonl")
    except ConfigError as error:
        assert name in str(error)


def test_environment_variables(load, monkeypatch):
    monkeypatch.delenv("PRIMUS_TP", raising=False)
    monkeypatch.setenv("PRIMUS_MBS", "4")
    monkeypatch.setenv("PRIMUS_LR", "2e-5")
    monkeypatch.setenv("PRIMUS_NAME", "tiny")
    config = load(MINIMAL + """\
tensor_model_parallel_size: ${PRIMUS_TP:2}
micro_batch_size: "${PRIMUS_MBS:1}"
lr: ${PRIMUS_LR}
save: ${PRIMUS_ROOT:./out}/${PRIMUS_NAME}/x
""")  # fmt: skip
    assert (config.parallel.tensor, config.train.micro_batch_size) == (2, 4)
    assert config.optim.lr == 2e-5
    assert config.output_dir == "./out/tiny/x"


def test_environment_variable_that_is_not_set(load, monkeypatch):
    monkeypatch.delenv("PRIMUS_TP", raising=False)
    problems = problems_of(load, MINIMAL + "tensor_model_parallel_size: ${PRIMUS_TP}")
    assert "${PRIMUS_TP}, which is not set" in problems[0].found
    assert problems[0].where.endswith(":13")


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD"])
def test_secrets_of_the_environment_are_never_read(load, monkeypatch, name):
    monkeypatch.setenv(name, "value-of-the-secret")
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL + f"wandb_project: ${{{name}}}")
    assert name in str(caught.value)
    assert "value-of-the-secret" not in str(caught.value)


def test_environment_value_is_data_not_yaml_structure(load, monkeypatch):
    monkeypatch.setenv("PRIMUS_NAME", "{a: 1}")
    assert load(MINIMAL + "save: ${PRIMUS_NAME}").output_dir == "{a: 1}"


def test_our_files_expand_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMUS_NAME", "x")
    path = tmp_path / "ours.yaml"
    path.write_text("model: {path: m}\ndata: {train: '${PRIMUS_NAME}'}\ntrain: {steps: 1}\n")
    assert load_config(path, []).data.train == "${PRIMUS_NAME}"


def test_no_argument_is_in_two_tables():
    names = [
        *tables.TARGETS,
        *tables.SIZES,
        *tables.DETAILS,
        *tables.ARCHITECTURE,
        *tables.FIXED,
        *tables.OFF,
        *tables.IGNORED,
        *tables.COMBINED,
        *tables.NOTED,
        *tables.LATENT,
    ]
    assert len(names) == len(set(names))


def test_every_target_is_a_key_of_ours():
    known = set(dotted_keys(Config))
    for table in (tables.TARGETS, tables.SIZES, tables.DETAILS):
        assert {target.key for target in table.values()} <= known


def test_shipped_example_says_what_it_means():
    root = Path(__file__).parents[2]
    config = load_config(root / "sft_fast/recipes/primus_style.yaml", [])
    assert (config.backend, config.stage) == ("megatron", "sft")
    assert config.packing.strategy == "auto"
    assert config.train.steps == 200


OWN = """\
output_dir: out
model: {path: some/model}
tokenizer: {chat_template: alpaca}
data: {train: data.jsonl, format: alpaca}
packing: {capacity: 256}
train: {steps: 30, global_batch_size: 4}
parallel: {timeout_minutes: 60}
lora: {rank: 4, alpha: 8.0, dropout: 0.1, targets: [q_proj, k_proj, v_proj, down_proj]}
optim: {lr: 1.0e-3, warmup_steps: 5, decay: WSD, wsd_decay_steps: 9}
guard: {max_skips: 30}
checkpoint: {every_steps: 100}
"""
SAME = """\
hf_path: some/model
save: out
sft_dataset_name: data.jsonl
enable_packed_sequences: true
use_packed_attention: false
seq_length: 256
train_iters: 30
global_batch_size: 4
lr: 1.0e-3
lr_warmup_iters: 5
lr_decay_style: WSD
lr_wsd_decay_iters: 9
HSA_NO_SCRATCH_RECLAIM: 1
sft_sanitize_nan_grads: true
exp_avg_dtype: bf16
lora: {enabled: true, dim: 4, alpha: 8, dropout: 0.1, target_modules: [linear_qkv, linear_fc2]}
"""


def test_a_run_is_that_of_our_own_keys(load, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    # What a run computes is a function of its configuration.
    assert load(SAME).model_dump() == load_config(path, []).model_dump()


BRIDGE = """\
modules:
  post_trainer:
    framework: megatron_bridge
    config: sft_trainer.yaml
    model: qwen3_8b.yaml
    overrides:
      train_iters: 200
      global_batch_size: 128
      micro_batch_size: 1
      seq_length: 2048
      finetune_lr: 1.0e-4
      lr_warmup_iters: 50
      precision_config: bf16_mixed
      packed_sequence: true
      peft: lora
      comm_overlap_config: {a: 1}
peft: {dim: 16, alpha: 32}
"""


@pytest.fixture
def bridge(tmp_path):
    def load_bridge(old: str = "", new: str = "") -> Config:
        path = tmp_path / "bridge.yaml"
        path.write_text(BRIDGE.replace(old, new) if old else BRIDGE)
        return load_config(path, [])

    return load_bridge


def test_files_for_bridge_that_say_enough(bridge, caplog):
    config = bridge()
    assert (config.backend, config.model.dtype, config.optim.lr) == ("megatron", "bf16", 1e-4)
    assert (config.model.path, config.data.train) == ("Qwen/Qwen3-8B", "rajpurkar/squad")
    assert (config.data.format, config.tokenizer.chat_template) == ("auto", None)
    assert (config.packing.strategy, config.packing.capacity) == ("auto", 2048)
    assert (config.lora.rank, config.lora.alpha) == (16, 32.0)
    assert "finetune_lr as lr" in caplog.text and "comm_overlap_config" in caplog.text
    assert "of the recipe in Megatron-Bridge; here weight_decay 0.1, adam_beta2 0.95" in caplog.text
    config = bridge("qwen3_8b.yaml", "llama3_8b.yaml")
    assert config.model.path == "NousResearch/Meta-Llama-3-8B"
    assert bridge("peft: lora", "peft: none").lora.rank == 0
    assert bridge("bf16_mixed", "fp16_mixed").model.dtype == "fp16"


@pytest.mark.parametrize(
    "old, new, key, fix",
    [
        ("peft: {dim: 16, alpha: 32}", "", "overrides.peft", "add peft_dim and peft_alpha"),
        ("peft: {dim: 16", "peft: {rank: 16", "peft", ""),
        ("peft: lora", "peft: dora", "overrides.peft", ""),
        ("seq_length: 2048", "seed: 1", "overrides.seq_length", "add seq_length"),
        ("finetune_lr: 1.0e-4", "seed: 1", "overrides.finetune_lr", "add finetune_lr"),
        ("qwen3_8b", "mamba_370M", "model", "add hf_path"),
        ("bf16_mixed", "fp4_mixed", "overrides.precision_config", ""),
        ("peft: {", "model: {moe_router_force_load_balancing: true}\npeft: {", "", ""),
        (
            "peft: lora",
            "peft: lora\n      dataset_type: mlperf_dataset",
            "overrides.dataset_type",
            "",
        ),
    ],
)
def test_files_for_bridge_that_leave_it_to_the_recipe(bridge, old, new, key, fix):
    problems = problems_of(bridge, old, new)
    key = f"modules.post_trainer.{key}" if key != "peft" else key
    problem = next(problem for problem in problems if problem.keys[0].startswith(key))
    assert problem.fix.startswith(fix)
    # Without weights that are known there is no data that is known either.
    assert len(problems) == (2 if "mamba" in new else 1)


def test_every_key_is_in_the_table_of_the_docs():
    text = (Path(__file__).parents[2] / "docs/moving.md").read_text()
    native = text.partition("## Primus (native")[2].partition("\n## ")[0]
    everything = [*primus.KNOWN, *LORA_KEYS, *tables.LORA_TARGETS, *PRESETS]
    names = {name.rpartition("lora.")[2] for name in re.findall(r"`([\w.]+)`", native)}
    assert [name for name in everything if name not in names] == []
    section = text.partition("## Primus (`framework: megatron_bridge`)")[2].partition("\n## ")[0]
    bridge = [*primus_bridge.KEYS, *primus_bridge.MODELS, *primus_bridge.NEEDED[:4]]
    assert [name for name in bridge if f"`{name}`" not in section] == []
    targets = {**tables.TARGETS, **tables.SIZES, **tables.DETAILS}
    rows = [line for line in native.splitlines() if line.startswith("|")]
    for name, target in targets.items():
        assert any(row.startswith(f"| `{name}` | `{target.key}` |") for row in rows), name
