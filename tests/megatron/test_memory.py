"""Memory options: refused with a reason where this machine cannot do them, else megatron's."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from rank_pool import RankPool
from tiny import make_config, make_store, random_samples

CPU: Any = SimpleNamespace(device=torch.device("cpu"))
GPU: Any = SimpleNamespace(device=torch.device("cuda"))


def test_offloading_on_a_cpu_is_refused() -> None:
    from sft_fast.megatron.memory import memory_options, optimizer_offload_options

    config = make_config(model={"offload_layers": 2})
    with pytest.raises(ValueError, match="model.offload_layers is 2.*on a CPU"):
        memory_options(config.model, config.lora, CPU)
    with pytest.raises(ValueError, match="optim.offload_fraction is 0.5.*on a CPU"):
        optimizer_offload_options(
            make_config(optim={"offload_fraction": 0.5}, model={"dtype": "bf16"}).optim, CPU
        )
    assert optimizer_offload_options(make_config().optim, CPU) == {}


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast.megatron import memory

    monkeypatch.setattr(memory, "is_installed", lambda module: False)
    config = make_config(model={"offload_layers": 2})
    with pytest.raises(ValueError, match="transformer_engine is not installed"):
        memory.memory_options(config.model, config.lora, GPU)
    plain = make_config()
    fused = {"gradient_accumulation_fusion": True}
    assert memory.memory_options(plain.model, plain.lora, GPU) == fused
    assert "off (no GPU)" in memory.describe_memory(plain.model, plain.lora, CPU)

    monkeypatch.setattr(memory, "is_installed", lambda module: True)
    options = memory.memory_options(config.model, config.lora, GPU)
    assert options["cpu_offloading"] and options["cpu_offloading_num_layers"] == 2
    assert options["gradient_accumulation_fusion"]
    assert memory.describe_memory(config.model, config.lora, GPU).endswith("fusion on")
    lora = make_config(lora={"rank": 4})
    assert not memory.memory_options(lora.model, lora.lora, GPU)["gradient_accumulation_fusion"]


def test_the_options_exist_in_the_installed_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import fields

    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sft_fast.megatron import memory

    monkeypatch.setattr(memory, "is_installed", lambda module: True)
    config = make_config(
        optim={"offload_fraction": 0.5}, model={"offload_layers": 2, "dtype": "bf16"}
    )
    offload = memory.optimizer_offload_options(config.optim, GPU)
    assert offload["optimizer_offload_fraction"] == 0.5
    assert set(offload) <= {field.name for field in fields(OptimizerConfig)}
    known = {field.name for field in fields(TransformerConfig)}
    assert set(memory.memory_options(config.model, config.lora, GPU)) <= known
    assert memory.recompute_options(make_config(model={"recompute": "selective"}).model) == {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    }
    sections = (
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["norm", "activation"]},
        {"recompute": "block", "recompute_layers": 2},
        {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    )
    for section in sections:
        config = make_config(model=section)
        options = memory.memory_options(config.model, config.lora, CPU)
        TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, **options)


def gradients(is_fused: bool) -> dict[str, Any]:
    """Of one global batch of several micro-batches, by name."""
    from sft_fast.megatron import memory
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.forward_step import forward_step
    from sft_fast.megatron.hf import RandomSource
    from sft_fast.megatron.model import unwrap
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.schedule import run_schedule
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_shape
    from sft_fast.packing.from_config import make_plan

    config = make_config(parallel={"tensor": 2, "sequence": True})
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_shape(config.model.shape, vocab_size=131)
    obstacle = "" if is_fused else "none is wanted"
    with mock.patch.object(memory, "fusion_obstacle", return_value=obstacle):
        weights = RandomSource(architecture, config.seed)
        run = build_run(config, architecture, weights, 1, parallel)
    assert unwrap(run.model[0]).config.gradient_accumulation_fusion is is_fused
    run.model[0].zero_grad_buffer()
    store = make_store(random_samples(7, seed=1))
    plan = make_plan(store, config.packing, config.train, config.seed)
    with open_batches(store, plan, range(1), run.shape, parallel) as batches:
        run_schedule(run.model, batches, run.shape, forward_step)
    return {name: p.main_grad.numpy().copy() for name, p in run.model.named_parameters()}


def test_products_add_themselves_to_the_gradient_buffers(rank_pool: RankPool) -> None:
    ranks = zip(rank_pool.run(2, gradients, True), rank_pool.run(2, gradients, False), strict=True)
    for found, expected in ranks:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert abs(gradient).max() > 0
            assert abs(found[name] - gradient).max() <= 1e-6 * abs(gradient).max(), name
