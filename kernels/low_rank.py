"""The adapters of one frozen matrix: what LoRA adds to a product, in few passes over its tensors.

Several projections can share a matrix, each with a pair A [r, in], B [rows, r]. One product makes
what all their A's say of the input, another adds what all their B's make of it to the output, in
place. The backward pass adds the gradient of the input to that of the frozen product, in place too.
Where nothing is exchanged between these products they are one operation, `adapted_product`.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BlockLayout:
    """Which rows of a matrix belong to which projection."""

    num_groups: int
    """Blocks in which the rows of the projections alternate."""
    widths: tuple[int, ...]
    """Rows of each projection in a block."""
    adapters: tuple[int | None, ...]
    """The number of each projection's adapter, ascending from 0; None = it has none."""

    @property
    def num_adapters(self) -> int:
        """n."""
        return sum(number is not None for number in self.adapters)

    def blocks(self, rows: Tensor) -> list[Tensor]:
        """The part of each adapted projection [groups, width, r] in rows [out, n * r]."""
        shape = self.num_groups, sum(self.widths), self.num_adapters, -1
        parts = rows.view(shape).split(self.widths, dim=1)
        return [
            part[:, :, number]
            for part, number in zip(parts, self.adapters, strict=True)
            if number is not None
        ]

    def assemble(self, b: tuple[Tensor, ...]) -> Tensor:
        """[out, n * r]: each row has the B of its projection, and 0 in the columns of the others.

        Args:
            b: of each adapted projection, [rows, r].
        """
        if len(self.widths) == 1:
            return b[0]
        num_rows = self.num_groups * sum(self.widths)
        every = b[0].new_zeros((num_rows, self.num_adapters * b[0].shape[1]))
        for block, part in zip(self.blocks(every), b, strict=True):
            block.copy_(part.view(block.shape))
        return every

    def take_apart(self, every: Tensor) -> list[Tensor]:
        """The inverse: the B [rows, r] of each adapted projection of [out, n * r]."""
        if len(self.widths) == 1:
            return [every]
        return [block.flatten(0, 1) for block in self.blocks(every)]


def adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: tuple[Tensor, ...],
    b: tuple[Tensor, ...],
    layout: BlockLayout,
    scale: float,
) -> Tensor:
    """x W^T + bias + scale * x A^T B^T, the frozen product added to that of the adapters.

    Args:
        x: [..., in].
        weight: [out, in], frozen.
        bias: [out], frozen; None = 0.
        a: of each adapter, [r, in].
        b: of each adapter, [rows, r].
        layout: of the rows.
        scale: a factor.

    Returns:
        [..., out]
    """
    return cast(Tensor, AdaptedProduct.apply(x, weight, bias, layout, scale, *a, *b))


def project_down(x: Tensor, a: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """x itself, for the frozen product, and what the adapters make of it.

    The gradient that the frozen product returns for x is written to: it must be nobody else's.

    Args:
        x: [..., in], contiguous.
        a: of each adapter, [r, in].

    Returns:
        x, and [..., n * r].
    """
    return cast(tuple[Tensor, Tensor], ProjectDown.apply(x, *a))


def add_up(
    output: Tensor, low_rank: Tensor, b: tuple[Tensor, ...], layout: BlockLayout, scale: float
) -> Tensor:
    """output + scale * low_rank B^T, written over the output.

    Args:
        output: [..., out], contiguous, of the frozen product; nobody has kept it.
        low_rank: [..., n * r].
        b: of each adapter, [rows, r].
        layout: of the rows.
        scale: a factor.
    """
    return cast(Tensor, AddUp.apply(output, low_rank, layout, scale, *b))


class AdaptedProduct(torch.autograd.Function):
    """(x, weight, bias, layout, scale, *a, *b) -> output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: BlockLayout,
        scale: float,
        *pairs: Tensor,
    ) -> Tensor:
        """[..., out]."""
        a, b = pairs[: layout.num_adapters], pairs[layout.num_adapters :]
        every_a, every_b = torch.cat(a) if len(a) > 1 else a[0], layout.assemble(b)
        rows = x.flatten(0, -2)
        low_rank = rows @ every_a.t()
        ctx.save_for_backward(rows, weight, low_rank, every_a, every_b)
        ctx.layout, ctx.scale = layout, scale
        # The large product reads what it adds to in its epilogue.
        output = scaled_product(low_rank, every_b.t(), scale, bias).addmm_(rows, weight.t())
        return output.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x [..., in], of every A [r, in] and of every B [rows, r]."""
        x, weight, low_rank, every_a, every_b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_low_rank = scaled_product(rows, every_b, ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_low_rank @ every_a).addmm_(rows, weight)
            grad_x = grad_x.unflatten(0, grad.shape[:-1])
        grad_a = (grad_low_rank.t() @ x).chunk(ctx.layout.num_adapters)
        grad_b = ctx.layout.take_apart(scaled_product(rows.t(), low_rank, ctx.scale))
        return grad_x, None, None, None, None, *grad_a, *grad_b


class ProjectDown(torch.autograd.Function):
    """(x, *a) -> x, x A^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *a: Tensor) -> tuple[Tensor, Tensor]:
        """[..., in] and [..., n * r]."""
        every = a[0] if len(a) == 1 else torch.cat(a)
        ctx.save_for_backward(x, every)
        ctx.set_materialize_grads(False)
        ctx.num_adapters = len(a)
        return x, torch.matmul(x, every.t())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor | None, grad_low_rank: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x [..., in] and of every A [r, in]."""
        if grad_low_rank is None:
            return grad_x, *[None] * ctx.num_adapters
        x, every = ctx.saved_tensors
        rows = grad_low_rank.flatten(0, -2)
        if not ctx.needs_input_grad[0]:
            grad_x = None
        elif grad_x is None:
            grad_x = torch.matmul(grad_low_rank, every)
        else:
            grad_x.view(-1, grad_x.shape[-1]).addmm_(rows, every)
        grad_every = rows.t() @ x.flatten(0, -2)
        return grad_x, *grad_every.chunk(ctx.num_adapters)


class AddUp(torch.autograd.Function):
    """(output, low_rank, layout, scale, *b) -> output, changed."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, low_rank: Tensor, layout: BlockLayout, scale: float, *b: Tensor
    ) -> Tensor:
        """[..., out]."""
        every = layout.assemble(b)
        ctx.save_for_backward(low_rank, every)
        ctx.layout, ctx.scale = layout, scale
        rows = output.view(-1, output.shape[-1])
        rows.addmm_(low_rank.flatten(0, -2), every.t(), alpha=scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the output [..., out], which is its own, of low_rank and of every B."""
        low_rank, every = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_low_rank = scaled_product(rows, every, ctx.scale).view_as(low_rank)
        grad_every = scaled_product(rows.t(), low_rank.flatten(0, -2), ctx.scale)
        return grad, grad_low_rank, None, None, *ctx.layout.take_apart(grad_every)


def scaled_product(
    left: Tensor, right: Tensor, scale: float, added: Tensor | None = None
) -> Tensor:
    """scale * left [n, m] @ right [m, k] + added [k], in one operation."""
    if added is not None:
        return torch.addmm(added, left, right, alpha=scale)
    ignored = right.new_empty(right.shape[1])
    return torch.addmm(ignored, left, right, beta=0, alpha=scale)
