"""Every kernel backend against the oracle, with the inputs that have broken such kernels before.

kernel_pool.py says where the kernels run.
"""

import functools
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from closeness import assert_bit_zero, assert_no_worse
from kernel_pool import ON_GPU, missing_native, seeded
from rank_pool import RankPool
from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.backends import load_backend
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from sft_fast.loss import (
    HeadSettings,
    LossOptions,
    masked_cross_entropy,
    masked_linear_cross_entropy,
    masked_linear_outputs,
)
from sft_fast.reference import cross_entropy as reference

pytest.importorskip("triton")


@pytest.fixture(params=["torch", "triton", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and missing_native() is not None:
        pytest.skip(f"native kernels need {missing_native()}")
    return str(request.param)


def gradient(loss: Tensor, upstream: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, upstream.to(loss.dtype))


def make_logits(
    num_tokens: int, width: int, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with NaN in the masked rows and Inf in the padding, labels, an upstream gradient."""
    generator = seeded(num_tokens + width)
    logits = (3 * torch.randn(num_tokens, width, generator=generator)).to(dtype)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[-1] = vocab_size - 1
    labels[1::3] = IGNORE_INDEX
    logits[:, vocab_size:] = torch.inf
    logits[1::3] = torch.nan
    return logits, labels, torch.randn(num_tokens, generator=generator)


def eager_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    active = (labels != IGNORE_INDEX).unsqueeze(1)
    logits = torch.where(active, logits, 0)[:, :vocab_size].float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)


def round_as(backend: str, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Triton's interpreter cuts bfloat16 off where GPUs round to nearest."""
    if backend == "triton" and not ON_GPU and dtype == torch.bfloat16:
        gradient = (gradient.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return gradient.to(dtype)


def run_logits(
    backend: str, num_tokens: int, width: int, vocab_size: int, dtype: torch.dtype
) -> None:
    logits, labels, upstream = make_logits(num_tokens, width, vocab_size, dtype)
    before = logits.clone()
    results = []
    for function, computed_in in (
        (functools.partial(masked_cross_entropy, backend=backend), dtype),
        (eager_cross_entropy, torch.float32),
        (reference.cross_entropy, torch.float64),
    ):
        inputs = logits.to(computed_in).requires_grad_()
        loss = function(inputs, labels, vocab_size=vocab_size)
        results.append((loss.detach(), gradient(loss, upstream, inputs)[0]))
    (loss, grad), (eager, eager_grad), (truth, true_grad) = results
    assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8)), "logits were written to"
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_no_worse(loss, eager, truth)
    assert_no_worse(grad, round_as(backend, eager_grad, dtype), true_grad)
    assert_bit_zero(loss[1::3])
    assert_bit_zero(grad[1::3])
    assert not grad[:, vocab_size:].any()


SHAPES = [
    # rows, width, vocab_size, dtype; 20000 columns are 3 blocks, which few rows split
    (4, 1, 1, torch.float32),
    (7, 13, 13, torch.bfloat16),
    (7, 128, 100, torch.float32),
    (3, 8192, 8192, torch.bfloat16),
    (3, 8200, 8193, torch.float16),
    (5, 20000, 19999, torch.float32),
    (5, 20000, 9000, torch.bfloat16),
    # GPT-2, whose rows are not aligned; a rank of 8 of Llama 3; all of Llama 3 and Qwen 2
    (3, 50257, 50257, torch.bfloat16),
    (4, 16032, 16032, torch.bfloat16),
    (2, 128256, 128256, torch.float16),
    (2, 151936, 151646, torch.bfloat16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-W{s[1]}-V{s[2]}-{s[3]}")
def test_logits_no_worse_than_eager(
    kernel_rank: RankPool, backend: str, shape: tuple[Any, ...]
) -> None:
    kernel_rank.run(1, run_logits, backend, *shape)


def run_infinities(backend: str) -> None:
    """-inf lanes, shards and rows, +inf, NaN, and offsets that overflow exp."""
    logits = torch.randn(8, 300)
    logits[0, :290] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 4] = torch.nan
    logits[4] += 1e4
    logits[5] -= 1e4
    logits[6, 5:] = -torch.inf
    labels = torch.tensor([295, 3, 7, 7, 7, 7, 299, 300])
    inputs = logits.requires_grad_()
    ours = masked_cross_entropy(inputs, labels, backend=backend)
    theirs = masked_cross_entropy(inputs, labels, backend="torch")
    assert ours.isnan().tolist() == [False, True, True, True, False, False, False, True]
    assert ours[6] == torch.inf
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    upstream = torch.rand(8)
    torch.testing.assert_close(
        gradient(ours, upstream, inputs),
        gradient(theirs, upstream, inputs),
        rtol=1e-5,
        atol=1e-7,
        equal_nan=True,
    )


def test_infinities_and_nan_as_in_torch(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_infinities, backend)


def run_sure_tokens(backend: str) -> None:
    """p(label) near 1, near 0, and equal for all columns, far from 0."""
    logits = torch.zeros(4, 1000, dtype=torch.bfloat16)
    logits[0, 7], logits[1, 8], logits[2], logits[3] = 14.0, 70.0, -2048.0, 1024.0
    labels = torch.tensor([7, 7, 0, 999])
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact, labels, reduction="none")
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    inputs = logits.requires_grad_()
    loss = masked_cross_entropy(inputs, labels, backend=backend)
    grad = gradient(loss, torch.ones(4), inputs)[0]
    # A few roundings of a sum of about 1.
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    at_labels = (torch.arange(4), labels)
    errors = grad[at_labels].double() / true_grad[at_labels] - 1
    assert errors.abs().max() < torch.finfo(torch.bfloat16).eps


def test_sure_tokens_keep_their_gradient(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_sure_tokens, backend)


def run_empty_blocks(backend: str) -> None:
    """Blocks of nothing but -inf, first, last and in a split of their own; rows without a label."""
    generator = seeded(1)
    logits = torch.randn(5, 20000, generator=generator)
    logits[0, :8192] = logits[1, 8192:] = logits[2, 8192:16384] = -torch.inf
    logits[3, :] = -torch.inf
    logits[3, 19999] = -3.0
    logits[4] = torch.nan
    labels = torch.tensor([9000, 5, 19000, 19999, IGNORE_INDEX])
    results = []
    for name in (backend, "torch"):
        for start in (logits, logits.flip(1)):
            is_flipped = start is not logits
            row_labels = torch.where(labels >= 0, 19999 - labels, labels) if is_flipped else labels
            inputs = start.clone().requires_grad_()
            loss = masked_cross_entropy(inputs, row_labels.int(), backend=name)
            (grad,) = gradient(loss, torch.rand(5, generator=seeded(2)), inputs)
            results.append((loss, grad.flip(1) if is_flipped else grad))
    assert all(tensor.isfinite().all() for result in results for tensor in result)
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-8)
    all_masked = torch.full((5,), IGNORE_INDEX)
    inputs = torch.full((5, 20000), torch.nan, requires_grad=True)
    loss = masked_cross_entropy(inputs, all_masked, backend=backend)
    assert_bit_zero(loss.detach())
    assert_bit_zero(gradient(loss, torch.ones(5), inputs)[0])


def test_empty_blocks(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_empty_blocks, backend)


def run_shards(backend: str) -> None:
    """Logits in shards: labels at every edge, an empty shard, infinities, labels of no column."""
    rank, size = dist.get_rank(), dist.get_world_size()
    width = 9000 // size
    vocab_size = 9000 - 30
    edges = [edge for i in range(size) for edge in (i * width, (i + 1) * width - 1)]
    edges[-1] = vocab_size - 1
    bad = [vocab_size, 8999, 9000, -1, 2**32 + 1]
    labels = torch.tensor([*edges, 5, 8000, 7, 7, *bad, IGNORE_INDEX])
    logits = 3 * torch.randn(len(labels), 9000, generator=seeded(3))
    at = len(edges)
    logits[at, width:] = -torch.inf
    logits[at + 1, :width] = -torch.inf
    logits[at + 2, 8500], logits[at + 3, 8500] = torch.inf, torch.nan
    logits[-1] = torch.nan
    exact = logits.double().requires_grad_()
    known = torch.where((labels < vocab_size) & (labels >= 0), labels, IGNORE_INDEX)
    truth = reference.cross_entropy(exact, known, vocab_size)
    upstream = torch.rand(len(labels), generator=seeded(4))
    (true_grad,) = gradient(truth, upstream, exact)
    logits[:, vocab_size:] = 50.0
    own = logits.chunk(size, 1)[rank].clone().requires_grad_()
    loss = masked_cross_entropy(
        own, labels, vocab_size=vocab_size, tp_group=dist.group.WORLD, backend=backend
    )
    (grad,) = torch.autograd.grad(loss, own, upstream, retain_graph=True)
    (again,) = torch.autograd.grad(loss, own, upstream)
    assert torch.equal(grad.nan_to_num(7.0), again.nan_to_num(7.0))
    finite = list(range(at + 2))
    torch.testing.assert_close(loss[finite].double(), truth[finite], rtol=2e-6, atol=1e-6)
    assert loss[at + 2 : -1].isnan().all() and loss[:at].isfinite().all()
    assert_bit_zero(loss[-1:].detach())
    own_truth = true_grad.chunk(size, 1)[rank]
    torch.testing.assert_close(grad[finite].double(), own_truth[finite], rtol=2e-5, atol=1e-7)
    assert grad[at + 3].isnan().any(), "a NaN must show"
    assert_bit_zero(grad[-1])
    assert not grad[:-1, max(vocab_size - rank * width, 0) :].any()
    # A label of no column adds to no column: what is left is a softmax.
    unknown = slice(at + 4, at + 4 + len(bad))
    assert (grad[unknown] >= 0).all()


def test_logits_in_shards(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(2, run_shards, backend)


def run_strides(backend: str) -> None:
    """Padded rows, transposed logits and labels, an expanded upstream gradient, no rows at all."""
    plain, labels, _ = make_logits(6, 40, 40, torch.float32)
    plain[1::3] = 0
    transposed = plain.t().contiguous().t()
    padded = torch.full((6, 64), torch.nan)[:, :40].copy_(plain)
    strided_labels = labels.repeat_interleave(2)[::2]
    results = []
    for logits in (plain, transposed, padded):
        inputs = logits.detach().requires_grad_()
        loss = masked_cross_entropy(inputs, strided_labels, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, inputs, torch.tensor(0.5).expand(6))))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            # How a row is loaded, and so the order of its sum, depends on its alignment.
            torch.testing.assert_close(ours, first, rtol=1e-6, atol=1e-7)
    empty = torch.zeros(0, 40, requires_grad=True)
    loss = masked_cross_entropy(empty, labels[:0], backend=backend)
    assert gradient(loss, torch.zeros(0), empty)[0].shape == (0, 40)


