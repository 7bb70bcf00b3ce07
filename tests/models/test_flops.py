from dataclasses import replace

import pytest

from sft_fast.models.architecture import Architecture
from sft_fast.models.flops import (
    Workload,
    active_matrix_parameters,
    adapter_parameters,
    forward_flops,
    num_parameters,
    training_flops,
)
from sft_fast.models.hardware import GPUS, find_gpu

LLAMA3_8B = Architecture(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    ffn_hidden_size=14336,
    head_dim=128,
    max_position_embeddings=8192,
)
# Parameters as their model cards and safetensors indices give them.
PUBLISHED = [
    (LLAMA3_8B, 8_030_261_248),
    (
        replace(
            LLAMA3_8B,
            hidden_size=8192,
            num_layers=80,
            num_attention_heads=64,
            ffn_hidden_size=28672,
        ),
        70_553_706_496,
    ),
    (
        # Llama 2 7B
        replace(LLAMA3_8B, vocab_size=32000, num_key_value_heads=32, ffn_hidden_size=11008),
        6_738_415_616,
    ),
    (
        # Mistral 7B v0.1
        replace(LLAMA3_8B, vocab_size=32000),
        7_241_732_096,
    ),
    (
        # Qwen2.5 0.5B
        Architecture(
            *(151936, 896, 24, 14, 2, 4864, 64, 32768),
            tie_word_embeddings=True,
            family="Qwen2ForCausalLM",
        ),
        494_032_768,
    ),
    (
        # Qwen3 8B
        Architecture(*(151936, 4096, 36, 32, 8, 12288, 128, 40960), family="Qwen3ForCausalLM"),
        8_190_735_360,
    ),
    (
        # Qwen1.5 MoE A2.7B
        Architecture(
            *(151936, 2048, 24, 16, 16, 1408, 128, 8192),
            num_experts=60,
            shared_ffn_size=5632,
            family="Qwen2MoeForCausalLM",
        ),
        14_315_784_192,
    ),
    (
        # DeepSeek V2 Lite
        Architecture(
            *(102400, 2048, 27, 16, 16, 1408, 192, 163840),
            num_experts=64,
            shared_ffn_size=2816,
            dense_layers=frozenset([0]),
            dense_ffn_size=10944,
            kv_rank=512,
            rope_dim=64,
            value_head_dim=128,
            family="DeepseekV2ForCausalLM",
        ),
        15_706_484_224,
    ),
    (
        # DeepSeek V3, without its layer for multi-token prediction
        Architecture(
            *(129280, 7168, 61, 128, 128, 2048, 192, 163840),
            num_experts=256,
            shared_ffn_size=2048,
            dense_layers=frozenset(range(3)),
            dense_ffn_size=18432,
            kv_rank=512,
            query_rank=1536,
            rope_dim=64,
            value_head_dim=128,
            options=frozenset(["q_lora_rank"]),
            family="DeepseekV3ForCausalLM",
        ),
        671_026_404_352,
    ),
    (
        # Mixtral 8x7B
        Architecture(
            *(32000, 4096, 32, 32, 8, 14336, 128, 32768),
            num_experts=8,
            family="MixtralForCausalLM",
        ),
        46_702_792_704,
    ),
    (
        # Qwen3 30B-A3B
        Architecture(
            *(151936, 2048, 48, 32, 4, 768, 128, 40960),
            num_experts=128,
            family="Qwen3MoeForCausalLM",
        ),
        30_532_122_624,
    ),
    (
        # Gemma 2 2B
        Architecture(
            *(256000, 2304, 26, 8, 4, 9216, 256, 8192),
            tie_word_embeddings=True,
            family="Gemma2ForCausalLM",
        ),
        2_614_341_888,
    ),
    (
        # SmolLM2 135M
        Architecture(*(49152, 576, 30, 9, 3, 1536, 64, 8192), tie_word_embeddings=True),
        134_515_008,
    ),
]


