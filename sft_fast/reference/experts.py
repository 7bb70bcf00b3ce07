"""Oracles of a mixture of experts, one expert after the other, differentiated by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.kernels.routing import Routing
from sft_fast.reference.block import gated_activation


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x[offsets[g] : offsets[g + 1]] @ weight[g].T for each group g.

    Args:
        x: [R, in].
        weight: [G, out, in].
        offsets: [G + 1] integers from 0 to R.

    Returns:
        [R, out].
    """
    counts = offsets.diff().tolist()
    products = [rows @ matrix.t() for rows, matrix in zip(x.split(counts), weight, strict=True)]
    return torch.cat(products)


def weighted_sum(
    hidden: Tensor,
    probs: Tensor,
    experts: Tensor,
    num_experts: int,
    compute: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """What the experts make of their tokens, weighted by the router and summed, one by one.

    Args:
        hidden: [T, h].
        probs: [T, k] weights of the router.
        experts: [T, k] their experts, different ones for a token.
        num_experts: E.
        compute: (number of an expert, its tokens [n, h]) -> [n, h].

    Returns:
        [T, h].
    """
    output = torch.zeros_like(hidden)
    for number in range(num_experts):
        tokens, places = (experts == number).nonzero(as_tuple=True)
        weighted = compute(number, hidden[tokens]) * probs[tokens, places].unsqueeze(1)
        output = output.index_add(0, tokens, weighted.to(output.dtype))
    return output


def biased_expert_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    probs: Tensor,
    biases: tuple[Tensor, Tensor],
    experts: Tensor,
) -> Tensor:
    """As `expert_mlp`, with biases and the activation of gpt-oss.

    Args:
        hidden: [T, h].
        gate_up: [E, 2 f, h].
        down: [E, h, f].
        probs: [T, k].
        biases: [E, 2 f] and [E, h].
        experts: [T, k].

    Returns:
        [T, h].
    """

    def expert(number: int, x: Tensor) -> Tensor:
        inner = x @ gate_up[number].t() + biases[0][number]
        return gated_activation(inner, "clamped_silu") @ down[number].t() + biases[1][number]

    return weighted_sum(hidden, probs, experts, len(gate_up), expert)


def expert_mlp(
    hidden: Tensor, gate_up: Tensor, down: Tensor, probs: Tensor, experts: Tensor
) -> Tensor:
    """The sum of each token's experts, weighted by its router.

    Args:
        hidden: [T, h].
        gate_up: [E, 2 f, h], an expert's gate and then its up projection.
        down: [E, h, f].
        probs: [T, k] weights of the router.
        experts: [T, k] their experts, different ones for a token.

    Returns:
        [T, h].
    """

    def expert(number: int, x: Tensor) -> Tensor:
        gate, up = (x @ gate_up[number].t()).chunk(2, dim=1)
        return (functional.silu(gate) * up) @ down[number].t()

    return weighted_sum(hidden, probs, experts, len(gate_up), expert)


def choose_experts(
    logits: Tensor, routing: Routing, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, one token after the other.

    Args:
        logits: [T, E].
        routing: how they are chosen.
        bias: [E], for the choice only.

    Returns:
        weights [T, k], experts [T, k].
    """
    weights, chosen = [], []
    for row in logits:
        scores = row.sigmoid() if routing.scores == "sigmoid" else row.softmax(0)
        best = routing.scores_of_group
        wanted = scores.tolist() if bias is None else (scores + bias).tolist()
        size = len(wanted) // routing.num_groups
        groups = [range(start, start + size) for start in range(0, len(wanted), size)]
        groups.sort(key=lambda group: -sum(sorted(wanted[e] for e in group)[-best:]))
        allowed = [expert for group in groups[: routing.groups_chosen] for expert in group]
        experts = sorted(allowed, key=lambda expert: -wanted[expert])[: routing.num_chosen]
        own = scores[experts]
        weights.append(routing.scale * (own / own.sum() if routing.renormalise else own))
        chosen.append(experts)
    return torch.stack(weights), torch.tensor(chosen)


def balance_loss(probs: Tensor, experts: Tensor) -> Tensor:
    """E * sum over the experts of (mean number of a token's copies) * (mean probability).

    It is k where both are even. The number of copies has no gradient.

    Args:
        probs: [T, E], of each token.
        experts: [T, k], those that it goes to.

    Returns:
        A scalar.

    Source: Fedus et al. 2021, arXiv 2101.03961, for k experts as transformers has it.
    """
    copies = functional.one_hot(experts, probs.shape[1]).sum(1).to(probs).mean(0)
    return probs.shape[1] * (copies * probs.mean(0)).sum()


def adapted_expert_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    probs: Tensor,
    wide: tuple[Tensor, Tensor],
    narrow: tuple[Tensor, Tensor],
    experts: Tensor,
    scale: float,
) -> Tensor:
    """As `expert_mlp`, each product with scale * x A^T B^T added, as PEFT computes it.

    Args:
        hidden: [T, h].
        gate_up: [E, 2 f, h].
        down: [E, h, f].
        probs: [T, k].
        wide: A [E, r, h] and B [E, 2 f, r] of gate_up.
        narrow: A [E, r, f] and B [E, h, r] of down.
        experts: [T, k].
        scale: a factor.

    Returns:
        [T, h].
    """

    def expert(number: int, x: Tensor) -> Tensor:
        added = (x @ wide[0][number].t()) @ wide[1][number].t() * scale
        gate, up = (x @ gate_up[number].t() + added).chunk(2, dim=1)
        inner = functional.silu(gate) * up
        added = (inner @ narrow[0][number].t()) @ narrow[1][number].t() * scale
        return inner @ down[number].t() + added

    return weighted_sum(hidden, probs, experts, len(gate_up), expert)
