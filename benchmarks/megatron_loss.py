"""Megatron's own losses over all rows of one rank: it has no label to ignore."""

import functools
from typing import Any

import torch
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from timing import ON_GPU


def fused_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over labels [N] that are not ignored; logits [N, V]."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    rows, targets = logits.unsqueeze(1), labels.clamp(min=0).unsqueeze(1)
    loss = fused_vocab_parallel_cross_entropy(rows, targets, single_rank_group())
    return (loss.squeeze(1) * (labels != IGNORE_INDEX)).sum()


def unfused_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As fused_loss."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    single_rank_group()
    rows, targets = logits.unsqueeze(1), labels.clamp(min=0).unsqueeze(1)
    loss = vocab_parallel_cross_entropy(rows, targets)
    return (loss.squeeze(1) * (labels != IGNORE_INDEX)).sum()


@functools.cache
def single_rank_group() -> Any:
    """The tensor-parallel group of one rank."""
    from megatron.core import parallel_state

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            "nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1
        )
    if not parallel_state.is_initialized():
        if not ON_GPU:
            from sft_fast.megatron.device import install_cpu_shim

            install_cpu_shim()
        parallel_state.initialize_model_parallel()
    return parallel_state.get_tensor_model_parallel_group()