def test_any_stride(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_strides, backend)


def run_far_rows(backend: str) -> None:
    """Row 3 begins 3 * 2**30 elements after row 0; on a CPU the file between them is a hole."""
    stride, width = 1 << 30, 40
    size = 3 * stride + width
    with tempfile.NamedTemporaryFile() as sparse:
        storage = torch.from_file(
            sparse.name, shared=True, size=size, dtype=torch.bfloat16, device="cpu"
        )
    if ON_GPU:
        storage = torch.zeros(size, dtype=torch.bfloat16)
    logits = storage.as_strided((4, width), (stride, 1))
    near = torch.randn(4, width).to(torch.bfloat16)
    logits.copy_(near)
    labels = torch.tensor([0, 39, IGNORE_INDEX, 7])
    results = []
    for inputs in (logits.detach().requires_grad_(), near.requires_grad_()):
        loss = masked_cross_entropy(inputs, labels, backend=backend)
        results.append((loss, *gradient(loss, torch.full((4,), 0.7), inputs)))
    assert all(torch.equal(far, close) for far, close in zip(*results, strict=True))


def test_row_offsets_beyond_32_bits(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_far_rows, backend)


def run_many_elements(backend: str, num_tokens: int, width: int) -> None:
    """The last rows lie beyond 2**31 elements; rows of every 512 are compared with eager's."""
    generator = seeded(5)
    logits = torch.randn(num_tokens, width, generator=generator, dtype=torch.bfloat16)
    labels = torch.randint(width, (num_tokens,), generator=generator)
    labels[1::2] = IGNORE_INDEX
    some = torch.arange(num_tokens - 1, 0, -512).flip(0)
    some_logits = logits[some].requires_grad_()
    inputs = logits.requires_grad_()
    loss = masked_cross_entropy(inputs, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), inputs)
    assert grad.numel() > 1 << 31
    eager = eager_cross_entropy(some_logits, labels[some], width)
    (eager_grad,) = torch.autograd.grad(eager.sum(), some_logits)
    exact = some_logits.detach().double().requires_grad_()
    truth = reference.cross_entropy(exact, labels[some], width)
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    assert_no_worse(loss[some], eager, truth)
    assert_no_worse(grad[some], eager_grad, true_grad)
    for part in grad[1::2].split(1024):
        assert not part.any()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("shape", [(16385, 131072), (32771, 131072)])
