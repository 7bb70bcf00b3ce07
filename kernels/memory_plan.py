"""How much of the logits is in memory at a time. Imports no torch: `sft_fast plan` asks as well."""

from dataclasses import dataclass

from sft_fast.constants import ceil_div
from sft_fast.kernels.loss_options import Policy

MIN_CHUNK_TOKENS = 4096
"""Tokens that a chunk may have whatever the budget: with fewer, the products become bound by
reading and writing the weight and its gradient."""


@dataclass(frozen=True)
class MemoryPlan:
    """How many tokens have their logits in memory at a time, and what the backward pass gets."""

    policy: Policy
    """not `auto`"""
    chunk_tokens: int

    @classmethod
    def choose(
        cls,
        policy: Policy,
        budget: int,
        num_tokens: int,
        bytes_per_token: int,
        weight_grad_bytes: int,
        adds_to_main_grad: bool,
        summed: bool,
    ) -> "MemoryPlan":
        """Chooses from numbers that are the same on all tensor-parallel ranks.

        Args:
            policy: the one to use; `auto` chooses the first within the budget, and
                `stored` also where no other would take less memory.
            budget: bytes for logits, and as many again for a buffer that avoids computing twice.
            num_tokens: active tokens.
            bytes_per_token: of its logits on this rank.
            weight_grad_bytes: fp32 buffer in which gradient_in_forward sums the weight's gradient,
                and recompute too unless it is added to main_grad; 0 for a frozen head.
            adds_to_main_grad: it is.
            summed: see HeadSettings.
        """
        most_tokens = max(MIN_CHUNK_TOKENS, budget // bytes_per_token)
        num_chunks = max(1, ceil_div(num_tokens, most_tokens))
        chunk_tokens = max(1, ceil_div(num_tokens, num_chunks))
        if policy == "auto":
            in_forward = summed and (weight_grad_bytes <= budget or not adds_to_main_grad)
            chunked_bytes = chunk_tokens * bytes_per_token
            if in_forward or not adds_to_main_grad:
                chunked_bytes += weight_grad_bytes
            policy = "gradient_in_forward" if in_forward else "recompute"
            if num_tokens * bytes_per_token <= chunked_bytes:
                policy = "stored"
        return cls(policy, max(1, num_tokens) if policy == "stored" else chunk_tokens)

    def chunks(self, num_tokens: int) -> list[slice]:
        """At least one, so that collectives run even where there is nothing to do."""
        starts = range(0, max(1, num_tokens), self.chunk_tokens)
        return [slice(start, min(start + self.chunk_tokens, num_tokens)) for start in starts]
