"""The oracle is proved against PyTorch's own cross-entropy and by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft_fast.constants import IGNORE_INDEX
from sft_fast.reference.cross_entropy import (
    cross_entropy,
    linear_cross_entropy,
    sharded_cross_entropy,
)


def problem(num_rows: int = 6, vocab_size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 100 + vocab_size)
    logits = 3 * torch.randn(num_rows, vocab_size, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[::3] = IGNORE_INDEX
    return logits.requires_grad_(), labels


def test_equals_pytorch_loss_and_gradient() -> None:
    logits, labels = problem(50, 33)
    upstream = torch.randn(50, dtype=torch.float64)
    theirs = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    (theirs_grad,) = torch.autograd.grad(theirs, logits, upstream)
    loss = cross_entropy(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    torch.testing.assert_close(loss, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, theirs_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_equal_the_whole(num_shards: int) -> None:
    logits, labels = problem(50, 32)
    labels[1:5] = torch.tensor([0, 15, 16, 31])
    upstream = torch.randn(50, dtype=torch.float64)
    whole = cross_entropy(logits, labels)
    merged = sharded_cross_entropy(logits, labels, num_shards)
    torch.testing.assert_close(merged, whole, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (merged, whole)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_gradients_equal_finite_differences() -> None:
    logits, labels = problem()
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, labels), logits)
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, labels, 12), logits)
    assert torch.autograd.gradcheck(lambda logits: sharded_cross_entropy(logits, labels, 3), logits)


def test_linear_gradients_equal_finite_differences() -> None:
    hidden = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, IGNORE_INDEX, 6, 0], [IGNORE_INDEX, 2, 2, IGNORE_INDEX]])
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, 7), (hidden, weight)
    )


def test_linear_loss_belongs_to_its_token() -> None:
    hidden = torch.randn(4, 2, 3, dtype=torch.float64)
    weight = torch.randn(9, 3, dtype=torch.float64)
    labels = torch.tensor([[1, IGNORE_INDEX, 6, 0], [IGNORE_INDEX, 2, 2, IGNORE_INDEX]])
    loss = linear_cross_entropy(hidden, weight, labels, 7)
    expected = -torch.log_softmax(weight[:7] @ hidden[2, 0], 0)[6]
    torch.testing.assert_close(loss[0, 2], expected)
    assert (loss[labels == IGNORE_INDEX] == 0).all() and (loss[labels != IGNORE_INDEX] > 0).all()


def test_padding_columns_do_not_count() -> None:
    logits, labels = problem(20, 12)
    padded = torch.cat([logits, torch.full((20, 5), 1e4, dtype=torch.float64)], dim=1)
    assert torch.equal(cross_entropy(padded, labels, 12), cross_entropy(logits, labels))


def test_skipped_rows_do_not_leak() -> None:
    logits, labels = problem()
    poisoned = logits.detach().clone()
    poisoned[labels == IGNORE_INDEX] = torch.nan
    poisoned.requires_grad_()
    for loss in (cross_entropy(poisoned, labels), sharded_cross_entropy(poisoned, labels, 3)):
        torch.testing.assert_close(loss, cross_entropy(logits, labels))
        (grad,) = torch.autograd.grad(loss.sum(), poisoned)
        assert (grad[labels == IGNORE_INDEX] == 0).all() and grad.isfinite().all()


def test_minus_infinity_shard() -> None:
    logits, labels = problem(8, 12)
    constrained = logits.detach().clone()
    constrained[:, :4] = -torch.inf
    labels = labels.where(labels == IGNORE_INDEX, 4 + labels % 8)
    constrained.requires_grad_()
    whole, merged = (
        cross_entropy(constrained, labels),
        sharded_cross_entropy(constrained, labels, 3),
    )
    torch.testing.assert_close(merged, whole, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad(merged.sum(), constrained)
    assert (grad[:, :4] == 0).all() and grad.isfinite().all()
