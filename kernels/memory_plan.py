"""How much of the logits is in memory at a time. Without torch: `sft_fast plan` asks as well."""

from dataclasses import dataclass
from typing import Literal, get_args

from sft_fast.constants import ceil_div

Policy = Literal["auto", "stored", "gradient_in_forward", "recompute"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

MIN_CHUNK_ROWS = 4096
"""Rows that a chunk may have whatever the budget: with fewer, the products become bound by reading
and writing the weight and its gradient."""


@dataclass(frozen=True)
class MemoryPlan:
    """How many rows have their logits in memory at a time, and what the backward pass gets."""

    policy: Policy
    """not `auto`"""
    chunk_rows: int

    @classmethod
    def choose(
        cls,
        policy: Policy,
        budget: int,
        num_rows: int,
        row_bytes: int,
        weight_grad_bytes: int,
        adds_to_main_grad: bool,
        summed: bool,
    ) -> "MemoryPlan":
        """Chooses from numbers that are the same on all tensor-parallel ranks.

        Args:
            policy: the one to use; `auto` chooses the first of POLICIES within the budget, and
                `stored` also where no other would take less memory.
            budget: bytes for logits, and as many again for a buffer that avoids computing twice.
            num_rows: active rows.
            row_bytes: size of one row of logits on this rank.
            weight_grad_bytes: fp32 buffer in which gradient_in_forward sums the weight's gradient,
                and recompute too unless it is added to main_grad; 0 for a frozen head.
            adds_to_main_grad: it is.
            summed: see masked_linear_cross_entropy.
        """
        num_chunks = max(1, ceil_div(num_rows, max(MIN_CHUNK_ROWS, budget // row_bytes)))
        chunk_rows = max(1, ceil_div(num_rows, num_chunks))
        if policy == "auto":
            in_forward = summed and (weight_grad_bytes <= budget or not adds_to_main_grad)
            chunked_bytes = chunk_rows * row_bytes
            if in_forward or not adds_to_main_grad:
                chunked_bytes += weight_grad_bytes
            policy = "gradient_in_forward" if in_forward else "recompute"
            if num_rows * row_bytes <= chunked_bytes:
                policy = "stored"
        return cls(policy, max(1, num_rows) if policy == "stored" else chunk_rows)

    def chunks(self, num_rows: int) -> list[slice]:
        """At least one, so that collectives run even where there is nothing to do."""
        starts = range(0, max(1, num_rows), self.chunk_rows)
        return [slice(start, min(start + self.chunk_rows, num_rows)) for start in starts]
