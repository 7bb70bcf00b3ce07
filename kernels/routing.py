"""How a router turns the logits of a token into experts and weights; imports no torch."""

from dataclasses import dataclass
from typing import Literal

RouterScores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Routing:
    """The choice of a token's experts.

    An expert is chosen by its score plus its bias, where the router has one; its weight comes from
    the score alone.

    Source: a bias in place of an auxiliary loss, Wang et al. 2024 (arXiv 2408.15664); groups,
        DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437).
    """

    num_chosen: int
    """Experts of a token."""
    renormalise: bool = False
    """The scores of a token's experts are divided by their sum."""
    scores: RouterScores = "softmax"
    """Of an expert among all; sigmoid = by its own logit alone."""
    scale: float = 1.0
    """Factor of the weights."""
    num_groups: int = 1
    """Groups of neighbouring experts."""
    groups_chosen: int = 1
    """Groups that the experts of a token come from: those with the highest sums of scores."""
    scores_of_group: int = 2
    """Highest scores of a group that are summed, biases included."""
