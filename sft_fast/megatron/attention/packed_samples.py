"""The contract of attention: the samples of a sequence, the score options, the signature."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional

from sft_fast.constants import round_up

MOST_PADDING = 1 / 8
"""Share of a sequence up to which its padding is attended to as a sample."""


@dataclass
class PackedSamples(PackedSeqParams):
    """What every layer must know of a micro-batch; passed as megatron's `packed_seq_params`.

    `qkv_format` stays "sbhd": the sequence is dense to megatron, only our attention sees samples.
    """

    seqlens: tuple[int, ...] = ()
    """Tokens of each padded sample, in order; the sequence may be longer than their sum."""
    active_tokens: Tensor | None = None
    """int64 [num_supervised]: tokens that have a label."""
    key_lengths: tuple[int, ...] | None = None
    """Keys of each sample where they are more than its queries; the last query sees the last key.
    None = as many as queries."""
    share: Any = None
    """Under context parallelism what this rank computes; see context_parallel.ContextShare."""
    sample_ids: Any = None
    """int64 [samples]: their numbers in the token store."""
    cp_size: int = 1
    """Context-parallel ranks that share the samples."""
    loss_rows: Tensor | None = None
    """int64 [A] on the device: the tokens that the last layer computes behind its attention, and
    the head; None = all. See loss_rows.py."""
    wants_outputs: bool = False
    """The model returns what an evaluation counts in place of losses."""
    token_weights: Tensor | None = None
    """fp32 [1, T]: factor of each token's loss; None = 1."""
    position_ids: Tensor | None = None
    """[1, T]; None = no padding is known."""
    padded_lengths: tuple[int, ...] = ()
    """`seqlens` without what stands for padding behind the samples."""
    lengths: tuple[int, ...] | None = None
    """Of the samples without their padding; None = as padded."""
    flex_masks: dict[int | None, Any] = field(default_factory=dict)
    """FlexAttention's masks by window; see flex.py."""

    @cached_property
    def is_token(self) -> Tensor | None:
        """bool [1, T], False for padding; None = there is none."""
        if self.position_ids is None:
            return None
        return token_mask(self.position_ids, self.padded_lengths, self.lengths, self.cp_size)

    @cached_property
    def groups(self) -> tuple[list[Tensor], Tensor]:
        """How dense attention takes the sequence apart and puts it together again, on the CPU.

        Returns:
            Groups of samples of similar length: token numbers int64 [samples, longest]. A shorter
            sample repeats its first token at the end; those copies come after its own tokens, so
            that none of these attends to them.
            The place of each token in the concatenated groups: int64 [sum of seqlens].
        """
        lengths = torch.tensor(self.seqlens)  # [samples]
        starts = lengths.cumsum(0) - lengths
        classes = torch.tensor([size_class(length) for length in self.seqlens])
        groups, order, num_places = [], torch.empty(int(lengths.sum()), dtype=torch.int64), 0
        for size in classes.unique():
            members = classes == size
            steps = torch.arange(int(lengths[members].max()))
            is_own = steps < lengths[members, None]
            tokens = starts[members, None] + torch.where(is_own, steps, 0)  # [samples, longest]
            places = num_places + torch.arange(tokens.numel()).view_as(tokens)
            order[tokens[is_own]] = places[is_own]
            groups.append(tokens)
            num_places += tokens.numel()
        return groups, order


def pack_samples(
    seqlens: tuple[int, ...],
    cu_seqlens: Tensor,
    active_tokens: Tensor | None = None,
    token_weights: Tensor | None = None,
    cp_size: int = 1,
    num_tokens: int = 0,
) -> PackedSamples:
    """The samples of a sequence.

    A little padding after them counts as one more sample, from which nothing is used: attention
    over the whole sequence needs no copy of a part of it. More padding would cost more than that.

    A sequence of padding alone is one sample of one token, or of the fewest that all ranks can
    share: it has to attend to something, because every weight must get its (zero) gradient, or DDP
    would wait for it.

    Args:
        seqlens: length of each padded sample, known to the host.
        cu_seqlens: int32 [samples + 1], on the device that computes.
        active_tokens: int64 [A], the tokens with a label; None = not known.
        token_weights: fp32 [1, T], factors of the loss; None = all 1.
        cp_size: context-parallel ranks that share the samples.
        num_tokens: of the sequence with its padding; 0 = it has none.
    """
    if not seqlens:
        length = 1 if cp_size == 1 else 2 * cp_size
        edges = torch.tensor([0, length], dtype=torch.int32)
        seqlens, cu_seqlens = (length,), edges.to(cu_seqlens.device, non_blocking=True)
    padding = num_tokens - sum(seqlens)
    if cp_size == 1 and 0 < padding <= num_tokens * MOST_PADDING:
        seqlens = (*seqlens, padding)
        cu_seqlens = functional.pad(cu_seqlens, (0, 1), value=num_tokens)
    longest = max(seqlens)
    return PackedSamples(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seqlens=seqlens,
        active_tokens=active_tokens,
        token_weights=token_weights,
        cp_size=cp_size,
    )


def token_mask(
    position_ids: Tensor, seqlens: tuple[int, ...], lengths: tuple[int, ...] | None, cp_size: int
) -> Tensor | None:
    """Tells the tokens of samples from padding.

    Args:
        position_ids: [1, T], as a micro-batch has them.
        seqlens: length of each padded sample, over all context-parallel ranks.
        lengths: of each without its padding; None = the same.
        cp_size: context-parallel ranks that share the samples.

    Returns:
        bool [1, T]; None where there is no padding.
    """
    num_tokens, device = position_ids.shape[1], position_ids.device
    if lengths is None:
        used = sum(seqlens) // cp_size
        return None if used == num_tokens else torch.arange(num_tokens, device=device)[None] < used
    ends = torch.tensor(seqlens, dtype=torch.int64).cumsum(0) // cp_size
    limits = torch.tensor([*lengths, 0])
    tokens = torch.arange(num_tokens, device=device)
    sample = torch.searchsorted(ends.to(device, non_blocking=True), tokens, right=True)
    return position_ids < limits.to(device, non_blocking=True)[sample]


def size_class(length: int) -> int:
    """Rounds up to a step of 32, or of an eighth to a quarter of the length where that is more."""
    step = max(32, (1 << length.bit_length()) >> 3)
    return round_up(length, step)


@dataclass(frozen=True)
class ScoreOptions:
    """What a layer does with the scores of its causal attention."""

    scale: float
    window: int | None = None
    """Tokens that a token attends to, itself and those before it; None = its whole sample."""
    softcap: float | None = None
    """Bound c of c * tanh(scores / c); None = none."""


AttentionFn = Callable[[Tensor, Tensor, Tensor, PackedSamples, ScoreOptions], Tensor]
"""(query [T, heads, head_dim], key [T, kv_heads, head_dim], value [T, kv_heads, value_dim],
samples, scoring) -> [T, heads, value_dim], where T is the sum of the samples' lengths."""
