"""Cross-entropy of the trained tokens only, over a vocabulary that may be split between ranks.

`masked_linear_cross_entropy` takes hidden states: it selects the active tokens (those that train)
before any communication and before the LM head, so that a masked token costs nothing.
`masked_linear_outputs` gives log probability, entropy and accuracy beside the loss, and
`masked_cross_entropy` takes logits that somebody else computed. The maths is in kernels/README.md.

Shapes: s sequence, b batch, n = s b tokens, A of them active, h hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.active_tokens import select_active_tokens
from sft_fast.kernels.backends import load_backend
from sft_fast.kernels.loss_options import LossOptions, Policy
from sft_fast.kernels.masked_cross_entropy import (
    MaskedCrossEntropy,
    TokenOutputs,
    VocabColumns,
    VocabShard,
)
from sft_fast.kernels.masked_linear_cross_entropy import HeadLossArgs, MaskedLinearCrossEntropy
from sft_fast.kernels.memory_plan import MemoryPlan
from sft_fast.registry import get_loss

__all__ = [
    "HeadSettings",
    "LossOptions",
    "TokenOutputs",
    "custom_losses",
    "masked_cross_entropy",
    "masked_linear_cross_entropy",
    "masked_linear_outputs",
]

OPERATION = "masked_cross_entropy"
DEFAULT_OPTIONS = LossOptions()


@dataclass(frozen=True)
class HeadSettings:
    """How the loss of one LM head is computed, in every call alike.

    Raises:
        ValueError: a policy that does not exist, or needs summed.
    """

    vocab_size: int | None = None
    """Weight rows that count, over all ranks; the others are padding. None: all."""
    tp_group: dist.ProcessGroup | None = None
    """Ranks that hold the other weight rows, in order. None: the head is whole."""
    sequence_parallel: bool = False
    """hidden is split over tp_group along the sequence."""
    options: LossOptions = DEFAULT_OPTIONS
    """Label smoothing, z-loss, softcap."""
    backend: str = "auto"
    """One of kernels/backends.py, or `auto`."""
    only_active: bool = False
    """hidden holds the active tokens alone, [max(A, 1), 1, h]; without any, one that is not read.
    Not together with sequence_parallel."""
    accumulate_into_main_grad: bool = False
    """Add the weight gradient to weight.main_grad in its dtype (fp32), and tell Megatron's DDP so
    through weight.grad_added_to_main_grad."""
    summed: bool = False
    """The caller promises that the losses are only summed, and the sum scaled: every token gets the
    same upstream gradient. Allows `gradient_in_forward`. A broken promise raises ValueError in
    backward on a CPU, and gives NaN gradients on a GPU."""
    policy: Policy = "auto"
    """What happens to the logits between forward and backward. `stored`: they stay.
    `gradient_in_forward`: each chunk of tokens becomes gradients at once (needs summed, and an fp32
    buffer as large as weight). `recompute`: computed again. `auto`: the first of these that
    memory_budget allows, or that takes no more memory than those after it. All ranks of tp_group
    must choose alike."""
    memory_budget: int = 2 << 30
    """Bytes for logits. Tokens are cut into as few equal chunks as it allows, but never into chunks
    of less than 4096 only to keep to it."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            names = ", ".join(get_args(Policy))
            raise ValueError(f"loss.policy: got {self.policy!r}, expected one of {names}")
        if self.policy == "gradient_in_forward" and not self.summed:
            raise ValueError(
                "loss.policy: gradient_in_forward needs losses that are only summed (summed=True); "
                "choose 'recompute'"
            )


WHOLE_HEAD = HeadSettings()


