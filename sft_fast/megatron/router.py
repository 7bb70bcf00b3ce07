"""The router of a layer of experts: megatron's, but for how it chooses and what it returns."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from sft_fast.kernels.router import choose_experts, router_logits
from sft_fast.kernels.routing import Routing
from sft_fast.models.architecture import Architecture


class RouterWatch(Protocol):
    """Sees what a router chooses; see expert_load.ExpertLoad."""

    def observe(
        self, layer: int, logits: Tensor, weights: Tensor, experts: Tensor, is_token: Tensor | None
    ) -> Tensor:
        """The weights [T, k], perhaps with the gradient of a loss."""


class Router(TopKRouter):
    """Names the experts of each token, in fp32; megatron's marks them in a table of all."""

    choice: Routing
    expert_bias: Tensor | None
    """[E] fp32, added to the scores of experts for the choice; None = 0."""
    load: RouterWatch | None = None
    """Sees what is chosen in training, and adds losses; None = nobody does."""

    def choose_by(self, architecture: Architecture) -> None:
        """Takes over how the model chooses experts, with a bias for them where it has one."""
        self.choice = architecture.routing
        if architecture.has_expert_bias:
            del self.expert_bias
            zeros = torch.zeros(architecture.num_experts, device=self.weight.device)
            self.register_buffer("expert_bias", zeros)

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, E] fp32 of [s, b, h]."""
        logits = router_logits(input.flatten(0, 1), self.weight)
        return logits.unflatten(0, input.shape[:2])

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [tokens, chosen] fp32, experts [tokens, chosen]) of logits [s, b, E].

        padding_mask [s, b] is False for padding.
        """
        logits = logits.flatten(0, 1)
        weights, experts = choose_experts(logits, self.choice, self.expert_bias)
        if self.training and self.load is not None:
            is_token = None if padding_mask is None else padding_mask.flatten()
            layer = self.layer_number - 1
            weights = self.load.observe(layer, logits, weights, experts, is_token)
        return weights, experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the bias with the model, but never rounds it: updates are far below its values."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.expert_bias = bias.to(self.weight.device)
        return self
