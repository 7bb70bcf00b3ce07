"""Megatron's training contract: forward_step(data_iterator, model) and its loss_func.

Both fit megatron-core's schedules and Megatron-LM's `pretrain()`. The returned loss is a sum over
supervised tokens, each times its weight; with `calculate_per_token_loss` the schedule divides the
gradient by the supervised tokens of the global batch, and our own trainer by their weights.
"""

from collections.abc import Iterator
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor

from sft_fast.megatron.attention.packed_samples import PackedSamples, pack_samples
from sft_fast.megatron.loss_rows import loss_rows
from sft_fast.megatron.model import unwrap
from sft_fast.packing.micro_batch import MicroBatch

Report = dict[str, Tensor]
checked_models: "WeakSet[torch.nn.Module]" = WeakSet()


def forward_step(
    data_iterator: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, "partial[tuple[Tensor, Tensor, Report]]"]:
    """Runs one micro-batch.

    Returns: on the last pipeline stage the per-token loss [1, T] fp32, zero where unsupervised;
        elsewhere the hidden states. And the loss_func for it.
    """
    batch = next(data_iterator)
    check_once(batch, model)
    losses = labelled_outputs(model, batch, packed_samples(batch))
    return losses, partial(loss_func, batch.num_supervised)


def labelled_outputs(model: torch.nn.Module, batch: MicroBatch, samples: PackedSamples) -> Tensor:
    """What the model returns of a micro-batch and its labels."""
    if unwrap(model).computes_loss_rows:
        samples.loss_rows = loss_rows(batch.active_tokens, batch.tokens.device)
    outputs: Tensor = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=samples,
    )
    return outputs


def check_once(batch: MicroBatch, model: torch.nn.Module) -> None:
    """Checks the first micro-batch that a model sees; raises ValueError naming the wrong tensor."""
    if model not in checked_models:
        batch.to("cpu").check(unwrap(model).vocab_size)
        checked_models.add(model)


def loss_func(num_supervised: int, losses: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Reduces a micro-batch's per-token losses.

    Args:
        num_supervised: supervised tokens of the micro-batch, known on the CPU.
        losses: [b, s] fp32, weighted, zero where unsupervised.

    Returns: (loss_sum, num_tokens int32, report); the report's "lm loss" is [loss_sum, num_tokens].
    """
    loss_sum = losses.sum()
    # A fill, not a copy from the host, which would wait.
    num_tokens = torch.full((), num_supervised, dtype=torch.int32, device=losses.device)
    report = torch.stack([loss_sum.detach(), num_tokens.to(loss_sum.dtype)])
    return loss_sum, num_tokens, {"lm loss": report}


def packed_samples(batch: MicroBatch, wants_outputs: bool = False) -> PackedSamples:
    """What the layers need to know of a micro-batch."""
    samples = pack_samples(
        batch.seqlens,
        batch.cu_seqlens,
        batch.active_tokens,
        batch.weights,
        batch.layout.cp_size,
        batch.tokens.shape[1],
    )
    samples.wants_outputs, samples.sample_ids = wants_outputs, batch.sample_ids
    samples.position_ids, samples.lengths = batch.position_ids, batch.lengths
    samples.padded_lengths = batch.seqlens
    return samples
