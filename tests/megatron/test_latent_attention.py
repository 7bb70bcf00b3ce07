"""Latent attention of packed samples: its oracle's numbers, and nothing from other samples."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rank_pool import RankPool
from tiny import make_config, save_tiny_llama

SEQLENS = (5, 1, 9)
SIZES = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
}


def run_layer(folder: str, backend: str) -> dict[str, Any]:
    """Errors against the oracle by name, and the largest gradient that reaches other samples."""
    from sft_fast.megatron.attention.packed_samples import pack_samples
    from sft_fast.megatron.hf import SafetensorsSource, load_hf_weights
    from sft_fast.megatron.model import build_model
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.rotary import rotary_frequencies, rotary_tables
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.reference.block import rms_norm
    from sft_fast.reference.latent_attention import latent_attention

    config = make_config()
    parallel = init_parallel(config.parallel, config.train, config.seed)
    a = architecture_from_hf(read_hf_config(Path(folder)))
    (model,) = build_model(a, config.model, config.parallel, config.lora, config.loss, parallel)
    load_hf_weights(model, SafetensorsSource(Path(folder), a), a, parallel)
    attention: Any = model.decoder.layers[0].self_attention
    if backend == "flex":
        from sft_fast.megatron.attention.flex import load_flex

        attention.core_attention.attend = load_flex()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(SEQLENS), 1, a.hidden_size, generator=generator).requires_grad_()
    positions = torch.cat([torch.arange(length) for length in SEQLENS])[None]
    edges = torch.tensor([0, *SEQLENS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tables = rotary_tables(positions, rotary_frequencies(a), 1.0)
    if backend == "flex":  # without a GPU it has no backward pass
        with torch.no_grad():
            output = attention(hidden, tables, pack_samples(SEQLENS, edges))
    else:
        output = attention(hidden, tables, pack_samples(SEQLENS, edges))

    def expected(part: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """[T, h] of one sample [T, h] in fp64; pairs of neighbours as complex numbers."""
        weights = {name: tensor.double() for name, tensor in attention.named_parameters()}
        turns = torch.exp(1j * angles)[:, None]

        def turn(heads: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turns).flatten(-2)

        queries = (part @ weights["linear_q_proj.weight"].t()).unflatten(1, (4, -1))
        plain, turned = queries.split([12, 8], dim=2)
        queries = torch.cat([plain, turn(turned)], dim=2)
        latents, key = (part @ weights["linear_kv_down_proj.weight"].t()).split([16, 8], dim=1)
        latents = rms_norm(latents, weights["kv_layernorm.weight"], 1e-6)
        up = weights["linear_kv_up_proj.weight"].unflatten(0, (4, 22))
        outputs = latent_attention(queries, latents, turn(key[:, None])[:, 0], up, 20**-0.5)
        return outputs.flatten(1) @ weights["linear_proj.weight"].t()

    frequencies = rotary_frequencies(a)[0].double()
    results, start = {"error": 0.0, "gradient": 0.0, "leak": 0.0}, 0
    for length in SEQLENS:
        rows = slice(start, start + length)
        start += length
        part = hidden[rows, 0].detach().double().requires_grad_()
        truth = expected(part, torch.arange(length)[:, None] * frequencies)
        error = float((output[rows, 0] - truth).abs().max().detach())
        results["error"] = max(results["error"], error)
        if backend == "flex":
            continue
        upstream = torch.randn(length, a.hidden_size, generator=generator)
        (own,) = torch.autograd.grad(output[rows, 0], hidden, upstream, retain_graph=True)
        (theirs,) = torch.autograd.grad(truth, part, upstream.double())
        results["gradient"] = max(results["gradient"], float((own[rows, 0] - theirs).abs().max()))
        own[rows] = 0.0
        results["leak"] = max(results["leak"], float(own.abs().max()))
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("latent")
    save_tiny_llama(folder, "deepseek_v2", q_lora_rank=None, **SIZES)
    return str(folder)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_packed_samples_are_what_the_oracle_makes_of_each_alone(
    rank_pool: RankPool, model: str, backend: str
) -> None:
    (results,) = rank_pool.run(1, run_layer, model, backend)
    assert results["error"] < 2e-5 and results["gradient"] < 2e-4, results
    assert results["leak"] == 0.0
