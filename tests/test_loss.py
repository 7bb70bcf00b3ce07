"""Masked cross-entropy on one rank and on gloo ranks, against the plain computation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from closeness import assert_bit_zero, assert_no_worse
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.loss import (
    HeadSettings,
    custom_losses,
    masked_cross_entropy,
    masked_linear_cross_entropy,
)
from sft_fast.reference import cross_entropy as reference
from sft_fast.registry import get_loss, register_loss

BATCH, SEQUENCE, HIDDEN, VOCAB = 2, 16, 6, 48

MASKS = {
    "all active": lambda row: True,
    "prompt first": lambda row: row >= 20,
    "prompt last": lambda row: row < 7,
    "one row": lambda row: row == 17,
    "uneven": lambda row: row % 5 in (1, 2) or row > 26,
    "all masked": lambda row: False,
}
"""Which of the 32 tokens, in s-major order, train; of 4 parts of 8 tokens several have none."""


def make_labels(mask: str, vocab_size: int = VOCAB) -> Tensor:
    """[b, s] labels; shard edges (multiples of 12 and their neighbours) come up often."""
    edges = torch.tensor([0, 11, 12, 23, 24, 35, 36, vocab_size - 1]).clamp(max=vocab_size - 1)
    generator = torch.Generator().manual_seed(7)
    rows = SEQUENCE * BATCH
    labels = edges[torch.randint(len(edges), (rows,), generator=generator)]
    active = torch.tensor([MASKS[mask](row) for row in range(rows)])
    return labels.where(active, IGNORE_INDEX).view(SEQUENCE, BATCH).t().contiguous()


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [s, b, h], weight [V, h] and an upstream gradient [b, s]."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    upstream = torch.randn(BATCH, SEQUENCE, dtype=torch.float64, generator=generator)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), upstream


def active_tokens_of(labels: Tensor) -> Tensor:
    return (labels.t().flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def gradients(loss: Tensor, upstream: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, upstream.to(loss.dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("vocab_size", [VOCAB, 35, None])
@pytest.mark.parametrize("rows_given", [True, False])
def test_linear_equals_plain(mask: str, vocab_size: int | None, rows_given: bool) -> None:
    hidden, weight, upstream = make_inputs()
    labels = make_labels(mask, vocab_size or VOCAB)
    active_tokens = active_tokens_of(labels) if rows_given else None
    loss = masked_linear_cross_entropy(
        hidden, weight, labels, HeadSettings(vocab_size=vocab_size), active_tokens=active_tokens
    )
    plain = reference.linear_cross_entropy(hidden, weight, labels, vocab_size)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=1e-13)
    grads = gradients(loss, upstream, hidden, weight)
    plain_grads = gradients(plain, upstream, hidden, weight)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-13)
    assert_bit_zero(loss[labels == IGNORE_INDEX])
    assert_bit_zero(grads[0].transpose(0, 1)[labels == IGNORE_INDEX])
    assert not grads[1][vocab_size or VOCAB :].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
    active=st.floats(0, 1),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_plain(
    shape: tuple[int, int, int, int], active: float, scale: float, seed: int
) -> None:
    sequence, batch, width, vocab_size = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(sequence, batch, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab_size + 3, width, dtype=torch.float64, generator=generator)
    labels = torch.randint(vocab_size, (batch, sequence), generator=generator)
    keep = torch.rand(batch, sequence, generator=generator) < active
    labels = labels.where(keep, IGNORE_INDEX)
    upstream = torch.randn(batch, sequence, dtype=torch.float64, generator=generator)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = masked_linear_cross_entropy(hidden, weight, labels, HeadSettings(vocab_size=vocab_size))
    plain = reference.linear_cross_entropy(hidden, weight, labels, vocab_size)
    torch.testing.assert_close(loss, plain, rtol=1e-11, atol=1e-11 * scale)
    for grad, plain_grad in zip(
        gradients(loss, upstream, hidden, weight),
        gradients(plain, upstream, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-10, atol=1e-11 * scale)


def test_gradients_equal_finite_differences() -> None:
    labels = torch.tensor([[1, IGNORE_INDEX, 6], [IGNORE_INDEX, 0, 2]])
    hidden = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: masked_linear_cross_entropy(
            hidden, weight, labels, HeadSettings(vocab_size=7)
        ),
        (hidden, weight),
    )
    logits = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits: masked_cross_entropy(logits, labels, vocab_size=7), logits
    )


def test_nan_in_a_masked_row_does_not_leak() -> None:
    hidden, weight, upstream = make_inputs()
    labels = make_labels("uneven")
    masked = labels.t() == IGNORE_INDEX
    poisoned = hidden.detach().masked_fill(masked.unsqueeze(2), torch.nan).requires_grad_()
    clean_loss = masked_linear_cross_entropy(hidden, weight, labels)
    loss = masked_linear_cross_entropy(poisoned, weight, labels)
    assert torch.equal(loss, clean_loss)
    grads = gradients(loss, upstream, poisoned, weight)
    for grad, clean in zip(grads, gradients(clean_loss, upstream, hidden, weight), strict=True):
        assert torch.equal(grad, clean)
    assert_bit_zero(grads[0][masked])


def test_nan_in_an_active_row_shows_in_that_row_only() -> None:
    hidden, weight, _ = make_inputs()
    labels = make_labels("uneven")
    poisoned = hidden.detach().clone()
    poisoned[3, 0] = torch.nan
    assert labels[0, 3] != IGNORE_INDEX
    loss = masked_linear_cross_entropy(poisoned, weight, labels)
    assert loss[0, 3].isnan() and loss.isnan().sum() == 1


def test_all_masked_gives_zero_loss_and_gradient() -> None:
    hidden, weight, upstream = make_inputs(torch.bfloat16)
    hidden = hidden.detach().fill_(torch.nan).requires_grad_()
    loss = masked_linear_cross_entropy(hidden, weight, make_labels("all masked"))
    assert loss.dtype == torch.float32
    assert_bit_zero(loss)
    for grad in gradients(loss, upstream, hidden, weight):
        assert_bit_zero(grad)


def test_masked_token_costs_no_flops() -> None:
    hidden, weight, upstream = make_inputs(torch.float32)
    labels = make_labels("uneven")
    num_active = int((labels != IGNORE_INDEX).sum())
    for trained, num_products in (((hidden, weight), 3), ((hidden,), 2), ((weight,), 2)):
        for tensor in (hidden, weight):
            tensor.requires_grad_(any(tensor is other for other in trained))
        with FlopCounterMode(display=False) as counter:
            gradients(masked_linear_cross_entropy(hidden, weight, labels), upstream, *trained)
        assert counter.get_total_flops() == num_products * 2 * num_active * HIDDEN * VOCAB


def test_unknown_label_gives_nan() -> None:
    hidden, weight, _ = make_inputs()
    labels = make_labels("all active", 35)
    labels[0, 1], labels[1, 2], labels[1, 3] = 35, -1, 10**12
    loss = masked_linear_cross_entropy(hidden, weight, labels, HeadSettings(vocab_size=35))
    assert loss.isnan().nonzero().tolist() == [[0, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_backward_repeats_the_first(dtype: torch.dtype) -> None:
    hidden, weight, upstream = make_inputs(dtype)
    loss = masked_linear_cross_entropy(hidden, weight, make_labels("uneven"))
    first = torch.autograd.grad(loss, (hidden, weight), upstream.float(), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), upstream.float())
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)


def test_weight_changed_before_backward_raises() -> None:
    hidden, weight, upstream = make_inputs()
    loss = masked_linear_cross_entropy(hidden, weight, make_labels("uneven"))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, upstream, hidden)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_upstream_gradient_of_any_stride(layout: str) -> None:
    hidden, weight, upstream = make_inputs()
    upstream = {
        "transposed": upstream.t().contiguous().t(),
        "expanded": torch.tensor(0.3, dtype=torch.float64).expand(BATCH, SEQUENCE),
        "strided": upstream.repeat_interleave(2, dim=1)[:, ::2],
    }[layout]
    labels = make_labels("uneven")
    loss = masked_linear_cross_entropy(hidden, weight, labels)
    plain = reference.linear_cross_entropy(hidden, weight, labels)
    for grad, plain_grad in zip(
        torch.autograd.grad(loss, (hidden, weight), upstream),
        torch.autograd.grad(plain, (hidden, weight), upstream.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-13)


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight, upstream = make_inputs()
    labels = make_labels("uneven")
    tokens = torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH) % VOCAB
    grads = [
        gradients(function(F.embedding(tokens, weight), weight, labels), upstream, weight)[0]
        for function in (masked_linear_cross_entropy, reference.linear_cross_entropy)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-13)


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a plain trainer does: every row through the head, cross-entropy in fp32."""
    logits = (hidden @ weight.t()).permute(1, 2, 0).float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)


