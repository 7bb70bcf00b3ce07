"""The one comparison of a kernel with the truth: no worse than eager PyTorch in the same dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = 4 * torch.finfo(torch.float32).eps


def assert_no_worse(
    actual: Tensor, eager: Tensor, truth: Tensor, orders: Sequence[float] = (torch.inf, 2)
) -> None:
    """Fails if `actual` is farther from `truth` than `eager` is.

    Both the largest error and the Frobenius norm of the error are compared, each relative to the
    truth. A tenth more than eager's error and a few fp32 roundings are let pass, because two
    orders of summation never agree to the last bit.

    Args:
        actual: the result under test, finite.
        eager: the same computation by plain PyTorch operations in the same dtype.
        truth: the same computation in fp64, from the same (already rounded) inputs.
        orders: the norms. After several roundings on the way the largest error is chance.
    """
    assert truth.dtype == torch.float64
    assert actual.shape == eager.shape == truth.shape
    assert actual.isfinite().all(), "the result holds NaN or Inf"
    for order in orders:
        scale = torch.linalg.vector_norm(truth, order)
        error, eager_error = (
            torch.linalg.vector_norm(result.double() - truth, order) for result in (actual, eager)
        )
        allowed = 1.1 * eager_error + SLACK * scale
        assert error <= allowed, (
            f"error norm of order {order}: {error:.3e}, eager {eager_error:.3e}, "
            f"allowed {allowed:.3e} for a truth of norm {scale:.3e}"
        )


def assert_bit_zero(tensor: Tensor) -> None:
    """Fails on anything but +0.0, -0.0 included."""
    assert (tensor == 0).all() and not tensor.signbit().any()
