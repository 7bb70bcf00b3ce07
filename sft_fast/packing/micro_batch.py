"""A micro-batch: one sequence of packed samples, as the tensors that the model takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft_fast import _C
from sft_fast.constants import IGNORE_INDEX
from sft_fast.data.targets import StoredTokens


@dataclass(frozen=True)
class SequenceLayout:
    """How samples lie in a sequence.

    Each is padded to a multiple of the alignment. Under context parallelism a padded sample is cut
    into 2 * cp_size equal chunks, and rank r has chunks r and 2 * cp_size - 1 - r of each: with
    causal attention all ranks do the same work.
    """

    alignment: int = 1
    """Tokens that the length of a padded sample is a multiple of; itself a multiple of 2 * cp_size
    where cp_size > 1."""
    cp_size: int = 1
    """Context-parallel size."""
    cp_rank: int = 0
    """The rank whose share is filled."""


PLAIN_LAYOUT = SequenceLayout()


@dataclass(frozen=True)
class MicroBatch:
    """One sequence of T tokens: padded samples one after another, then padding.

    Where alignment is 1, a padded sample is exactly a sample. Padding behind a sample is attended
    to by padding only, attention being causal. Under context parallelism the T tokens are one
    rank's share.

    Attributes:
        tokens: int64 or int32 [1, T]; 0 on padding.
        labels: like tokens, already shifted: the next token of the same sample if it is
            supervised, else IGNORE_INDEX.
        position_ids: like tokens; from 0 in each padded sample, 0 after the last one.
        cu_seqlens: int32 [num_samples + 1]; padded sample i is tokens cu_seqlens[i] to
            cu_seqlens[i + 1] of the sequence of all context-parallel ranks.
        active_tokens: int64 [num_supervised], ascending: the tokens with a label.
        seqlens: length of each padded sample, known to the host without asking a device.
        max_seqlen: length of the longest one; 0 without samples.
        num_samples: samples in the sequence.
        num_tokens: tokens without padding.
        num_supervised: tokens with a label.
        weights: float32 [1, T], factor of the loss of tokens with a label, else 0; None = all 1.
        layout: how the samples lie in the sequence.
        sample_ids: int64 [num_samples], their numbers in the store; None = not known.
        lengths: of the samples without their padding; None = as padded.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    active_tokens: Tensor
    seqlens: tuple[int, ...]
    max_seqlen: int
    num_samples: int
    num_tokens: int
    num_supervised: int
    weights: Tensor | None = None
    layout: SequenceLayout = PLAIN_LAYOUT
    sample_ids: NDArray[np.int64] | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str, *, copy: bool = False) -> "MicroBatch":
        """Returns the micro-batch on `device`; from pinned memory the host does not wait.

        active_tokens stays where it is: the loss reads each rank's count from it on the host.

        Args:
            device: where the tensors go.
            copy: the result shares no memory with this one, so that its buffers can be filled
                again once the device has read them.
        """
        names = ["tokens", "labels", "position_ids", "cu_seqlens"]
        if self.weights is not None:
            names.append("weights")
        # A copy to the host must be there when it is read.
        is_host = torch.device(device).type == "cpu"
        moved = {
            name: getattr(self, name).to(device, non_blocking=not is_host, copy=copy)
            for name in names
        }
        if copy:
            moved["active_tokens"] = self.active_tokens.clone()
        return replace(self, **moved)

    def check(self, vocab_size: int) -> None:
        """Verifies every statement of the class docstring; meant for CPU tensors.

        Raises:
            ValueError: naming the first tensor that is wrong, and how.
        """
        self.check_shapes()
        require("tokens", is_within(self.tokens, 0, vocab_size), f"ids outside [0, {vocab_size})")
        edges, alignment = self.cu_seqlens.long(), self.layout.alignment
        padded, end = edges.diff(), int(edges[-1])
        in_order = int(edges[0]) == 0 and bool((padded > 0).all())
        require("cu_seqlens", in_order, "not strictly ascending from 0")
        require("cu_seqlens", not (padded % alignment).any(), f"not in multiples of {alignment}")
        if self.layout.cp_size == 1:
            padding = end - self.num_tokens
            is_filled = 0 <= padding <= (alignment - 1) * self.num_samples
            require("cu_seqlens", is_filled, f"ends at {end}")
        seq_length = self.tokens.shape[1] * self.layout.cp_size
        require("tokens", end <= seq_length, f"{end} do not fit")
        require("seqlens", padded.tolist() == list(self.seqlens), "not the steps of cu_seqlens")
        longest = int(padded.max()) if self.num_samples else 0
        require("max_seqlen", longest == self.max_seqlen, f"the longest sample has {longest}")
        positions, sample_index = self.places()
        is_counting = torch.equal(self.position_ids[0].long(), positions)
        require("position_ids", is_counting, "not 0, 1, ... per sample")
        labelled = self.labels[0] != IGNORE_INDEX
        require("labels", not labelled[sample_index < 0].any(), "padding has a label")
        is_last = positions + 1 == torch.cat([padded, padded.new_zeros(1)])[sample_index]
        require("labels", not labelled[is_last].any(), "a sample's last token has a label")
        active = labelled.nonzero().flatten()
        # The next token may be on another rank.
        here = active[active + 1 < len(positions)]
        here = here[sample_index[here + 1] == sample_index[here]]
        here = here[positions[here + 1] == positions[here] + 1]
        is_next = torch.equal(self.labels[0, here], self.tokens[0, here + 1])
        require("labels", is_next, "a label is not the next token")
        is_labelled = torch.equal(self.active_tokens, active)
        require("active_tokens", is_labelled, "not the tokens with a label")
        if self.weights is not None:
            is_masked = not self.weights[0, ~labelled].any()
            require("weights", is_masked, "not 0 on a token without a label")
            is_positive = bool((self.weights[0, labelled] > 0).all())
            require("weights", is_positive, "not above 0 on a token with a label")

    def places(self) -> tuple[Tensor, Tensor]:
        """Returns what cu_seqlens and the layout say of each token: position and sample index.

        Both int64 [T]; position 0 and index -1 after the last padded sample.
        """
        cp_size, cp_rank = self.layout.cp_size, self.layout.cp_rank
        seq_length = self.tokens.shape[1]
        positions = torch.zeros(seq_length, dtype=torch.int64)
        sample_index = torch.full((seq_length,), -1, dtype=torch.int64)
        begin = 0
        for index, length in enumerate(self.seqlens):
            share = torch.arange(length)
            if cp_size > 1:
                chunks = share.chunk(2 * cp_size)
                share = torch.cat([chunks[cp_rank], chunks[-1 - cp_rank]])
            positions[begin : begin + len(share)] = share
            sample_index[begin : begin + len(share)] = index
            begin += len(share)
        return positions, sample_index

    def check_shapes(self) -> None:
        """Verifies shapes and dtypes; raises ValueError as `check` does."""
        shape_of_ids = (1, self.tokens.shape[-1])
        ids = torch.int32 if self.tokens.dtype == torch.int32 else torch.int64
        expected = {
            "tokens": (shape_of_ids, ids),
            "labels": (shape_of_ids, ids),
            "position_ids": (shape_of_ids, ids),
            "cu_seqlens": ((self.num_samples + 1,), torch.int32),
            "active_tokens": ((self.num_supervised,), torch.int64),
        }
        if self.weights is not None:
            expected["weights"] = (shape_of_ids, torch.float32)
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            require(
                name,
                tensor.shape == shape and tensor.dtype == dtype,
                f"{tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}",
            )