@pytest.mark.parametrize(("architecture", "expected"), PUBLISHED)
def test_published_models_have_their_published_parameters(
    architecture: Architecture, expected: int
) -> None:
    assert num_parameters(architecture) == expected


def test_flops_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    length, a = 24, Architecture(101, 32, 3, 4, 2, 48, 8, 64)
    config = LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_key_value_heads,
        intermediate_size=a.ffn_hidden_size,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    tokens = torch.arange(length)[None]
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(tokens).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    # Eager attention computes the masked half as well, and the head on every token.
    workload = Workload(length, 2 * length**2, length)
    assert forward_flops(a, workload) == forward
    assert training_flops(a, workload) == counter.get_total_flops()


def test_an_8b_step_costs_what_six_n_says_when_all_tokens_train() -> None:
    workload = Workload(tokens=8192, squares=0, supervised=8192)
    matrices = num_parameters(LLAMA3_8B) - LLAMA3_8B.vocab_size * LLAMA3_8B.hidden_size
    assert training_flops(LLAMA3_8B, workload) == pytest.approx(6 * matrices * 8192, rel=1e-3)


def test_lora_saves_the_weight_gradients_of_frozen_matrices_only() -> None:
    no_attention = Workload(tokens=100, squares=0, supervised=10)
    assert training_flops(LLAMA3_8B, no_attention, lora=True) == pytest.approx(
        training_flops(LLAMA3_8B, no_attention) * 2 / 3
    )
    attention = Workload(tokens=0, squares=10**6, supervised=0)
    assert training_flops(LLAMA3_8B, attention, lora=True) == training_flops(LLAMA3_8B, attention)


def test_adapters_have_the_parameters_that_peft_counts() -> None:
    # Llama 3 8B, r = 16, all seven projections: the figure of PEFT's print_trainable_parameters.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert adapter_parameters(LLAMA3_8B, 16, targets) == 41_943_040
    assert adapter_parameters(LLAMA3_8B, 8, ["q_proj", "v_proj"]) == 3_407_872


def test_adapters_are_counted_where_the_pattern_puts_them() -> None:
    only_two_layers = ["model.layers.[34].self_attn.q_proj"]
    assert adapter_parameters(LLAMA3_8B, 8, only_two_layers) == 2 * 8 * (4096 + 4096)
    mixtral = PUBLISHED[-4][0]
    assert adapter_parameters(mixtral, 8, ["*_proj"]) == adapter_parameters(
        LLAMA3_8B, 8, ["self_attn.*", "[qkvo]_proj"]
    )
    of_experts = adapter_parameters(mixtral, 8, "all-linear", of_experts=True)
    assert of_experts == 32 * 8 * 3 * 8 * (4096 + 14336)
    assert adapter_parameters(mixtral, 8, ["*_proj"], of_experts=True) == 0


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI355X OAM", "MI355X"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA B200", "B200"),
        ("MI325X", "MI325X"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA GB200", None),
    ],
)
def test_gpus_are_found_by_the_names_of_their_drivers(device: str, name: str | None) -> None:
    found = find_gpu(device)
    assert (found and found.name) == name
    assert found is None or GPUS[found.name] is found


def test_a_token_meets_its_own_experts_only() -> None:
    """Mixtral 8x7B: 12.9 billion of 46.7 are active (its paper, arXiv 2401.04088, section 2)."""
    mixtral = replace(PUBLISHED[-4][0], experts_per_token=2)
    assert mixtral.num_experts == 8
    embeddings = 2 * mixtral.vocab_size * mixtral.hidden_size
    active = active_matrix_parameters(mixtral) + embeddings
    assert active == pytest.approx(12.9e9, rel=0.005)
    workload = Workload(tokens=100, squares=0, supervised=0)
    expected = 2 * 100 * active_matrix_parameters(mixtral)
    assert forward_flops(mixtral, workload) == expected
