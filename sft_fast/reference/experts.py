"""Oracles of a mixture of experts, one expert after the other, differentiated by autograd."""

import torch
from torch import Tensor
from torch.nn import functional


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
    output = torch.zeros_like(hidden)
    for number, (wide, narrow) in enumerate(zip(gate_up, down, strict=True)):
        tokens, places = (experts == number).nonzero(as_tuple=True)
        gate, up = (hidden[tokens] @ wide.t()).chunk(2, dim=1)
        result = (functional.silu(gate) * up) @ narrow.t()
        weighted = result * probs[tokens, places].unsqueeze(1)
        output = output.index_add(0, tokens, weighted.to(output.dtype))
    return output