def sample_index(tokens: Tensor, seqlens: Sequence[int], cp_size: int) -> Tensor:
    """int64 [n] on the CPU: which sample of its sequence each token belongs to.

    Args:
        tokens: int64 [n], places in a rank's share of the sequence, none in padding at its end.
        seqlens: length of each padded sample, over all ranks.
        cp_size: ranks that share every sample.
    """
    ends = torch.tensor(seqlens, dtype=torch.int64).cumsum(0) // cp_size
    return torch.searchsorted(ends, tokens.cpu(), right=True)


def require(name: str, holds: bool | Tensor, problem: str) -> None:
    """Raises ValueError about the micro-batch's tensor `name` unless `holds`."""
    if not holds:
        raise ValueError(f"MicroBatch.{name}: {problem}")


def is_within(ids: Tensor, begin: int, end: int) -> bool:
    """True if all ids are in [begin, end)."""
    # int32 ids cannot be compared with a bound of 2^31 or more.
    wide = ids.long()
    return bool(((wide >= begin) & (wide < end)).all())


class SequenceBuffers:
    """Memory for one micro-batch at a time, filled again and again.

    A micro-batch made of these buffers is overwritten by the next one.
    """

    def __init__(
        self,
        seq_length: int,
        max_samples: int,
        *,
        dtype: torch.dtype = torch.int64,
        has_weights: bool = False,
        pin_memory: bool = False,
    ) -> None:
        """Allocates.

        Args:
            seq_length: tokens of one rank's share, at most.
            max_samples: samples per sequence, at most.
            dtype: of tokens, labels and position_ids: torch.int64 or torch.int32.
            has_weights: also a buffer for weights.
            pin_memory: page-locked, so that copies to a GPU do not wait.
        """
        if dtype not in (torch.int64, torch.int32):
            raise ValueError(f"dtype is {dtype}; expected torch.int64 or torch.int32")
        if seq_length < 1 or max_samples < 0:
            raise ValueError(
                f"seq_length is {seq_length}, max_samples {max_samples}; expected at least 1 and 0"
            )

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, pin_memory=pin_memory)

        self.tokens, self.labels, self.position_ids = (empty(seq_length, dtype) for _ in range(3))
        self.active_tokens = empty(seq_length, torch.int64)
        self.cu_seqlens = empty(max_samples + 1, torch.int32)
        self.weights = empty(seq_length, torch.float32) if has_weights else None


