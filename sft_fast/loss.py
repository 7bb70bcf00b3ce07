"""Cross-entropy of the trained tokens only, over a vocabulary that may be split between ranks.

`masked_linear_cross_entropy` takes hidden states: it selects the active rows (the tokens that
train) before any communication and before the LM head, so that a masked token costs nothing.
`masked_cross_entropy` takes logits that somebody else computed. The maths is in kernels/README.md.
"""

import functools
import importlib
import logging
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.masked_cross_entropy import Backend, MaskedCrossEntropy, VocabShard
from sft_fast.kernels.masked_linear_cross_entropy import MaskedLinearCrossEntropy, select_rows

log = logging.getLogger(__name__)

BACKENDS = {
    "torch": "sft_fast.kernels.masked_cross_entropy_torch",
    "triton": "sft_fast.kernels.masked_cross_entropy_triton",
}


def masked_cross_entropy(
    vocab_parallel_logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Per-token cross-entropy of logits whose last axis is this rank's part of the vocabulary.

    Args:
        vocab_parallel_logits: [..., V_padded/tp] bf16, fp16 or fp32 (fp64 with `torch`). Never
            written to; masked rows are not read, and their gradient is exactly 0.
        labels: [...] int64 global ids, the same on every rank; IGNORE_INDEX masks a token. Any
            other id outside [0, vocab_size) gives loss NaN.
        vocab_size: columns that count, over all ranks. None: V_padded.
        tp_group: ranks that hold the other columns, in order. None: the vocabulary is whole.
        backend: `auto`, `torch` or `triton`. `torch` on a GPU makes the host wait, to learn how
            many rows are active.

    Returns:
        [...] fp32 (fp64 for fp64 logits) loss in nats, exactly 0 at masked tokens, not reduced.
        Its negative is the log probability of the label.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot be used.

    Source: online softmax, Milakov & Gimelshein 2018 (arXiv 1805.02867).
    """
    if vocab_parallel_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"masked_cross_entropy: labels have shape {list(labels.shape)}, expected the shape of "
            f"the logits without their last axis, {list(vocab_parallel_logits.shape[:-1])}"
        )
    width = vocab_parallel_logits.shape[-1]
    shard = vocab_shard(width, vocab_size, tp_group)
    kernels = load_backend(backend, vocab_parallel_logits.device.type)
    logits = vocab_parallel_logits.reshape(-1, width)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    loss: Tensor = MaskedCrossEntropy.apply(logits, labels.flatten(), shard, kernels)
    return loss.view(labels.shape)


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    active_rows: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    backend: str = "auto",
    accumulate_into_main_grad: bool = False,
) -> Tensor:
    """Per-token cross-entropy of the logits hidden @ weight.T, computed for active rows only.

    Args:
        hidden: [s, b, h], or [s/tp, b, h] with sequence_parallel: this rank's part of the
            sequence. Masked rows are not read, and their gradient is exactly 0.
        weight: [V_padded/tp, h], dtype of hidden: this rank's rows of the LM head. Without
            requires_grad its gradient is not computed.
        labels: [b, s] int64 global ids, the same on every rank; IGNORE_INDEX masks a token. Any
            other id outside [0, vocab_size) gives loss NaN.
        active_rows: [A] int64, ascending: t * b + i for each labels[i, t] != IGNORE_INDEX. Keep
            it on the CPU: sequence_parallel reads the ranks' counts from it, and would make the
            host wait for a GPU. None: found in labels, which makes the host wait too.
        vocab_size: weight rows that count, over all ranks. None: V_padded.
        tp_group: ranks that hold the other weight rows, in order. None: the head is whole.
        sequence_parallel: hidden is split over tp_group along the sequence.
        backend: `auto`, `torch` or `triton`.
        accumulate_into_main_grad: add the weight gradient to weight.main_grad in its dtype
            (fp32), and tell Megatron's DDP so through weight.grad_added_to_main_grad.

    Returns:
        [b, s] fp32 (fp64 for fp64 input) loss in nats, exactly 0 at masked tokens, not reduced.
        Its negative is the log probability of the label.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot be used.

    Cost, per rank: 6*A*h*V/tp FLOPs; A*V/tp logits stored; A*h elements gathered and reduced over
        tp_group; one all-gather of three fp32 numbers per active row.
    """
    shard = vocab_shard(weight.shape[0], vocab_size, tp_group)
    num_parts = shard.tp_size if sequence_parallel else 1
    check_inputs(hidden, weight, labels, num_parts)
    if accumulate_into_main_grad and weight.requires_grad and not hasattr(weight, "main_grad"):
        raise ValueError(
            "accumulate_into_main_grad: the LM head weight has no main_grad, expected the one "
            "that Megatron's DistributedDataParallel gives it; wrap the model, or turn it off"
        )
    row_labels = labels.t().flatten()
    if active_rows is not None:
        check_active_rows(active_rows, row_labels)
    rows = select_rows(row_labels, active_rows, num_parts, shard.tp_rank)
    kernels = load_backend(backend, hidden.device.type)
    loss: Tensor = MaskedLinearCrossEntropy.apply(
        hidden, weight, row_labels, rows, shard, kernels, accumulate_into_main_grad
    )
    return loss.view(labels.shape[::-1]).t().contiguous()


@functools.cache
def load_backend(name: str, device_type: str) -> Backend:
    """Imports a backend; `auto` is triton on a GPU that has it, else torch."""
    if name != "auto":
        return import_backend(name)
    if device_type == "cpu":
        return import_backend("torch")
    try:
        return import_backend("triton")
    except ValueError as error:
        log.warning("loss.backend: auto falls back to torch: %s", error)
        return import_backend("torch")


def import_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(
            f"loss.backend: got {name!r}, expected one of {', '.join(['auto', *BACKENDS])}"
        )
    try:
        return cast(Backend, importlib.import_module(BACKENDS[name]))
    except ImportError as error:
        raise ValueError(
            f"loss.backend: {name!r} cannot be imported ({error}); install it, or choose 'torch'"
        ) from error


def vocab_shard(
    width: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None
) -> VocabShard:
    """Finds this rank's columns when every rank of tp_group holds `width` of them."""
    tp_rank, tp_size = 0, 1
    if tp_group is not None:
        tp_rank, tp_size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    if vocab_size is None:
        vocab_size = width * tp_size
    if not 0 < vocab_size <= width * tp_size:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected 1 to {width * tp_size}, the {width} columns "
            f"of a rank times {tp_size} ranks; pad the LM head to at least vocab_size rows"
        )
    start = tp_rank * width
    num_columns = min(max(vocab_size - start, 0), width)
    return VocabShard(vocab_size, start, num_columns, tp_group, tp_rank, tp_size)