def true_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients in fp64 from the rounded inputs."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss = reference.linear_cross_entropy(exact[0], exact[1], labels)
    return loss, gradients(loss, upstream, *exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_no_worse_than_eager(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = (scale * torch.randn(64, 2, 32, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(1000, 32, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(1000, (2, 64), generator=generator)
    labels[:, ::3] = IGNORE_INDEX
    upstream = torch.rand(2, 64, generator=generator)
    truth, true_grads = true_gradients(hidden, weight, labels, upstream)
    eager = eager_loss(hidden, weight, labels)
    loss = masked_linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert_no_worse(loss, eager, truth)
    grads = gradients(loss, upstream, hidden, weight)
    eager_grads = gradients(eager, upstream, hidden, weight)
    for grad, eager_grad, true_grad in zip(grads, eager_grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert_no_worse(grad, eager_grad, true_grad)


def eager_weight_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> Tensor:
    """[V, h] fp32: the 16-bit gradient of the logits, multiplied and summed in fp32."""
    logits = (hidden @ weight.t()).detach().requires_grad_()
    loss = F.cross_entropy(
        logits.permute(1, 2, 0).float(), labels, reduction="none", ignore_index=IGNORE_INDEX
    )
    grad_logits = gradients(loss, upstream, logits)[0]
    return grad_logits.flatten(0, 1).float().t() @ hidden.detach().flatten(0, 1).float()


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
def test_main_grad_sums_micro_batches_in_fp32(zero_out_wgrad: bool) -> None:
    hidden, weight, upstream = make_inputs(torch.bfloat16)
    weight.main_grad = torch.full((VOCAB, HIDDEN), 0.5)
    weight.zero_out_wgrad = zero_out_wgrad
    eager, truth = weight.main_grad.clone(), weight.main_grad.double()
    for mask in ("prompt first", "uneven", "prompt last"):
        labels = make_labels(mask)
        weight.grad, weight.grad_added_to_main_grad = None, False
        loss = masked_linear_cross_entropy(
            hidden, weight, labels, HeadSettings(accumulate_into_main_grad=True)
        )
        loss.backward(upstream.float())
        assert weight.grad_added_to_main_grad
        assert weight.grad.shape == weight.shape and weight.grad.dtype == weight.dtype
        assert not zero_out_wgrad or not weight.grad.any()
        eager += eager_weight_gradient(hidden, weight, labels, upstream)
        truth += true_gradients(hidden, weight, labels, upstream)[1][1]
    assert_no_worse(weight.main_grad, eager, truth)


def test_main_grad_without_megatron_ddp_leaves_no_grad() -> None:
    hidden, weight, upstream = make_inputs(torch.float32)
    weight.main_grad = torch.zeros(VOCAB, HIDDEN)
    labels = make_labels("uneven")
    masked_linear_cross_entropy(
        hidden, weight, labels, HeadSettings(accumulate_into_main_grad=True)
    ).backward(upstream.float())
    assert weight.grad is None
    plain = gradients(masked_linear_cross_entropy(hidden, weight, labels), upstream, weight)[0]
    torch.testing.assert_close(weight.main_grad, plain)


def test_confident_token_keeps_its_gradient() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    logits[0, 7] = 14.0
    logits.requires_grad_()
    grad = gradients(masked_cross_entropy(logits, torch.tensor([7])), torch.ones(1), logits)[0]
    true_grad = torch.softmax(logits[0].double(), 0)[7] - 1
    assert abs(grad[0, 7] / true_grad - 1) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_logits_are_not_written_and_masked_rows_not_read(dtype: torch.dtype) -> None:
    logits = torch.randn(BATCH, SEQUENCE, VOCAB).to(dtype)
    labels = make_labels("uneven")
    logits[labels == IGNORE_INDEX] = torch.nan
    logits.requires_grad_()
    before = logits.detach().clone()
    loss = masked_cross_entropy(logits, labels)
    grad = gradients(loss, torch.ones_like(loss), logits)[0]
    assert torch.equal(logits.detach().nan_to_num(), before.nan_to_num())
    assert loss.isfinite().all() and grad.isfinite().all() and grad.dtype == dtype
    assert_bit_zero(loss[labels == IGNORE_INDEX])
    assert_bit_zero(grad[labels == IGNORE_INDEX])


@pytest.mark.parametrize("offset", [0.0, -150.0, 1e4, -1e4])
def test_logits_of_any_offset(offset: float) -> None:
    logits = torch.randn(30, VOCAB) + offset
    labels = torch.arange(30) % VOCAB
    upstream = torch.rand(30)
    results = []
    for function, dtype in (
        (masked_cross_entropy, torch.float32),
        (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), torch.float32),
        (reference.cross_entropy, torch.float64),
    ):
        inputs = logits.to(dtype).requires_grad_()
        loss = function(inputs, labels)
        results.append((loss.detach(), gradients(loss, upstream, inputs)[0]))
    for ours, eager, truth in zip(*results, strict=True):
        assert_no_worse(ours, eager, truth)


def test_minus_infinity_logits() -> None:
    logits = torch.randn(6, VOCAB, dtype=torch.float64)
    logits[:, :12] = -torch.inf
    logits[1, 14:] = -torch.inf
    logits[2] = -torch.inf
    labels = torch.tensor([12, 13, 20, 3, IGNORE_INDEX, 47])
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, labels)
    plain = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=1e-13, equal_nan=True)
    assert loss[2].isnan() and loss[3] == torch.inf
    upstream = torch.ones(6, dtype=torch.float64)
    grad, plain_grad = gradients(loss, upstream, logits)[0], gradients(plain, upstream, logits)[0]
    torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_plus_infinity_logit_is_loud() -> None:
    logits = torch.randn(2, VOCAB)
    logits[0, 5] = torch.inf
    assert masked_cross_entropy(logits, torch.tensor([4, 4])).isnan().tolist() == [True, False]


def test_repeats_bit_for_bit() -> None:
    hidden, weight, upstream = make_inputs(torch.bfloat16)
    labels = make_labels("uneven")
    losses = [masked_linear_cross_entropy(hidden, weight, labels) for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    first, second = (gradients(loss, upstream, hidden, weight) for loss in losses)
    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden shape": ({"hidden": torch.zeros(15, 2, 6)}, r"\[15, 2, 6\], expected \[s/1, b, h\]"),
    "dtypes": ({"weight": torch.zeros(48, 6, dtype=torch.float64)}, "hidden is torch.float32"),
    "vocab_size": ({"settings": HeadSettings(vocab_size=49)}, "got 49, expected 1 to 48"),
    "backend": (
        {"settings": HeadSettings(backend="cuda")},
        "got 'cuda', expected one of auto, triton, native, torch",
    ),
    "main_grad": ({"settings": HeadSettings(accumulate_into_main_grad=True)}, "has no main_grad"),
    "tokens dtype": ({"active_tokens": torch.zeros(3)}, "torch.float32"),
    "tokens missing": ({"active_tokens": torch.tensor([3])}, "got 1, expected .* the 32 tokens"),
    "tokens order": ({"active_tokens": torch.arange(31, -1, -1)}, "ascending order"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_says_what_was_expected(name: str) -> None:
    change, message = BAD_INPUTS[name]
    hidden, weight, _ = make_inputs(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": make_labels("all active"), **change}
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(**arguments)


def test_bad_logits_shape_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \[4\], expected .* \[5\]"):
        masked_cross_entropy(torch.zeros(5, 8), torch.zeros(4, dtype=torch.int64))


def test_custom_loss_is_registered_and_differentiated() -> None:
    @register_loss("test_focal")
    def focal(logprobs: Tensor, labels: Tensor) -> Tensor:
        return -((1 - logprobs.exp()) ** 2) * logprobs + 1

    hidden, weight, _ = make_inputs()
    labels = make_labels("uneven")
    plain = masked_linear_cross_entropy(hidden, weight, labels)
    loss = custom_losses("test_focal", plain, labels)
    truth = -reference.linear_cross_entropy(hidden, weight, labels)
    truth = focal(truth, labels).masked_fill(labels == IGNORE_INDEX, 0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    for grad, true_grad in zip(
        torch.autograd.grad(loss.sum(), (hidden, weight)),
        torch.autograd.grad(truth.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(grad, true_grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'test_focal' is taken"):
        register_loss("test_focal")(lambda logprobs, labels: logprobs)
    register_loss("test_scalar")(lambda logprobs, labels: logprobs.sum())
    with pytest.raises(ValueError, match=r"'test_scalar' returned shape \[\], expected"):
        custom_losses("test_scalar", plain, labels)
    with pytest.raises(ValueError, match="loss.custom: no loss 'no_such'; there are: .*focal"):
        get_loss("no_such")


def test_custom_loss_comes_from_a_plugin(tmp_path: Path) -> None:
    from sft_fast.config.schema import load_config
    from sft_fast.registry import load_plugins

    plugin = tmp_path / "my_loss.py"
    plugin.write_text(
        "from sft_fast.registry import register_loss\n"
        "@register_loss('test_plugin')\n"
        "def mine(logprobs, labels):\n"
        "    return -2 * logprobs\n"
    )
    config = load_config(None, [f"plugins=[{plugin}]", "loss.custom=test_plugin"])
    load_plugins(config.plugins)
    assert config.loss.custom is not None
    loss = custom_losses(config.loss.custom, torch.tensor([[1.5, 0.0]]), torch.tensor([[3, -100]]))
    assert loss.tolist() == [[3.0, 0.0]]


def test_import_leaves_triton_and_megatron_alone() -> None:
    code = "import sft_fast.loss, sys; assert not {'triton', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_linear_rank(mask: str, sequence_parallel: bool, vocab_size: int) -> None:
    """On each rank: loss, both gradients and a second backward equal the plain computation."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, upstream = make_inputs()
    labels = make_labels(mask, vocab_size)
    plain = reference.linear_cross_entropy(hidden, weight, labels, vocab_size)
    plain_grads = gradients(plain, upstream, hidden, weight)
    parts = size if sequence_parallel else 1
    own_hidden = hidden.detach().chunk(parts)[rank % parts].clone()
    own_masked = (labels.t() == IGNORE_INDEX).chunk(parts)[rank % parts]
    own_hidden = own_hidden.masked_fill(own_masked.unsqueeze(2), torch.nan).requires_grad_()
    own_weight = weight.detach().chunk(size)[rank].clone().requires_grad_()
    loss = masked_linear_cross_entropy(
        own_hidden,
        own_weight,
        labels,
        HeadSettings(
            vocab_size=vocab_size, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel
        ),
        active_tokens=active_tokens_of(labels),
    )
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    assert_bit_zero(loss[labels == IGNORE_INDEX])
    for _ in range(2):
        grads = torch.autograd.grad(loss, (own_hidden, own_weight), upstream, retain_graph=True)
        expected = plain_grads[0].chunk(parts)[rank % parts], plain_grads[1].chunk(size)[rank]
        for grad, plain_grad in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-13)
        assert_bit_zero(grads[0][own_masked])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_equals_plain(
    rank_pool: RankPool, size: int, sequence_parallel: bool, mask: str
) -> None:
    # 35 of 48 columns: with 4 ranks the last holds padding only, and the one before it some.
    vocab_size = 35 if size == 4 else VOCAB
    rank_pool.run(size, run_linear_rank, mask, sequence_parallel, vocab_size)


def run_frozen_rank(sequence_parallel: bool) -> None:
    """A frozen head, and a hidden state that needs no gradient, on every rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, upstream = make_inputs()
    labels = make_labels("uneven")
    settings = HeadSettings(tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel)
    plain = reference.linear_cross_entropy(hidden, weight, labels)
    plain_grads = gradients(plain, upstream, hidden, weight)
    parts = size if sequence_parallel else 1
    own_hidden = hidden.detach().chunk(parts)[rank % parts].clone().requires_grad_()
    own_weight = weight.detach().chunk(size)[rank].clone().requires_grad_()
    loss = masked_linear_cross_entropy(own_hidden, own_weight.detach(), labels, settings)
    grad = gradients(loss, upstream, own_hidden)[0]
    torch.testing.assert_close(
        grad, plain_grads[0].chunk(parts)[rank % parts], rtol=1e-12, atol=1e-13
    )
    loss = masked_linear_cross_entropy(own_hidden.detach(), own_weight, labels, settings)
    grad = gradients(loss, upstream, own_weight)[0]
    torch.testing.assert_close(grad, plain_grads[1].chunk(size)[rank], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_frozen_parts_under_tensor_parallel(rank_pool: RankPool, sequence_parallel: bool) -> None:
    rank_pool.run(2, run_frozen_rank, sequence_parallel)


def run_bfloat16_rank(sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, upstream = make_inputs(torch.bfloat16)
    parts = size if sequence_parallel else 1
    own_hidden = hidden.detach().chunk(parts)[rank % parts].clone().requires_grad_()
    own_weight = weight.detach().chunk(size)[rank].clone().requires_grad_()
    loss = masked_linear_cross_entropy(
        own_hidden,
        own_weight,
        make_labels("uneven"),
        HeadSettings(tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel),
    )
    return loss.detach(), *gradients(loss, upstream, own_hidden, own_weight)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_bfloat16_ranks_agree_and_are_close(rank_pool: RankPool, sequence_parallel: bool) -> None:
    hidden, weight, upstream = make_inputs(torch.bfloat16)
    labels = make_labels("uneven")
    results = rank_pool.run(2, run_bfloat16_rank, sequence_parallel)
    assert torch.equal(results[0][0], results[1][0])
    truth, (_, true_weight_grad) = true_gradients(hidden, weight, labels, upstream)
    eager = eager_loss(hidden, weight, labels)
    assert_no_worse(results[0][0], eager, truth)
    weight_grad = torch.cat([grad for _, _, grad in results])
    assert_no_worse(weight_grad, gradients(eager, upstream, weight)[0], true_weight_grad)


def run_logits_rank() -> None:
    """Foreign logits, with a shard of nothing but -inf in some rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    logits = torch.randn(24, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[::2, :12], logits[1, 12:] = -torch.inf, -torch.inf
    labels = 12 + torch.arange(24)
    labels[1], labels[5] = 3, IGNORE_INDEX
    logits.requires_grad_()
    upstream = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = reference.cross_entropy(logits, labels)
    own_logits = logits.detach().chunk(size, 1)[rank].clone().requires_grad_()
    loss = masked_cross_entropy(own_logits, labels, tp_group=dist.group.WORLD)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    own_grad = gradients(loss, upstream, own_logits)[0]
    plain_grad = gradients(plain, upstream, logits)[0].chunk(size, 1)[rank]
    torch.testing.assert_close(own_grad, plain_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [2, 4])
def test_vocab_parallel_logits_with_minus_infinity_shards(rank_pool: RankPool, size: int) -> None:
    rank_pool.run(size, run_logits_rank)


def run_megatron_rank() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    logits = torch.randn(SEQUENCE, BATCH, VOCAB, generator=torch.Generator().manual_seed(1))
    own_logits = logits.chunk(2, 2)[dist.get_rank(group)].clone().requires_grad_()
    labels = make_labels("all active").t().contiguous()
    upstream = torch.rand(SEQUENCE, BATCH, generator=torch.Generator().manual_seed(2))
    loss = masked_cross_entropy(own_logits, labels, tp_group=group)
    grad = gradients(loss, upstream, own_logits)[0]
    # Megatron overwrites fp32 logits.
    theirs = vocab_parallel_cross_entropy(own_logits.clone(), labels)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, gradients(theirs, upstream, own_logits)[0])


def test_equals_megatron_vocab_parallel_cross_entropy(rank_pool: RankPool) -> None:
    rank_pool.run(2, run_megatron_rank)