def masked_cross_entropy(
    vocab_parallel_logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    options: LossOptions = DEFAULT_OPTIONS,
    backend: str = "auto",
) -> Tensor:
    """Per-token cross-entropy of logits whose last axis is this rank's part of the vocabulary.

    Args:
        vocab_parallel_logits: [..., V_padded/tp] bf16, fp16 or fp32 (fp64 with `torch`). Never
            written to; those of masked tokens are not read, and their gradient is exactly 0.
        labels: [...] int64 or int32 global ids, the same on every rank; IGNORE_INDEX masks a
            token. Any other id outside [0, vocab_size) gives loss NaN.
        vocab_size: columns that count, over all ranks. None: V_padded.
        tp_group: ranks that hold the other columns, in order. None: the vocabulary is whole.
        options: label smoothing, z-loss, softcap.
        backend: one of kernels/backends.py, or `auto`. `torch` on a GPU makes the host wait, to
            learn how many tokens are active.

    Returns:
        [...] fp32 (fp64 for fp64 logits) loss in nats, exactly 0 at masked tokens, not reduced.

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
    kernels = load_backend(OPERATION, backend, vocab_parallel_logits.device.type)
    logits = vocab_parallel_logits.reshape(-1, width)  # [N, V_padded/tp]
    if logits.stride(1) != 1:
        # The kernels load neighbouring columns at once.
        logits = logits.contiguous()
    loss = MaskedCrossEntropy.apply(logits, labels.flatten().long(), shard, options, kernels)  # [N]
    return loss.view(labels.shape)


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: HeadSettings = WHOLE_HEAD,
    *,
    active_tokens: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Per-token cross-entropy of the logits hidden @ weight.T, computed for active tokens only.

    Args:
        hidden: [s, b, h], or [s/tp, b, h] with sequence_parallel: this rank's part of the
            sequence. Masked tokens are not read, and their gradient is exactly 0.
        weight: [V_padded/tp, h], dtype of hidden: this rank's rows of the LM head. Without
            requires_grad its gradient is not computed.
        labels: [b, s] int64 or int32 global ids, the same on every rank; IGNORE_INDEX masks a
            token. Any other id outside [0, vocab_size) gives loss NaN.
        settings: the same in every call.
        active_tokens: [A] int64, ascending: t * b + i for each token that is neither masked nor of
            weight 0. Keep it on the CPU: sequence_parallel reads the ranks' counts from it, and
            would make the host wait for a GPU. None: found in labels and token_weights, which
            makes the host wait too.
        token_weights: [b, s] float, the same on every rank, without gradient; multiplies the
            loss. Weight 0 masks a token. None: 1 everywhere.

    Returns:
        [b, s] fp32 (fp64 for fp64 input) loss in nats, exactly 0 at masked tokens, not reduced.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot be used.

    Cost, per rank: 6*A*h*V/tp FLOPs, 8 under `recompute`; A*V/tp logits under `stored`; A*h
        elements gathered and reduced over tp_group; one all-gather of three fp32 numbers per
        active token (four with label smoothing).
    """
    (loss,) = run_head(hidden, weight, labels, settings, active_tokens, token_weights, False)
    return loss


def masked_linear_outputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: HeadSettings = WHOLE_HEAD,
    *,
    active_tokens: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> TokenOutputs:
    """Loss, log probability, entropy and correctness of each token, each [b, s].

    The arguments are those of masked_linear_cross_entropy; token_weights multiplies the loss only.
    Loss and log probability have gradients, which need not be equal: settings.summed is not used.
    Ranks exchange two more numbers per active token.

    Raises:
        ValueError: as masked_linear_cross_entropy, or the policy is `gradient_in_forward`.
    """
    settings = replace(settings, summed=False)
    return TokenOutputs(
        *run_head(hidden, weight, labels, settings, active_tokens, token_weights, True)
    )


def custom_losses(name: str, losses: Tensor, labels: Tensor) -> Tensor:
    """Applies a registered loss to the log probabilities -losses [b, s]: [b, s] fp32, 0 if masked.

    Raises:
        ValueError: there is no such loss, or its result is not one number per token.
    """
    custom = get_loss(name)(-losses, labels)
    if custom.shape != labels.shape:
        raise ValueError(
            f"loss.custom: {name!r} returned shape {list(custom.shape)}, expected one loss per "
            f"token, {list(labels.shape)}"
        )
    return torch.where(labels == IGNORE_INDEX, 0.0, custom.float())