def test_more_than_2_31_elements(
    kernel_rank: RankPool, backend: str, shape: tuple[int, int]
) -> None:
    kernel_rank.run(1, run_many_elements, backend, *shape)


def run_linear(backend: str, sequence_parallel: bool) -> None:
    """In place on its own logits, per rank; twice, because the first backward uses them up."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = seeded(4)
    hidden = torch.randn(12, 1, 8, generator=generator)
    weight = torch.randn(200, 8, generator=generator)
    labels = torch.tensor([[IGNORE_INDEX] * 7 + [0, 99, 100, 189, 5]])
    upstream = torch.rand(1, 12, generator=generator)
    parts = size if sequence_parallel else 1
    results = []
    for name in (backend, "torch"):
        own_hidden = hidden.chunk(parts)[rank % parts].clone()
        own_hidden[labels.t().chunk(parts)[rank % parts] == IGNORE_INDEX] = torch.nan
        tensors = own_hidden.requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
        loss = masked_linear_cross_entropy(
            *tensors,
            labels,
            HeadSettings(
                vocab_size=190,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
                backend=name,
            ),
        )
        grads = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
        again = torch.autograd.grad(loss, tensors, upstream)
        assert all(torch.equal(ours, other) for ours, other in zip(grads, again, strict=True))
        results.append((loss, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_linear_equals_torch_backend(
    kernel_rank: RankPool, backend: str, size: int, sequence_parallel: bool
) -> None:
    kernel_rank.run(size, run_linear, backend, sequence_parallel)


OPTIONS = {
    "smoothing": LossOptions(label_smoothing=0.1),
    "z-loss": LossOptions(z_loss=1e-2),
    "softcap": LossOptions(logit_softcap=5.0),
    "all": LossOptions(label_smoothing=0.2, z_loss=1e-3, logit_softcap=20.0),
}


def run_options(backend: str, name: str, dtype: torch.dtype, width: int) -> None:
    options, vocab_size = OPTIONS[name], width - 8
    logits, labels, upstream = make_logits(5, width, vocab_size, dtype)
    results = []
    for function, computed_in in (
        (functools.partial(masked_cross_entropy, options=options, backend=backend), dtype),
        (
            functools.partial(reference.penalised_cross_entropy, **options.model_dump()),
            torch.float32,
        ),
        (
            functools.partial(reference.penalised_cross_entropy, **options.model_dump()),
            torch.float64,
        ),
    ):
        inputs = logits.to(computed_in).requires_grad_()
        loss = function(inputs, labels, vocab_size=vocab_size)
        results.append((loss.detach(), gradient(loss, upstream, inputs)[0]))
    (loss, grad), (eager, eager_grad), (truth, true_grad) = results
    assert_no_worse(loss, eager, truth)
    assert_no_worse(grad, round_as(backend, eager_grad, dtype), true_grad)
    assert_bit_zero(loss[1::3])
    assert_bit_zero(grad[1::3])
    assert not grad[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_no_worse_than_eager(
    kernel_rank: RankPool, backend: str, name: str, dtype: torch.dtype
) -> None:
    kernel_rank.run(1, run_options, backend, name, dtype, 9000 if name == "all" else 208)


def run_outputs(backend: str, sequence_parallel: bool) -> None:
    """Log probability, entropy and argmax per token, over a vocabulary in shards; with ties."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = seeded(4)
    hidden = torch.randn(24, 1, 8, generator=generator)
    weight = torch.randn(200, 8, generator=generator)
    weight[150] = weight[60]  # the first of equal maxima counts
    hidden[20] = 4 * weight[60]
    labels = torch.randint(190, (1, 24), generator=generator)
    labels[0, 20] = 150
    labels[0, :7] = IGNORE_INDEX
    likely = (hidden[:, 0] @ weight[:190].t()).argmax(1)
    labels[0, 8:16] = likely[8:16]
    truth = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logits = (truth[0] @ truth[1].t()).flatten(0, 1)
    logprob, entropy, correct = reference.token_outputs(logits, labels[0], 190)
    parts = size if sequence_parallel else 1
    own = [
        hidden.chunk(parts)[rank % parts].clone().requires_grad_(),
        weight.chunk(size)[rank].clone().requires_grad_(),
    ]
    outputs = masked_linear_outputs(
        *own,
        labels,
        HeadSettings(
            vocab_size=190,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            options=LossOptions(z_loss=0.1, label_smoothing=0.1),
            backend=backend,
        ),
    )
    torch.testing.assert_close(outputs.logprob[0].double(), logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.entropy[0].double(), entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs.correct[0], correct)
    assert outputs.correct[0, 8:16].all() and not outputs.correct[0, 20]
    assert not outputs.entropy.requires_grad and not outputs.correct.requires_grad
    upstream = torch.rand(24, generator=generator)
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    loss = reference.penalised_cross_entropy(logits, labels[0], 190, **options)
    torch.testing.assert_close(outputs.loss[0].double(), loss, rtol=1e-5, atol=1e-5)
    # One backward through both differentiable outputs.
    mixed = (outputs.logprob[0] * upstream).sum() + 0.3 * outputs.loss.sum()
    true_mixed = (logprob * upstream).sum() + 0.3 * loss.sum()
    grads = torch.autograd.grad(mixed, own)
    true_grads = torch.autograd.grad(true_mixed, truth)
    expected = true_grads[0].chunk(parts)[rank % parts], true_grads[1].chunk(size)[rank]
    for grad, true_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, sequence_parallel", [(1, False), (2, True)])
