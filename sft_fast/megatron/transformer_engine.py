"""Transformer Engine's linear layers in the place of megatron-core's own, and FP8 through them.

Their parameters have the names, shapes and shards of megatron's, so import, export and checkpoints
know no difference. Norms, attention and the LM head stay ours: the head in 8 bits would cost
accuracy where it matters most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from sft_fast.config.sections import ModelConfig
from sft_fast.megatron.memory import require
from sft_fast.megatron.parallel import Parallel


def transformer_engine_options(model: ModelConfig, parallel: Parallel) -> dict[str, Any]:
    """TransformerConfig arguments for `model.transformer_impl` and `model.fp8`.

    Raises:
        ValueError: there is no GPU, or no Transformer Engine.
    """
    if not model.uses_transformer_engine:
        return {"transformer_impl": "local"}
    key = "fp8" if model.transformer_impl == "auto" else "transformer_impl"
    require(f"model.{key}", getattr(model, key), parallel)
    options: dict[str, Any] = {"transformer_impl": "transformer_engine"}
    if model.fp8 != "none":
        options |= {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}
    return options


def linear_classes() -> tuple[type[torch.nn.Module], type[torch.nn.Module]]:
    """Transformer Engine's column- and row-parallel linear, without what they add to checkpoints.

    The recipes of `model.fp8_recipe` scale by the tensor at hand, so there is no state to save; the
    state would be a pickle, which checkpoints must not hold.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    return without_extra_state(TEColumnParallelLinear), without_extra_state(TERowParallelLinear)


def without_extra_state(linear: Any) -> Any:
    """A subclass of a linear layer that adds nothing to checkpoints."""
    module = torch.nn.Module
    overrides = {
        "get_extra_state": module.get_extra_state,
        "set_extra_state": module.set_extra_state,
    }
    return type(linear.__name__, (linear,), overrides)


def use_transformer_engine(layer: TransformerLayerSubmodules) -> None:
    """Puts Transformer Engine's linear layers into a layer spec."""
    column, row = linear_classes()
    attention, mlp = layer.self_attention.submodules, layer.mlp
    # A ModuleSpec, or in newer releases a function with the submodules as an argument.
    mlp = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    attention.linear_qkv = mlp.linear_fc1 = column
    attention.linear_proj = mlp.linear_fc2 = row


@contextlib.contextmanager
def without_fp8(models: Sequence[MegatronModule]) -> Iterator[None]:
    """Lets the models compute in their own dtype, whatever `model.fp8` says."""
    kinds = [model.config.fp8 for model in models]
    for model in models:
        model.config.fp8 = None
    try:
        yield
    finally:
        for model, kind in zip(models, kinds, strict=True):
            model.config.fp8 = kind