def run_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: HeadSettings,
    active_tokens: Tensor | None,
    token_weights: Tensor | None,
    with_outputs: bool,
) -> tuple[Tensor, ...]:
    """What both public functions do: the loss [b, s], or TokenOutputs' fields, [b, s] each."""
    shard = vocab_shard(len(weight), settings.vocab_size, settings.tp_group)
    num_parts = shard.tp_size if settings.sequence_parallel else 1
    num_alone = None
    if settings.only_active:
        assert active_tokens is not None and num_parts == 1, "whoever chose the rows knows them"
        num_alone = max(len(active_tokens), 1)
    check_inputs(hidden, weight, labels, token_weights, num_parts, num_alone)
    main_grad = settings.accumulate_into_main_grad
    if main_grad and weight.requires_grad and not hasattr(weight, "main_grad"):
        raise ValueError(
            "accumulate_into_main_grad: the LM head weight has no main_grad, expected the one "
            "that Megatron's DistributedDataParallel gives it; wrap the model, or turn it off"
        )
    # Transposed, because hidden is [s, b, h]: token t * b + i is sample i at place t.
    flat_labels, flat_weights = labels.t().flatten().long(), None  # [n]
    if token_weights is not None:
        flat_weights = token_weights.detach().t().flatten()  # [n]
        flat_weights = flat_weights.to(torch.promote_types(hidden.dtype, torch.float32))
        flat_labels = flat_labels.masked_fill(flat_weights == 0, IGNORE_INDEX)
    if active_tokens is not None:
        check_active_tokens(active_tokens, flat_labels)
    active = select_active_tokens(flat_labels, active_tokens, num_parts, shard.tp_rank)
    if settings.only_active:
        active = replace(active, own_indices=None)
    is_trained = weight.requires_grad and torch.is_grad_enabled()
    plan = MemoryPlan.choose(
        settings.policy,
        settings.memory_budget,
        num_tokens=len(active.indices),
        bytes_per_token=len(weight) * weight.itemsize,
        weight_grad_bytes=4 * weight.numel() if is_trained else 0,
        adds_to_main_grad=main_grad,
        summed=settings.summed and torch.is_grad_enabled(),
    )
    head = HeadLossArgs(
        active=active,
        shard=shard,
        options=settings.options,
        backend=load_backend(OPERATION, settings.backend, hidden.device.type),
        plan=plan,
        accumulate_into_main_grad=main_grad,
        with_outputs=with_outputs,
    )
    # [n] each
    outputs = MaskedLinearCrossEntropy.apply(hidden, weight, flat_labels, flat_weights, head)
    return tuple(output.view(labels.shape[::-1]).t().contiguous() for output in outputs)


def vocab_shard(
    width: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None
) -> VocabShard:
    """This rank's columns when every rank of tp_group holds `width` of them.

    Raises:
        ValueError: they are fewer than vocab_size.
    """
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
    return VocabShard(VocabColumns(start, num_columns, vocab_size), tp_group, tp_rank, tp_size)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    num_parts: int,
    num_alone: int | None,
) -> None:
    """Raises ValueError unless hidden [s/num_parts, b, h], weight [V/tp, h] and [b, s] fit.

    Of hidden states that are those of the active tokens alone num_alone says how many there are.
    """
    batch, sequence = labels.shape
    tokens = [sequence // num_parts, batch] if num_alone is None else [num_alone, 1]
    expected = [*tokens, weight.shape[1]]
    if list(hidden.shape) != expected or sequence % num_parts:
        raise ValueError(
            f"masked_linear_cross_entropy: hidden has shape {list(hidden.shape)}, expected "
            f"[s/{num_parts}, b, h] = {expected} for labels [b, s] = {list(labels.shape)} and "
            f"weight [V/tp, h] = {list(weight.shape)}"
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
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights: got shape {list(token_weights.shape)}, expected that of labels, "
            f"{list(labels.shape)}"
        )


def check_active_tokens(active_tokens: Tensor, labels: Tensor) -> None:
    """Compares [A] with labels [n] where that does not make the host wait for a device.

    Raises:
        ValueError: they differ, or active_tokens is no list of indices.
    """
    if active_tokens.dtype != torch.int64 or active_tokens.dim() != 1:
        raise ValueError(
            f"active_tokens: got {active_tokens.dtype} {list(active_tokens.shape)}, expected int64 "
            "[A]"
        )
    if active_tokens.device.type == "cpu" and labels.device.type == "cpu":
        expected = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if not torch.equal(active_tokens, expected):
            raise ValueError(
                f"active_tokens: got {len(active_tokens)}, expected in ascending order the "
                f"{len(expected)} tokens t * b + i with labels[i, t] != {IGNORE_INDEX} and "
                "token_weights[i, t] != 0"
            )