def test_outputs_equal_oracle(
    kernel_rank: RankPool, backend: str, size: int, sequence_parallel: bool
) -> None:
    kernel_rank.run(size, run_outputs, backend, sequence_parallel)


def run_infinite_outputs(backend: str) -> None:
    """Entropy of rows with -inf blocks, and of a row with a single finite logit."""
    hidden, weight = 2 * torch.eye(3).unsqueeze(1), torch.randn(300, 3)
    # Twice as much overflows to -inf; -inf itself would make 0 * -inf, NaN, of other rows' zeros.
    weight[:290, 0] = weight[:, 1] = torch.finfo(torch.float32).min
    weight[7, 1] = 3.0
    outputs = masked_linear_outputs(
        hidden, weight, torch.tensor([[295, 7, 2]]), HeadSettings(backend=backend)
    )
    assert outputs.entropy.isfinite().all()
    assert outputs.entropy[0, 1].abs() < 1e-6 and outputs.correct[0, 1]
    truth = torch.distributions.Categorical(logits=2 * weight[290:, 0]).entropy()
    torch.testing.assert_close(outputs.entropy[0, 0], truth)


def test_outputs_with_minus_infinity(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_infinite_outputs, backend)


def run_joins(backend: str, num_parts: int, num_tokens: int) -> None:
    """Statistics of parts joined as the oracle joins them: empty parts, ties, masked rows."""
    kernels, vocab_size, device = (
        load_backend("masked_cross_entropy", backend, "cpu"),
        997,
        torch.get_default_device(),
    )
    generator = seeded(num_parts)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[::7] = IGNORE_INDEX
    labels[3], labels[4] = vocab_size, -1
    maxima = torch.randint(-3, 4, (num_parts, num_tokens), generator=generator).float()
    maxima[:, 5] += 1e4
    sums = 1 + 9 * torch.rand(num_parts, num_tokens, generator=generator)
    targets = torch.zeros(num_parts, num_tokens)
    targets[-1] = torch.randn(num_tokens, generator=generator)
    if num_parts > 1:
        maxima[0, ::2], sums[0, ::2] = torch.finfo(torch.float32).min, 0.0
    maxima[:, 1], sums[:, 1], targets[-1, 1] = torch.finfo(torch.float32).min, 0.0, -torch.inf
    sums[0, 2] = torch.nan
    logit_sums, weighted = (
        torch.randn(num_parts, num_tokens, generator=generator) for _ in range(2)
    )
    argmaxes = torch.randint(3, (num_parts, num_tokens), generator=generator).float()
    argmaxes[-1, 9::3] = labels[9::3].float()
    maxima[-1, 9::3] = 9.0
    argmaxes[0, 12], maxima[0, 12], labels[12] = 0.0, 9.0, 2  # an equal maximum comes first
    argmaxes[-1, 12] = 2.0 if num_parts > 1 else 0.0
    for smoothing, z_loss, with_outputs in ((0.0, 0.0, False), (0.1, 0.0, True), (0.7, 1e-2, True)):
        columns = [maxima, sums, targets]
        columns += [logit_sums] * (smoothing > 0) + [weighted, argmaxes] * with_outputs
        statistics = torch.stack(columns, 1)
        options = LossOptions(label_smoothing=smoothing, z_loss=z_loss)
        rest = vocab_size, options, with_outputs
        oracle = load_backend("masked_cross_entropy", "torch", "cpu")
        exact = oracle.token_losses(statistics.double(), labels, *rest)
        exact[:, labels == IGNORE_INDEX] = 0
        statistics[:, :, labels == IGNORE_INDEX] = torch.nan
        ours = kernels.token_losses(statistics, labels, *rest)
        assert ours.shape == (4 if with_outputs else 1, num_tokens)
        assert ours.device.type == device.type
        assert ours[0, [1, 2, 3, 4]].isnan().all() and ours[0, 5].isfinite()
        assert_bit_zero(ours[:, labels == IGNORE_INDEX])
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
        if with_outputs:
            assert ours[3, 15] == 1 and ours[3, 12] == 0


