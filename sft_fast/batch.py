"""A micro-batch: one packed row of samples, as the tensors that the model takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft_fast import _C
from sft_fast.constants import IGNORE_INDEX


class TokenStore(Protocol):
    """What filling reads; `sft_fast.data.store.TokenStore` is one."""

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """uint32 [total]."""

    @property
    def supervised_bits(self) -> NDArray[np.uint8]:
        """uint8 [ceil(total / 8)], little-endian bits; 1 = the token is a target."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [num_samples + 1]; sample i is tokens[offsets[i]:offsets[i + 1]]."""


@dataclass(frozen=True)
class MicroBatch:
    """One row of T tokens: samples one after another, then padding.

    Attributes:
        tokens: int64 [1, T]; 0 on padding.
        labels: int64 [1, T], already shifted: the next token of the same sample if it is
            supervised, else IGNORE_INDEX.
        position_ids: int64 [1, T]; from 0 in each sample, 0 on padding.
        cu_seqlens: int32 [num_samples + 1]; sample i is rows cu_seqlens[i] to cu_seqlens[i + 1].
            Padding comes after the last.
        active_rows: int64 [num_supervised], ascending: the rows with a label.
        seqlens: length of each sample, known to the host without asking a device.
        max_seqlen: length of the longest sample; 0 without samples.
        num_samples: samples in the row.
        num_tokens: tokens without padding.
        num_supervised: rows with a label.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    active_rows: Tensor
    seqlens: tuple[int, ...]
    max_seqlen: int
    num_samples: int
    num_tokens: int
    num_supervised: int

    @property
    def loss_mask(self) -> Tensor:
        """float32 [1, T]; 1 on rows with a label, else 0."""
        return (self.labels != IGNORE_INDEX).float()

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Returns the micro-batch on `device`; from pinned memory the host does not wait.

        active_rows stays where it is: the loss reads each rank's count from it on the host.
        """
        names = ("tokens", "labels", "position_ids", "cu_seqlens")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)

    def check(self, vocab_size: int) -> None:
        """Verifies every statement of the class docstring; meant for CPU tensors.

        Raises:
            ValueError: naming the first tensor that is wrong, and how.
        """
        self.check_shapes()
        require("tokens", is_within(self.tokens, 0, vocab_size), f"ids outside [0, {vocab_size})")
        edges = self.cu_seqlens.long()
        lengths = edges.diff()
        in_order = int(edges[0]) == 0 and bool((lengths > 0).all())
        require("cu_seqlens", in_order, "not strictly ascending from 0")
        require("cu_seqlens", int(edges[-1]) == self.num_tokens, f"ends at {int(edges[-1])}")
        require("tokens", self.num_tokens <= self.tokens.shape[1], f"{self.num_tokens} do not fit")
        require("seqlens", lengths.tolist() == list(self.seqlens), "not the steps of cu_seqlens")
        longest = int(lengths.max()) if self.num_samples else 0
        require("max_seqlen", longest == self.max_seqlen, f"longest sample is {longest}")
        positions = torch.zeros_like(self.position_ids)
        starts = edges[:-1].repeat_interleave(lengths)
        positions[0, : self.num_tokens] = torch.arange(self.num_tokens) - starts
        require(
            "position_ids", torch.equal(self.position_ids, positions), "not 0, 1, ... per sample"
        )
        labelled = self.labels[0] != IGNORE_INDEX
        require("labels", not labelled[self.num_tokens :].any(), "a padding row has a label")
        require("labels", not labelled[edges[1:] - 1].any(), "a sample's last row has a label")
        rows = labelled.nonzero().flatten()
        # The last row of all is never labelled, so row + 1 exists.
        is_next = torch.equal(self.labels[0, rows], self.tokens[0, rows + 1])
        require("labels", is_next, "a label is not the next token")
        require("active_rows", torch.equal(self.active_rows, rows), "not the rows with a label")

    def check_shapes(self) -> None:
        """Verifies shapes and dtypes; raises ValueError as `check` does."""
        row = (1, self.tokens.shape[-1])
        for name, shape, dtype in (
            ("tokens", row, torch.int64),
            ("labels", row, torch.int64),
            ("position_ids", row, torch.int64),
            ("cu_seqlens", (self.num_samples + 1,), torch.int32),
            ("active_rows", (self.num_supervised,), torch.int64),
        ):
            tensor = getattr(self, name)
            require(
                name,
                tensor.shape == shape and tensor.dtype == dtype,
                f"{tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}",
            )


def require(name: str, holds: bool | Tensor, problem: str) -> None:
    """Raises ValueError about the micro-batch's tensor `name` unless `holds`."""
    if not holds:
        raise ValueError(f"MicroBatch.{name}: {problem}")


def is_within(ids: Tensor, begin: int, end: int) -> bool:
    """True if all ids are in [begin, end)."""
    return bool(((ids >= begin) & (ids < end)).all())


def fill_micro_batch(
    store: TokenStore,
    sample_ids: Sequence[int] | NDArray[np.int64],
    num_rows: int,
    *,
    pin_memory: bool = False,
) -> MicroBatch:
    """Builds a micro-batch from stored samples.

    Args:
        store: the samples.
        sample_ids: [n], in the order in which they are to lie in the row; may be empty.
        num_rows: T, at least the samples' total; the rest is padding.
        pin_memory: page-locked tensors, so that `MicroBatch.to` a GPU does not wait.

    Raises:
        ValueError: the samples do not fit or do not exist, or the store is inconsistent.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}; expected at least 1")
    ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
    row_tensors = [
        torch.empty(num_rows, dtype=torch.int64, pin_memory=pin_memory) for _ in range(4)
    ]
    tokens, labels, position_ids, active_rows = row_tensors
    cu_seqlens = torch.empty(len(ids) + 1, dtype=torch.int32, pin_memory=pin_memory)
    num_tokens, num_supervised, max_seqlen = _C.fill_micro_batch(
        store.tokens,
        store.supervised_bits,
        store.offsets,
        ids,
        ignore_index=IGNORE_INDEX,
        tokens=tokens.numpy(),
        labels=labels.numpy(),
        position_ids=position_ids.numpy(),
        cu_seqlens=cu_seqlens.numpy(),
        active_rows=active_rows.numpy(),
    )
    return MicroBatch(
        tokens=tokens[None],
        labels=labels[None],
        position_ids=position_ids[None],
        cu_seqlens=cu_seqlens,
        active_rows=active_rows[:num_supervised],
        seqlens=tuple(cu_seqlens.diff().tolist()),
        max_seqlen=max_seqlen,
        num_samples=len(ids),
        num_tokens=num_tokens,
        num_supervised=num_supervised,
    )
