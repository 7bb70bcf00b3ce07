"""Supervised fine-tuning on megatron-core: one YAML, one torchrun, loss on trained tokens only."""

__version__ = "0.1.0"
