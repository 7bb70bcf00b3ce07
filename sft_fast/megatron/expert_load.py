"""How often the experts of each layer were chosen in a step, and what follows from it.

The routers count while they route, and the ranks add up their counts once a step, in the collective
that adds up the loss: no layer waits for another rank or for the host.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from sft_fast.config.sections import RouterConfig
from sft_fast.kernels.router import probabilities
from sft_fast.megatron.router import Router
from sft_fast.models.architecture import Architecture
from sft_fast.packing.steps import StepCounts


class ExpertLoad:
    """The counts of a step, and the losses of the routers.

    The auxiliary loss of a layer is E sum(f_e P_e): P_e is the mean probability of expert e over
    the tokens of the global batch, and f_e the mean number of copies that a token of the global
    batch before sent to it. That of the present one is known when its last micro-batch has been
    routed, and the first ones have run backward by then. So loss and gradient depend neither on
    micro-batches nor on ranks. In the first step f is even, and the loss has no gradient.

    Source: Fedus et al. 2021 (arXiv 2101.03961); z-loss, Zoph et al. 2022 (arXiv 2202.08906); over
        the global batch, Qiu et al. 2025 (arXiv 2501.11873); biases, Wang et al. 2024
        (arXiv 2408.15664).
    """

    def __init__(self, architecture: Architecture, config: RouterConfig, device: torch.device):
        """Nothing has been counted yet."""
        self.config, self.routing = config, architecture.routing
        self.num_experts = architecture.num_experts
        self.layers = architecture.expert_layers
        rows, experts = architecture.num_layers, self.num_experts
        self.seen = torch.zeros((rows, 2 * experts + 1), dtype=torch.float64, device=device)
        """[layers, 2 E + 1] of this rank in this step: copies of tokens, sums of probabilities, and
        the sum of squared log-sum-exps"""
        self.copies = torch.full((rows, experts), self.routing.num_chosen / experts, device=device)
        """fp32 [layers, E]: copies a token in the last global batch."""
        self.factor = 0.0
        """Of the sum of a loss over tokens and layers, beside losses that are sums."""

    def begin_step(self, counts: StepCounts) -> None:
        """Forgets what was counted, and learns what the losses are divided by."""
        self.seen.zero_()
        num_terms = max(counts.num_tokens, 1) * len(self.layers)
        self.factor = counts.loss_weight / num_terms

    def observe(
        self, layer: int, logits: Tensor, weights: Tensor, experts: Tensor, is_token: Tensor | None
    ) -> Tensor:
        """Counts what a router chose; returns its weights, with the gradient of the losses.

        Args:
            layer: from 0.
            logits: [T, E] fp32.
            weights: [T, k] fp32.
            experts: [T, k] int64.
            is_token: bool [T], False for padding; None = there is none.
        """
        row, num_experts = self.seen[layer], self.num_experts
        kept = logits.new_ones(len(logits)) if is_token is None else is_token.to(logits.dtype)
        # A layer that is computed again in the backward pass has been counted.
        is_first = torch._C._current_graph_task_id() == -1
        if is_first:
            copies = kept.to(row.dtype).unsqueeze(1).expand_as(experts)
            row[:num_experts].scatter_add_(0, experts.flatten(), copies.flatten())
        if not self.config.has_losses:
            return weights
        probs = probabilities(logits, self.routing) * kept.unsqueeze(1)
        squares = logits.logsumexp(1).square() * kept
        if is_first:
            row[num_experts : 2 * num_experts] += probs.detach().sum(0, dtype=row.dtype)
            row[2 * num_experts] += squares.detach().sum(dtype=row.dtype)
        balance = num_experts * (probs.sum(0) * self.copies[layer]).sum()
        loss = self.config.aux_loss_coef * balance + self.config.z_loss_coef * squares.sum()
        weights = MoEAuxLossAutoScaler.apply(weights, self.factor * loss)
        return weights

    def end_step(self, total: Tensor, num_tokens: int) -> Tensor:
        """Takes in what all ranks have seen; returns FIGURES fp64, on the device.

        Args:
            total: fp64 like `seen`.
            num_tokens: of the global batch.
        """
        counts, probs, squares = self.parts(total)
        num_tokens = max(num_tokens, 1)
        self.copies.copy_(total[:, : self.num_experts] / num_tokens)
        peaks = counts.amax(1) * self.num_experts / counts.sum(1).clamp(min=1)
        balance = self.num_experts * (counts * probs).sum(1).mean() / num_tokens**2
        return torch.stack(
            [
                peaks.mean(),
                peaks.max(),
                (counts == 0).double().mean(),
                balance,
                squares.mean() / num_tokens,
            ]
        )

    def parts(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts and sums of probabilities [layers with experts, E], sums of squares [layers]."""
        rows = total[self.layers]
        counts, probs, squares = rows.split([self.num_experts, self.num_experts, 1], dim=1)
        return counts, probs, squares.squeeze(1)

    def figures(self, values: Sequence[float]) -> dict[str, float]:
        """What `end_step` returned, by name; the losses only where they are wanted."""
        known = dict(zip(FIGURES, values, strict=True))
        if not self.config.has_losses:
            del known["router_aux_loss"], known["router_z_loss"]
        return known

    def state(self) -> dict[str, Any]:
        """To be saved: the next step of a resumed run needs it."""
        return {"copies": self.copies.tolist()} if self.config.aux_loss_coef > 0 else {}

    def load_state(self, saved: dict[str, Any]) -> None:
        """The inverse of `state`; {} of a run without the auxiliary loss changes nothing."""
        if saved:
            self.copies.copy_(torch.tensor(saved["copies"]))


FIGURES = (
    "expert_load",
    "expert_load_worst",
    "empty_experts",
    "router_aux_loss",
    "router_z_loss",
)
"""Copies of the busiest expert over the mean of its layer, as the mean and the maximum of the
layers; share of the experts without a copy; both losses as the mean over the layers, without their
coefficients."""


def routers(model: nn.Module) -> Iterator[Router]:
    """The routers of a model, or of a part of one."""
    return (module for module in model.modules() if isinstance(module, Router))


def watch_experts(
    modules: Iterable[nn.Module],
    architecture: Architecture,
    config: RouterConfig,
    device: torch.device,
) -> ExpertLoad | None:
    """Makes all routers of this rank count, and add the losses of `config` in training.

    Returns: None for a model without experts.
    """
    if not architecture.num_experts:
        return None
    load = ExpertLoad(architecture, config, device)
    for module in modules:
        for router in routers(module):
            router.load = load
    return load


@torch.no_grad()
def move_biases(modules: Iterable[nn.Module], load: ExpertLoad, total: Tensor) -> None:
    """Makes experts that were chosen less than the mean of their layer likelier in the next step.

    Args:
        modules: parts of the model.
        load: has the rate.
        total: fp64 [layers, 2 E + 1], what all ranks have seen in this step.
    """
    for module in modules:
        for router in routers(module):
            if router.expert_bias is not None:
                counts = total[router.layer_number - 1, : load.num_experts]
                signs = (counts.mean() - counts).sign()
                router.expert_bias += load.config.bias_update_rate * signs