def fill_micro_batch(
    store: StoredTokens,
    sample_ids: Sequence[int] | NDArray[np.int64],
    seq_length: int,
    *,
    layout: SequenceLayout = PLAIN_LAYOUT,
    dtype: torch.dtype = torch.int64,
    buffers: SequenceBuffers | None = None,
    pin_memory: bool = False,
) -> MicroBatch:
    """Builds a micro-batch from stored samples.

    Args:
        store: the samples.
        sample_ids: [n], in the order in which they are to lie in the sequence; may be empty.
        seq_length: tokens over all context-parallel ranks, at least the padded samples' total and a
            multiple of cp_size; the rest is padding.
        layout: alignment, and the share of the sequence to fill.
        dtype: of tokens, labels and position_ids: torch.int64 or torch.int32.
        buffers: filled and returned as views, in place of new tensors; its dtype and memory count.
        pin_memory: new tensors are page-locked, so that `MicroBatch.to` a GPU does not wait.

    Raises:
        ValueError: the samples do not fit or do not exist, or the store is inconsistent.
    """
    if seq_length < 1 or layout.cp_size < 1 or seq_length % layout.cp_size != 0:
        raise ValueError(
            f"seq_length is {seq_length}; expected at least 1, and a multiple of the "
            f"context-parallel size ({layout.cp_size})"
        )
    ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
    length, token_weights = seq_length // layout.cp_size, store.weights
    has_weights = token_weights is not None
    if buffers is None:
        buffers = SequenceBuffers(
            length, len(ids), dtype=dtype, has_weights=has_weights, pin_memory=pin_memory
        )
    if len(buffers.tokens) < length or len(buffers.cu_seqlens) <= len(ids):
        raise ValueError(
            f"buffers hold {len(buffers.tokens)} tokens and {len(buffers.cu_seqlens) - 1} samples; "
            f"expected at least {length} and {len(ids)}"
        )
    if has_weights and buffers.weights is None:
        raise ValueError("buffers have no weights and the store has some; see SequenceBuffers")
    names = ("tokens", "labels", "position_ids")
    views = {name: getattr(buffers, name)[:length] for name in names}
    views["cu_seqlens"] = buffers.cu_seqlens[: len(ids) + 1]
    views["active_tokens"] = buffers.active_tokens[:length]
    weights = buffers.weights[:length] if has_weights and buffers.weights is not None else None
    # By place: looking up names takes longer than a short sequence.
    num_tokens, num_supervised, max_seqlen = _C.fill_micro_batch(
        store.tokens,
        store.supervised_bits,
        store.offsets,
        ids,
        IGNORE_INDEX,
        *(view.numpy() for view in views.values()),
        token_weights=None if token_weights is None else token_weights.view(np.uint16),
        weights=None if weights is None else weights.numpy(),
        alignment=layout.alignment,
        cp_size=layout.cp_size,
        cp_rank=layout.cp_rank,
    )
    return MicroBatch(
        tokens=views["tokens"][None],
        labels=views["labels"][None],
        position_ids=views["position_ids"][None],
        cu_seqlens=views["cu_seqlens"],
        active_tokens=views["active_tokens"][:num_supervised],
        seqlens=tuple(np.diff(views["cu_seqlens"].numpy()).tolist()),
        max_seqlen=max_seqlen,
        num_samples=len(ids),
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        weights=None if weights is None else weights[None],
        layout=layout,
        sample_ids=ids,
        lengths=None if layout.alignment == 1 else tuple(lengths_of(store, ids).tolist()),
    )


def lengths_of(store: StoredTokens, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: tokens of each sample."""
    lengths: NDArray[np.int64] = store.offsets[sample_ids + 1] - store.offsets[sample_ids]
    return lengths
