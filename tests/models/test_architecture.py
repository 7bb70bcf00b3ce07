"""config.json to architecture: what is understood, and what is refused instead of miscomputed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_fast.config.sections import ShapeConfig
from sft_fast.models.architecture import (
    NUM_EXPERTS,
    architecture_from_hf,
    architecture_from_shape,
    architecture_to_hf,
    read_hf_config,
)
from sft_fast.models.families import FAMILIES
from sft_fast.models.rope import RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported: LlamaForCausalLM"),
        ({"architectures": None}, "missing"),
        ({"architectures": ["GptOssForCausalLM"]}, "sinks and experts in MXFP4 are not supported"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "text model alone"),
        (
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "num_experts": 4,
                "mlp_only_layers": [0],
                "decoder_sparse_step": 3,
            },
            "no layer has experts .*decoder_sparse_step",
        ),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 0},
            "decoder_sparse_step is 0; expected a whole number above 0",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "num_experts is missing"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "num_experts_per_tok is missing"),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "num_experts_per_tok": 2,
                "topk_method": "random",
            },
            "topk_method is 'random'",
        ),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}}, "lacks"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear lacks 'factor'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.5}},
            "attention_factor of rotary scaling yarn is 0.5",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_local_base_freq": 1e4},
            "yarn is not supported in a model whose layers with a sliding window",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "sliding"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture_from_hf(LLAMA | change)


def test_old_and_new_spelling_of_rope_mean_the_same() -> None:
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE}
    new = LLAMA | {"rope_parameters": LLAMA31_ROPE | {"rope_theta": 5e5}}
    assert architecture_from_hf(old) == architecture_from_hf(new)
    assert architecture_from_hf(old).rope_scaling == RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    assert architecture_from_hf(LLAMA | {"rope_theta": 7.0}).rope_theta == 7.0


def test_a_written_config_reads_back_as_the_same_architecture() -> None:
    plain = architecture_from_hf(LLAMA)
    for architecture in (plain, replace(plain, tie_word_embeddings=True, head_dim=16)):
        assert architecture_from_hf(architecture_to_hf(architecture)) == architecture
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 24}
    shape = ShapeConfig(num_key_value_heads=2, num_experts=4, experts_per_token=3, **sizes)
    mixture = architecture_from_shape(shape, 100)
    assert (mixture.family, mixture.experts_per_token) == ("MixtralForCausalLM", 3)
    assert architecture_from_hf(architecture_to_hf(mixture)) == mixture
    assert architecture_from_shape(shape.model_copy(update={"num_experts": 0}), 100).family == (
        "LlamaForCausalLM"
    )


MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "SmolLM3ForCausalLM": "smollm3",
}
BARE = {
    "vocab_size": 100,
    "hidden_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(name: str) -> None:
    from transformers import AutoConfig

    bare: dict[str, Any] = {"architectures": [name], **BARE}
    family = FAMILIES[name]
    if family.experts_of is not None and not family.defaults.keys() & {*NUM_EXPERTS}:
        bare["num_local_experts"] = 8
    if name == "DeepseekV2ForCausalLM":
        bare["num_experts_per_tok"] = 2
    full = AutoConfig.for_model(MODEL_TYPES[name], **bare).to_dict()
    assert architecture_from_hf(bare) == architecture_from_hf(full)
    # Half a description of the rotary positions too.
    half = bare | {"rope_parameters": {"rope_type": "default"}}
    if name != "Gemma3ForCausalLM":
        assert architecture_from_hf(half) == architecture_from_hf(full)


def test_a_size_is_never_guessed() -> None:
    short = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="hidden_size is missing"):
        architecture_from_hf(short)


def test_null_is_no_missing_key() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert architecture_from_hf(mistral).sliding_window == 4096
    off = {"sliding_window": None, "num_key_value_heads": None, "head_dim": None}
    architecture = architecture_from_hf(mistral | off)
    assert architecture.sliding_window is None
    assert architecture.num_key_value_heads == 4
    assert architecture.head_dim == 8


def test_keys_of_other_families_do_not_count() -> None:
    """Mistral in transformers reads neither."""
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 4}
    for key, value in (("layer_types", ["full_attention"] * 2), ("use_sliding_window", False)):
        assert architecture_from_hf(mistral | {key: value}) == architecture_from_hf(mistral)


def test_two_spellings_of_rope_that_differ_are_read_as_transformers_reads_them() -> None:
    from transformers import AutoConfig

    both = LLAMA | {
        "rope_theta": 7.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
    }
    read = AutoConfig.for_model("llama", **both)
    theirs = {"rope_parameters": read.rope_parameters}
    assert read.rope_parameters["rope_type"] == "linear"
    assert architecture_from_hf(both) == architecture_from_hf(LLAMA | theirs)


def test_a_window_that_is_switched_off_does_not_count() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert architecture_from_hf(mistral).sliding_window == 4096
    qwen = mistral | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
    assert architecture_from_hf(qwen).sliding_window is None
    assert set(FAMILIES) >= {"LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"}


def test_layers_without_positions_are_every_fourth_unless_they_are_listed() -> None:
    smollm = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 9}
    assert architecture_from_hf(smollm).layers_without_rope == {3, 7}
    assert architecture_from_hf(smollm | {"no_rope_layer_interval": 3}).layers_without_rope == {
        *(2, 5, 8)
    }
    listed = architecture_from_hf(smollm | {"no_rope_layers": [1, 0, *[1] * 7]})
    assert listed.layers_without_rope == {1}
    assert not architecture_from_hf(LLAMA).layers_without_rope


def test_yarn_sharpens_the_scores_of_latent_attention() -> None:
    """DeepSeek-V2-Lite: 192 ** -0.5 times (0.1 * 0.707 * ln 40 + 1) ** 2, tables as they are."""
    deepseek: dict[str, Any] = LLAMA | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    }
    lite = architecture_from_hf(deepseek)
    assert lite.attention_scale == pytest.approx(0.1147213867929261)
    assert lite.rope_scaling is not None and lite.rope_scaling.attention_factor == 1.0
    assert (lite.head_dim, lite.value_dim, lite.query_rank) == (192, 128, 0)
    assert "self_attention.linear_q_proj.weight" in lite.layer
    wide = architecture_from_hf(deepseek | {"q_lora_rank": 16, "rope_scaling": None})
    assert wide.attention_scale == 192**-0.5
    assert "self_attention.linear_q_up_proj.weight" in wide.layer


def test_gemma_as_the_hub_has_it() -> None:
    gemma: dict[str, Any] = LLAMA | {
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 7,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
    }
    architecture = architecture_from_hf(gemma)
    assert architecture.tie_word_embeddings
    assert architecture.attention_scale == 0.25
    assert (architecture.rope_theta, architecture.local_rope_theta) == (1e6, 1e4)
    windows = [architecture.window(layer) for layer in range(7)]
    assert windows == [512, 512, None, 512, 512, None, 512]
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    new = {
        "sliding_window_pattern": None,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": rope | {"rope_theta": 1e4},
        },
    }
    assert architecture_from_hf(gemma | new) == architecture


def test_soft_caps_count_only_where_transformers_reads_them() -> None:
    capped = LLAMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    assert architecture_from_hf(capped) == architecture_from_hf(LLAMA)
    gemma = {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}
    architecture = architecture_from_hf(capped | gemma)
    assert (architecture.attention_softcap, architecture.logit_softcap) == (50.0, 30.0)
    assert architecture.attention_scale == 1 / 16  # of transformers' query_pre_attn_scalar
    assert architecture.embedding_scale == 32**0.5
    assert architecture.has_zero_centered_norms


def test_a_broken_config_json_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json"):
        read_hf_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text('{"vocab_size": 100,\n oops}')
    with pytest.raises(ValueError, match="config.json:2"):
        read_hf_config(tmp_path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="JSON object"):
        read_hf_config(tmp_path)


@pytest.mark.fault("F36")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "32000"}, "vocab_size is '32000'; expected a whole number above 0"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    ],
)
def test_odd_values_of_a_config_json_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture_from_hf(LLAMA | change)
    missing = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    with pytest.raises(ValueError, match="vocab_size is missing"):
        architecture_from_hf(missing)
