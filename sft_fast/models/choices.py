"""Choices of the config section `model`; imports nothing, because config imports it."""

from typing import Literal

Dtype = Literal["bf16", "fp16", "fp32"]
"""Type of numbers in `model.dtype` and `export.dtype`."""

AttentionBackend = Literal[
    "auto", "transformer_engine", "flash_attn", "aiter", "torch_varlen", "flex", "sdpa"
]
"""Value of `model.attention`: one of megatron/attention/backends.py, or the first that works."""

Fp8Recipe = Literal["tensorwise", "blockwise", "mxfp8"]
"""Value of `model.fp8_recipe`: what shares a scale."""

FP8_MULTIPLES: dict[Fp8Recipe, int] = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What divides the sizes of a product in 8 bits."""
