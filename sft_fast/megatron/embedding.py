"""The embedding of tokens, whose gradient is added to the rows of its tokens only.

megatron's makes a matrix of the vocabulary's size for every micro-batch, most of it zeros, and adds
all of it to the fp32 buffer.
"""

from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RowEmbedding(VocabParallelEmbedding):
    """megatron's, where a rank has the whole vocabulary and DDP a buffer for its gradient."""

    has_head: bool
    """The LM head of the same pipeline stage has the same weight."""

    def forward(self, input_: Tensor) -> Tensor:
        """[b, s, h] of tokens [b, s]."""
        if not (self.weight.requires_grad and hasattr(self.weight, "main_grad")):
            return cast(Tensor, super().forward(input_))
        return cast(Tensor, RowLookup.apply(input_, self.weight, self.has_head))


class RowLookup(torch.autograd.Function):
    """(tokens, weight, whether the head has the weight too) -> embeddings."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, has_head: bool) -> Tensor:
        """[..., h] of tokens [...]."""
        ctx.save_for_backward(tokens, weight)
        ctx.has_head = has_head
        return functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        """Adds the gradient [..., h] to main_grad, and returns a stand-in for DDP's hook."""
        tokens, weight = ctx.saved_tensors
        add_rows_(weight.main_grad, tokens.flatten(), grad.flatten(0, -2))
        if ctx.has_head:
            # The head's own gradient says whether the hook has something to add.
            return None, None, None
        weight.grad_added_to_main_grad = True
        return None, weight.detach(), None


def add_rows_(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """total[tokens[i]] += rows[i] for every i; the same bits in every run.

    Args:
        total: [V, h], in rows' dtype or wider.
        tokens: int64 [T].
        rows: [T, h].
    """
    ordered, order = tokens.sort(stable=True)
    is_new = functional.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    number = is_new.cumsum(0) - 1  # of each distinct token, 0 to at most T - 1
    numbers = torch.empty_like(number).scatter_(0, order, number)
    sums = torch.ops.aten.embedding_dense_backward(
        rows.to(total.dtype), numbers, len(tokens), -1, False
    )
    # Numbers that no token has add zeros to the first one's row: their order does not matter.
    distinct = ordered[:1].repeat(len(tokens)).scatter_(0, number, ordered)
    total.index_add_(0, distinct, sums)


def use_row_embedding(model: GPTModel, has_head: bool) -> None:
    """Gives the model's embedding the gradient above where this rank has the whole vocabulary.

    Args:
        model: a part with an embedding.
        has_head: it has an LM head, of the same weight.
    """
    embedding: Any = model.embedding.word_embeddings
    if embedding.tp_group.size() > 1:
        return
    embedding.__class__ = RowEmbedding
    embedding.has_head = has_head
    # Else the head would return zeros of the weight's size for the embedding's gradient.
    embedding.weight.zero_out_wgrad = False
