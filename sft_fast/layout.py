"""Whether a model can be laid out over ranks as the configuration says; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sft_fast.errors import Problem

if TYPE_CHECKING:
    from sft_fast.architecture import Architecture
    from sft_fast.config import Config


def layout_problems(architecture: Architecture, config: Config) -> Iterator[Problem]:
    """Yields everything that keeps the model from being split as `config.parallel` says."""
    parallel, is_moe = config.parallel, architecture.num_experts > 0
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
