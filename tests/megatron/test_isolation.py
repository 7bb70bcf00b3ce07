"""Samples of a pack know nothing of each other, in every family: each is what it is alone."""

from typing import Any

import pytest

from rank_pool import RankPool
from sft_fast.models.families import FAMILIES
from tiny import VOCAB_SIZE, make_config, make_store, random_samples

NUM_SAMPLES, PADDING = 3, 3
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 5}
# Positions that depend on the length of a sample must not on that of the pack.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 3.0, 5.0, 9.0, 1.0, 3.0, 5.0, 9.0],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": WINDOW,
    "Qwen2MoeForCausalLM": {
        **EXPERTS,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "Qwen3MoeForCausalLM": EXPERTS,
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": {**LATENT, **GROUPS, "q_lora_rank": 20},
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
    },
    "Glm4MoeLiteForCausalLM": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "MixtralForCausalLM": {"num_local_experts": 4, **WINDOW},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "Gemma2ForCausalLM": {"attn_logit_softcapping": 2.0, **WINDOW},
    "Gemma3ForCausalLM": {"sliding_window_pattern": 2, **WINDOW},
    "Phi3ForCausalLM": {
        "original_max_position_embeddings": 20,
        "rope_parameters": LONGROPE,
        **WINDOW,
    },
    "SmolLM3ForCausalLM": {"no_rope_layer_interval": 2},
}
"""What sets a family's layers apart, where COMMON does not have it."""


def measure(families: list[str]) -> dict[str, Any]:
    """Of each family and sample: what it has in a pack, beside what it has alone."""
    from sft_fast.megatron.parallel import init_parallel

    config = make_config()
    parallel = init_parallel(config.parallel, config.train, config.seed)
    return {name: measure_family(name, config, parallel) for name in families}


def measure_family(family: str, config: Any, parallel: Any) -> list[dict[str, Any]]:
    import torch

    from sft_fast.megatron.attention.core import PackedAttention
    from sft_fast.megatron.attention.flex import load_flex
    from sft_fast.megatron.hf import RandomSource, load_hf_weights
    from sft_fast.megatron.model import build_model
    from sft_fast.models.architecture import architecture_from_hf

    options = {"architectures": [family], **COMMON, **OPTIONS.get(family, {})}
    architecture = architecture_from_hf(options)
    (model,) = build_model(
        architecture, config.model, config.parallel, config.lora, config.loss, parallel
    )
    load_hf_weights(model, RandomSource(architecture, 1), architecture, parallel)
    samples = random_samples(NUM_SAMPLES, seed=4, longest=30)
    lengths = [len(ids) for ids, _ in samples]
    others = [([(token + 1) % VOCAB_SIZE for token in ids], bits) for ids, bits in samples]
    kinds = {type(module).__name__ for module in model.modules()}
    results: list[dict[str, Any]] = []
    for number in range(NUM_SAMPLES):
        own = slice(sum(lengths[:number]), sum(lengths[: number + 1]))
        loss, inputs, weights = loss_and_gradients(model, samples, number)
        alone, inputs_alone, weights_alone = loss_and_gradients(
            model, samples[number : number + 1], 0
        )
        outside = inputs.clone()
        outside[own] = 0
        results.append(
            {
                "loss": (loss.item(), alone.item()),
                "gradients": [
                    (inputs[own].numpy(), inputs_alone[: lengths[number]].numpy()),
                    *((a.numpy(), b.numpy()) for a, b in zip(weights, weights_alone, strict=True)),
                ],
                "outside": int(outside.count_nonzero()),
                "kinds": kinds,
            }
        )
    # FlexAttention has no backward pass on a CPU: other samples' tokens must not move a bit.
    for module in model.modules():
        if isinstance(module, PackedAttention):
            module.attend = load_flex()
    with torch.no_grad():
        for number, result in enumerate(results):
            changed = [*others[:number], samples[number], *others[number + 1 :]]
            result["flex"] = [loss_of(model, rows, number).item() for rows in (samples, changed)]
    return results


def loss_of(model: Any, samples: list[tuple[list[int], list[int]]], number: int) -> Any:
    """The loss of one sample, summed over its tokens, in a pack with all of them."""
    from sft_fast.megatron.forward_step import packed_samples
    from sft_fast.packing.micro_batch import fill_micro_batch

    store = make_store(
        [(ids, bits if i == number else [0] * len(ids)) for i, (ids, bits) in enumerate(samples)]
    )
    num_tokens = int(store.lengths.sum()) + PADDING
    batch = fill_micro_batch(store, list(range(len(samples))), num_tokens)
    return model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=packed_samples(batch),
    ).sum()


def loss_and_gradients(
    model: Any, samples: list[tuple[list[int], list[int]]], number: int
) -> tuple[Any, Any, list[Any]]:
    """`loss_of`, and its gradients: of the embedded tokens [T, h] and of all weights."""
    import torch

    embedded: list[Any] = []
    hook = model.embedding.register_forward_hook(lambda *call: embedded.append(call[2]))
    loss = loss_of(model, samples, number)
    hook.remove()
    inputs, *weights = torch.autograd.grad(loss, [*embedded, *model.parameters()])
    return loss.detach(), inputs[:, 0], weights


@pytest.fixture(scope="module")
def measured(rank_pool: RankPool) -> dict[str, Any]:
    (result,) = rank_pool.run(1, measure, list(FAMILIES))
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_has_the_loss_and_the_gradients_that_it_has_alone(
    measured: dict[str, Any], family: str
) -> None:
    for result in measured[family]:
        packed, alone = result["loss"]
        assert packed == pytest.approx(alone, rel=1e-5)
        for ours, expected in result["gradients"]:
            scale = abs(expected).max()
            assert abs(ours - expected).max() <= 2e-5 * scale + 1e-7, scale


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_reaches_another_sample(measured: dict[str, Any], family: str) -> None:
    assert [result["outside"] for result in measured[family]] == [0] * NUM_SAMPLES


@pytest.mark.parametrize("family", FAMILIES)
def test_other_samples_do_not_move_a_bit_of_a_loss(measured: dict[str, Any], family: str) -> None:
    """Of FlexAttention, whose loss is that of a sample alone."""
    for result in measured[family]:
        packed, changed = result["flex"]
        assert packed == changed
        assert packed == pytest.approx(result["loss"][1], rel=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].experts_of])
def test_experts_are_grouped(measured: dict[str, Any], family: str) -> None:
    """megatron-core 0.19.2 takes one expert after the other where it finds no grouped kernel."""
    kinds = measured[family][0]["kinds"]
    assert "GroupedExperts" in kinds and "SequentialMLP" not in kinds
