"""Whether a model can be laid out over ranks as the configuration says; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sft_fast.errors import Problem
from sft_fast.models.families import FAMILIES

if TYPE_CHECKING:
    from sft_fast.config.sections import LoraConfig, ModelConfig, ParallelConfig
    from sft_fast.models.architecture import Architecture


def layout_problems(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, lora: LoraConfig
) -> Iterator[Problem]:
    """Yields everything that keeps the model from being split as `parallel` says."""
    is_moe = architecture.num_experts > 0
    stages: tuple[str, ...] = ("parallel.pipeline",)
    if parallel.virtual_pipeline > 1:
        stages += ("parallel.virtual_pipeline",)
    splits = [
        (("parallel.tensor",), parallel.tensor, "num_attention_heads"),
        (("parallel.tensor",), parallel.tensor, "num_key_value_heads"),
        (stages, parallel.pipeline * parallel.virtual_pipeline, "num_layers"),
    ]
    if is_moe:
        splits.append((("parallel.expert",), parallel.expert, "num_experts"))
        splits.append((("parallel.expert_tensor",), parallel.expert_tensor, "ffn_hidden_size"))
    else:
        splits.append((("parallel.tensor",), parallel.tensor, "ffn_hidden_size"))
    for keys, size, name in splits:
        count = getattr(architecture, name)
        if count % size != 0:
            fits = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
            found = f"{' x '.join(keys)} is {size}, and {name} of the model is {count}"
            yield Problem(keys, found, f"a divisor of {count}", f"one of {fits}")
    if not is_moe and (parallel.expert > 1 or parallel.expert_tensor > 1):
        yield Problem(
            ("parallel.expert", "parallel.expert_tensor"),
            f"{parallel.expert} and {parallel.expert_tensor} for a model without experts",
            "1 and 1",
        )
    if is_moe and parallel.tensor > 1 and not parallel.sequence:
        yield Problem(
            ("parallel.sequence", "parallel.tensor"),
            "tensor parallel without sequence parallel, for a model with experts",
            "parallel.sequence true, because each rank routes its own tokens",
            "parallel.sequence=true",
        )
    yield from transformer_engine_problems(architecture, model, parallel)
    if lora.rank > 0 and FAMILIES[architecture.family].is_fused:
        yield Problem(
            ("lora.rank", "model.path"),
            f"{lora.rank} for {architecture.family}, which keeps queries, keys and values "
            "in one matrix",
            "a model with a matrix for each, or all weights trained",
            "lora.rank=0, or another model.path",
        )


def transformer_engine_problems(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig
) -> Iterator[Problem]:
    """Yields everything that Transformer Engine's linear layers cannot do for this model."""
    tensor = parallel.tensor
    if not model.uses_transformer_engine:
        return
    if architecture.num_experts:
        yield Problem(
            ("model.transformer_impl", "model.fp8"),
            f"{model.transformer_impl} and {model.fp8} for a model with experts",
            "local and none: Transformer Engine keeps experts in matrices of another form",
            "model.transformer_impl=local model.fp8=none",
        )
    widths = {
        "hidden_size": architecture.hidden_size,
        "num_attention_heads x head_dim": architecture.num_attention_heads * architecture.head_dim,
        "num_key_value_heads x head_dim": architecture.num_key_value_heads * architecture.head_dim,
        "ffn_hidden_size": architecture.ffn_hidden_size,
    }
    for name, width in widths.items():
        count = width if name == "hidden_size" else width // tensor
        if count % model.fp8_multiple != 0:
            yield Problem(
                ("model.fp8_recipe", "parallel.tensor"),
                f"{model.fp8_recipe} with {count} columns on a rank ({name} of the model)",
                f"a multiple of {model.fp8_multiple}",
                "a smaller parallel.tensor, model.fp8_recipe=tensorwise, or model.fp8=none",
            )