def check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor, num_parts: int) -> None:
    batch, sequence = labels.shape
    expected = [sequence // num_parts, batch, weight.shape[1]]
    if list(hidden.shape) != expected or sequence % num_parts:
        raise ValueError(
            f"masked_linear_cross_entropy: hidden has shape {list(hidden.shape)}, expected "
            f"[s/{num_parts}, b, h] for labels [b, s] = {list(labels.shape)} and weight [V/tp, h] "
            f"= {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"masked_linear_cross_entropy: hidden is {hidden.dtype} but weight is {weight.dtype}; "
            "cast one of them"
        )
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"masked_linear_cross_entropy: hidden is on {hidden.device}, weight on "
            f"{weight.device}, labels on {labels.device}; move them to one device"
        )


def check_active_rows(active_rows: Tensor, row_labels: Tensor) -> None:
    """Compares with the labels where that does not make the host wait for a device."""
    if active_rows.dtype != torch.int64 or active_rows.dim() != 1:
        raise ValueError(
            f"active_rows: got {active_rows.dtype} {list(active_rows.shape)}, expected int64 [A]"
        )
    if active_rows.device.type == "cpu" and row_labels.device.type == "cpu":
        expected = (row_labels != IGNORE_INDEX).nonzero().squeeze(1)
        if not torch.equal(active_rows, expected):
            raise ValueError(
                f"active_rows: got {len(active_rows)} rows, expected in ascending order the "
                f"{len(expected)} rows t * b + i with labels[i, t] != {IGNORE_INDEX}"
            )
