"""Spreads the bins of a step over data-parallel ranks so that none waits for another.

Only who computes a bin is decided here, and in which micro-batch; which bins form a step is not.
All arithmetic is on integers, so every rank arrives at the same answer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_fast.constants import ceil_div

MAX_COST = 2**62


@dataclass(frozen=True)
class CostModel:
    """What a bin costs: linear * tokens + quadratic * sum(length^2) + head * supervised tokens.

    The unit does not matter, only the ratios do. The default is that of a Llama of 8 billion
    parameters: CostModel.of_shape(4096, 32, 128256).

    Attributes:
        linear: of a token, for everything but attention and the LM head.
        quadratic: of a squared sample length, for causal attention.
        head: of a supervised token, for the LM head; other rows skip it.
    """

    linear: int = 49152
    quadratic: int = 1
    head: int = 4008

    @classmethod
    def of_shape(cls, hidden_size: int, num_layers: int, vocab_size: int) -> "CostModel":
        """Returns the model of a transformer whose MLP has twice the weights of its attention.

        In matrix FLOPs of the forward pass (the backward pass has the same ratios), per layer and
        divided by 2 * hidden_size: weights 24 h^2 a token, causal attention 2 h s^2 a sample, and
        LM head 2 h V / num_layers a supervised token.

        Raises:
            ValueError: an argument is not positive.
        """
        if min(hidden_size, num_layers, vocab_size) < 1:
            raise ValueError(
                f"hidden_size {hidden_size}, num_layers {num_layers}, vocab_size {vocab_size}; "
                "expected all at least 1"
            )
        return cls(12 * hidden_size, 1, ceil_div(vocab_size, num_layers))

    def check(self, num_tokens: int, longest: int) -> None:
        """Raises ValueError if a coefficient is no int >= 0, or if costs do not fit in int64.

        Args:
            num_tokens: tokens whose costs are ever summed.
            longest: tokens of the longest sample.
        """
        values = (self.linear, self.quadratic, self.head)
        if any(type(value) is not int or value < 0 for value in values) or not any(values):
            raise ValueError(f"{self}: expected integers of at least 0, not all 0")
        if (self.linear + self.head + self.quadratic * longest) * num_tokens > MAX_COST:
            raise ValueError(f"{self}: a step of {num_tokens} tokens costs more than 2^62; scale")

    def costs(
        self, lengths: NDArray[np.int32], num_supervised: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Returns the cost of each sample, int64 [N], from its length and supervised tokens."""
        tokens = lengths.astype(np.int64)
        return (self.linear + self.quadratic * tokens) * tokens + self.head * num_supervised.astype(
            np.int64
        )


DEFAULT_COST_MODEL = CostModel()


def balance(costs: NDArray[np.int64], dp_size: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Assigns the bins of a step to micro-batches.

    Ranks wait for each other at every micro-batch (FSDP, pipeline flushes) or at the end of the
    step, so both are balanced: a micro-step takes neighbours in cost, and inside it the rank that
    has done least so far gets the most. The most expensive micro-step is the first, so that
    memory peaks at once.

    Args:
        costs: int64 [num_bins]; num_bins is a multiple of dp_size * micro_batch_size.
        dp_size: data-parallel ranks.
        micro_batch_size: bins of a micro-batch.

    Returns:
        int64 [num_microbatches, dp_size, micro_batch_size], places in `costs`, each once.
    """
    order = np.argsort(-costs, kind="stable")
    micro_steps = order.reshape(-1, dp_size * micro_batch_size)
    assigned = np.empty((len(micro_steps), dp_size, micro_batch_size), np.int64)
    totals = np.zeros(dp_size, np.int64)
    for micro_step, bins in zip(assigned, micro_steps, strict=True):
        shares = split_evenly(bins, costs, dp_size)
        share_costs = costs[shares].sum(axis=1)
        ranks = np.argsort(totals, kind="stable")
        by_cost = np.argsort(-share_costs, kind="stable")
        micro_step[ranks] = shares[by_cost]
        totals[ranks] += share_costs[by_cost]
    return assigned


def split_evenly(
    bins: NDArray[np.int64], costs: NDArray[np.int64], num_shares: int
) -> NDArray[np.int64]:
    """Splits bins into shares of equal number and nearly equal cost.

    Args:
        bins: int64 [num_shares * n], descending in cost.
        costs: int64, of every bin.
        num_shares: how many shares.

    Returns:
        int64 [num_shares, n]. The `num_shares` most expensive bins go to one share each,
        then the next ones, the most expensive to the share with least so far.
    """
    rounds = bins.reshape(-1, num_shares)
    shares = np.empty_like(rounds)
    totals = np.zeros(num_shares, np.int64)
    for share, one_each in zip(shares, rounds, strict=True):
        cheapest = np.argsort(totals, kind="stable")
        share[cheapest] = one_each
        totals[cheapest] += costs[one_each]
    return shares.T


def round_robin(num_bins: int, dp_size: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Returns the assignment that `balance` improves on: bins as they come, ranks taking turns.

    int64 [micro-steps, dp_size, micro_batch_size]
    """
    return np.arange(num_bins).reshape(-1, dp_size, micro_batch_size)


def imbalance(costs: NDArray[np.int64], assigned: NDArray[np.int64]) -> float:
    """Returns how much longer a step takes than with equal ranks, at least 1.

    The most expensive rank's cost over the mean cost, both summed over micro-steps.

    Args:
        costs: int64 [bins].
        assigned: int64 [micro-steps, dp_size, micro_batch_size], of bins.
    """
    per_rank = costs[assigned].sum(axis=2)
    total = int(per_rank.sum())
    return int(per_rank.max(axis=1).sum()) * per_rank.shape[1] / total if total else 1.0
