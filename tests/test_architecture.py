"""config.json to architecture: what is understood, and what is refused instead of miscomputed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_fast.architecture import (
    FAMILIES,
    architecture_from_hf,
    architecture_to_hf,
    read_hf_config,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
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
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": LLAMA31_ROPE | {"low_freq_factor": 2.0}}, "low_freq_factor"),
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
    assert architecture_from_hf(old).rope_scaling_factor == 32.0
    assert architecture_from_hf(LLAMA | {"rope_theta": 7.0}).rope_theta == 7.0


def test_a_written_config_reads_back_as_the_same_architecture() -> None:
    plain = architecture_from_hf(LLAMA)
    scaled = replace(plain, rope_scaling_factor=8.0, tie_word_embeddings=True, head_dim=16)
    for architecture in (plain, scaled):
        assert architecture_from_hf(architecture_to_hf(architecture)) == architecture


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    architecture = architecture_from_hf(LLAMA)
    assert architecture.num_key_value_heads == 4
    assert architecture.head_dim == 8
    assert not architecture.tie_word_embeddings


def test_a_window_that_is_switched_off_does_not_count() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert architecture_from_hf(mistral).sliding_window == 4096
    qwen = mistral | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
    assert architecture_from_hf(qwen).sliding_window is None
    assert set(FAMILIES) >= {"LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"}


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
