"""Memory options: refused with a reason where this machine cannot do them, else megatron's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiny import make_config

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
    without = {"gradient_accumulation_fusion": False}
    assert memory.memory_options(plain.model, plain.lora, GPU) == without
    assert "off (Apex's fused_weight" in memory.describe_memory(plain.model, plain.lora, GPU)

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