@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
@pytest.mark.parametrize(("num_parts", "num_tokens"), [(1, 129), (3, 128), (16, 70), (2048, 20)])
def test_parts_are_joined_as_in_torch(
    kernel_rank: RankPool, backend: str, num_parts: int, num_tokens: int
) -> None:
    kernel_rank.run(1, run_joins, backend, num_parts, num_tokens)


def run_repeats(backend: str) -> None:
    """Two runs agree to the last bit."""
    logits, labels, upstream = make_logits(5, 9000, 9000, torch.bfloat16)
    results = []
    for _ in range(2):
        inputs = logits.clone().requires_grad_()
        loss = masked_cross_entropy(inputs, labels, backend=backend)
        results.append((loss, *gradient(loss, upstream, inputs)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_repeats_bit_for_bit(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_repeats, backend)


def run_double(backend: str) -> None:
    with pytest.raises(ValueError, match="float64, expected bfloat16, float16 or float32"):
        masked_cross_entropy(
            torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1]), backend=backend
        )


@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
def test_double_is_refused(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_double, backend)


def run_operators(backend: str) -> None:
    """torch.compile's view of the operators: what they change, and the shapes they promise."""
    kernels = load_backend("masked_cross_entropy", backend, torch.get_default_device().type)
    prefix = "native_masked_cross_entropy" if backend == "native" else "masked_cross_entropy"
    logits, labels, upstream = make_logits(3, 20000, 20000, torch.float32)
    logits, labels = logits.nan_to_num(0.0), labels.clamp(min=0)
    columns = VocabColumns(0, 20000, 20000)
    options = LossOptions(label_smoothing=0.1, z_loss=0.1, logit_softcap=5.0)
    grads = torch.stack([upstream, upstream])

    def check(name: str, *arguments: Any) -> None:
        operator = getattr(torch.ops.sft_fast, f"{prefix}_{name}").default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    numbers = list(columns), options.values()
    check("statistics", logits, labels, *numbers, True)
    statistics = kernels.shard_statistics(logits, labels, columns, options, True)
    check("losses", statistics, labels, 20000, options.values(), True)
    check("losses", statistics[:, :4], labels, 20000, options.values(), False)
    check("gradient", torch.zeros_like(logits), logits, labels, statistics, grads, *numbers)

    def compute(logits: Tensor) -> tuple[Tensor, ...]:
        statistics = kernels.shard_statistics(logits * 2, labels, columns, options, True)
        losses = kernels.token_losses(statistics, labels, 20000, options, True)
        gradient = torch.empty_like(logits)
        kernels.write_gradient(gradient, logits * 2, labels, statistics, grads, columns, options)
        return statistics + 1, losses + 1, gradient

    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    for ours, plain in zip(compiled(logits), compute(logits), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
def test_operators_work_under_torch_compile(kernel_rank: RankPool, backend: str) -> None:
    kernel_rank.run(1, run_operators, backend)
