"""Memory policies, options and token weights of the LM head's loss, against the oracle.

tests/test_loss.py has what does not depend on the policy.
"""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from closeness import assert_bit_zero
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels import memory_plan
from sft_fast.loss import (
    HeadSettings,
    LossOptions,
    masked_linear_cross_entropy,
    masked_linear_outputs,
)
from sft_fast.reference import cross_entropy as reference

SEQUENCE, BATCH, HIDDEN, VOCAB = 20, 2, 6, 48
POLICIES = ("stored", "gradient_in_forward", "recompute")
OPTIONS = LossOptions(label_smoothing=0.1, z_loss=1e-2, logit_softcap=4.0)


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [s, b, h], weight [V, h], labels [b, s] and token weights [b, s], some of them 0."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    labels = torch.randint(40, (BATCH, SEQUENCE), generator=generator)
    labels[:, :9] = IGNORE_INDEX
    token_weights = torch.randn(BATCH, SEQUENCE, dtype=torch.float64, generator=generator)
    token_weights[0, 15:17] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), labels, token_weights


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).transpose(0, 1).flatten(0, 1)
    loss = reference.penalised_cross_entropy(logits, labels.flatten(), 40, **OPTIONS.model_dump())
    return loss.view(labels.shape) * token_weights


def run_policy(policy: str, sequence_parallel: bool) -> None:
    """Chunks of 7 of the 20 active tokens; each part of the model frozen in turn; two backwards."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, token_weights = make_inputs()
    truth = oracle(hidden, weight, labels, token_weights)
    true_grads = torch.autograd.grad(0.7 * truth.sum(), (hidden, weight))
    parts = size if sequence_parallel else 1
    expected = true_grads[0].chunk(parts)[rank % parts], true_grads[1].chunk(size)[rank]
    for trained in ((0, 1), (0,), (1,)):
        own = [hidden.detach().chunk(parts)[rank % parts], weight.detach().chunk(size)[rank]]
        own = [tensor.clone().requires_grad_(i in trained) for i, tensor in enumerate(own)]
        with mock.patch.object(memory_plan, "MIN_CHUNK_TOKENS", 7):
            loss = masked_linear_cross_entropy(
                *own,
                labels,
                HeadSettings(
                    vocab_size=40,
                    tp_group=dist.group.WORLD,
                    sequence_parallel=sequence_parallel,
                    options=OPTIONS,
                    summed=True,
                    policy=policy,
                    memory_budget=1,
                ),
                token_weights=token_weights,
            )
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
        masked = (labels == IGNORE_INDEX) | (token_weights == 0)
        assert_bit_zero(loss.detach()[masked])
        tensors = [own[i] for i in trained]
        for _ in range(2):
            grads = torch.autograd.grad(0.7 * loss.sum(), tensors, retain_graph=True)
            for i, grad in zip(trained, grads, strict=True):
                torch.testing.assert_close(grad, expected[i], rtol=1e-11, atol=1e-12)
        if 0 in trained:
            own_masked = masked.t().chunk(parts)[rank % parts]
            assert_bit_zero(grads[0][own_masked])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)]
)
def test_policy_equals_oracle(
    rank_pool: RankPool, size: int, sequence_parallel: bool, policy: str
) -> None:
    rank_pool.run(size, run_policy, policy, sequence_parallel)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_sums_depths_and_micro_batches(policy: str, dtype: torch.dtype) -> None:
    """One weight used at two depths of three micro-batches, as multi-token prediction does."""
    hidden, weight, labels, _ = (tensor.detach() for tensor in make_inputs())
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    weight.main_grad = torch.full(weight.shape, 0.5)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    truth = weight.main_grad.double()  # type: ignore[attr-defined]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    for shift in range(3):
        for depth in range(2):
            rolled = labels.roll(-depth - shift, 1)
            with mock.patch.object(memory_plan, "MIN_CHUNK_TOKENS", 7):
                loss = masked_linear_cross_entropy(
                    hidden,
                    weight,
                    rolled,
                    HeadSettings(
                        accumulate_into_main_grad=True, summed=True, policy=policy, memory_budget=1
                    ),
                )
            (0.3 * loss.sum()).backward()
            plain = 0.3 * reference.linear_cross_entropy(*exact, rolled).sum()
            truth += torch.autograd.grad(plain, exact[1])[0]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    error = (weight.main_grad - truth).norm() / truth.norm()  # type: ignore[attr-defined]
    assert error < tolerance


def test_gradient_in_forward_refuses_unequal_upstream_gradients() -> None:
    hidden, weight, labels, token_weights = make_inputs()
    settings = HeadSettings(summed=True, policy="gradient_in_forward")
    loss = masked_linear_cross_entropy(hidden, weight, labels, settings)
    with pytest.raises(ValueError, match="different upstream gradients; give .* token_weights"):
        (loss * token_weights).sum().backward()
    with pytest.raises(ValueError, match="gradient_in_forward needs losses that are only summed"):
        masked_linear_outputs(hidden, weight, labels, settings)
    with pytest.raises(ValueError, match="gradient_in_forward needs losses that are only summed"):
        HeadSettings(policy="gradient_in_forward")
    with pytest.raises(ValueError, match="got 'keep', expected one of auto, stored"):
        HeadSettings(policy="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "is_training"),
    [("gradient_in_forward", True), ("recompute", True), ("auto", False)],
)
def test_chunks_share_one_buffer(policy: str, is_training: bool) -> None:
    """At no time are the logits of two chunks in memory."""
    hidden, weight, labels, _ = make_inputs()
    sizes = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            is_new = isinstance(result, Tensor) and func is torch.ops.aten.new_empty.default
            if is_new and result.dim() == 2 and result.shape[1] == VOCAB:
                sizes.append(result.shape[0])
            return result

    smallest = mock.patch.object(memory_plan, "MIN_CHUNK_TOKENS", 8)
    with smallest, torch.set_grad_enabled(is_training), Count():
        loss = masked_linear_cross_entropy(
            hidden, weight, labels, HeadSettings(summed=True, policy=policy, memory_budget=1)
        )
        if is_training:
            loss.sum().backward()
    # 22 active tokens are three chunks of at most 8; recompute has another buffer in backward.
    assert sizes == [8] * (1 + (policy == "recompute"))


def test_no_active_token_under_every_policy() -> None:
    hidden, weight, labels, _ = make_inputs()
    labels.fill_(IGNORE_INDEX)
    for policy in POLICIES:
        loss = masked_linear_cross_entropy(
            hidden, weight, labels, HeadSettings(summed=True, policy=policy)
        )
        for grad in (loss, *torch.autograd.grad(loss.sum(), (hidden, weight))):
            assert_bit_zero(grad.detach())
