"""Queries, keys and values out of the fused projection: QK norm, rotary and split, in Triton.

One program works on some heads of a token: on queries, or on keys and values. The forward pass
reads the projection's output once and writes the heads where attention takes them; the backward
pass gathers the three gradients into that of the fused output. See kernels/README.md.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_fast.kernels.column_sums_triton import add_column_sums, gradient_total, total_gradient
from sft_fast.kernels.triton_launch import LAYER_KEY, check_tensor, operation, warp_size

ELEMENTS_PER_PROGRAM, ELEMENTS_PER_THREAD = 2048, 16
CDNA_WARP_SIZE = 64
MAX_PROGRAMS, MIN_TOKENS_PER_PROGRAM = 256, 4
"""For each block of heads, in a backward pass that sums weight gradients."""


@triton.jit
def heads_of(block, NUM_GROUPS: tl.constexpr, QUERIES: tl.constexpr, BLOCK_HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which heads a block is for, each [BLOCK_HEADS, 1] but the first.

    Returns: it holds queries; which of its places hold a head, and which a value; the head's number
    among the queries, the keys or the values; its place in a token of the fused layout.
    """
    Q_BLOCKS: tl.constexpr = (NUM_GROUPS * QUERIES + BLOCK_HEADS - 1) // BLOCK_HEADS
    places = tl.arange(0, BLOCK_HEADS)[:, None]
    is_query = block < Q_BLOCKS
    if is_query:
        numbers = block * BLOCK_HEADS + places
        is_head = numbers < NUM_GROUPS * QUERIES
        is_value = numbers < 0
        slots = numbers // QUERIES * (QUERIES + 2) + numbers % QUERIES
    else:
        pairs = (block - Q_BLOCKS) * BLOCK_HEADS + places
        numbers = pairs // 2
        is_head = numbers < NUM_GROUPS
        is_value = pairs % 2 == 1
        slots = numbers * (QUERIES + 2) + QUERIES + pairs % 2
    return is_query, is_head, is_value, numbers, slots


@triton.jit
def channels_of(  # type: ignore[no-untyped-def]
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    """The channels of a head in pairs, each [1, BLOCK_PAIRS].

    The first HALF pairs turn together. The channels that do not turn make pairs of the same kind,
    so that all of them are two tiles.

    Returns: the number of the pair, its first channel, its second channel.
    """
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    if 2 * HALF == HEAD_DIM or HALF == 0:
        return pairs, pairs, pairs + HEAD_DIM // 2
    firsts = tl.where(pairs < HALF, pairs, pairs + HALF)
    seconds = tl.where(pairs < HALF, pairs + HALF, pairs + HEAD_DIM // 2)
    # The compiler cannot see it, and would load one channel at a time.
    firsts = tl.max_contiguous(tl.multiple_of(firsts, [1, VECTOR]), [1, VECTOR])
    seconds = tl.max_contiguous(tl.multiple_of(seconds, [1, VECTOR]), [1, VECTOR])
    return pairs, firsts, seconds


@triton.jit
def rotary_fwd_kernel(  # type: ignore[no-untyped-def]
    output_ptr,  # [N, queries, then keys, then unless HAS_NORM values, HEAD_DIM]
    qkv_ptr,  # [N, NUM_GROUPS, QUERIES + 2, HEAD_DIM]
    cos_sin_ptr,  # [N, 2 * HALF] fp32: cosines, then sines
    q_weight_ptr,  # [HEAD_DIM]; only with HAS_NORM
    k_weight_ptr,
    eps,
    NUM_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Queries and keys of one token, normed and rotated; its values copied."""
    token = tl.program_id(0).to(tl.int64)
    is_query, is_head, is_value, numbers, slots = heads_of(
        tl.program_id(1), NUM_GROUPS, QUERIES, BLOCK_HEADS
    )
    pairs, firsts, seconds = channels_of(HEAD_DIM, HALF, VECTOR, BLOCK_PAIRS)
    places = numbers + tl.where(is_query, 0, NUM_GROUPS * QUERIES)
    if HAS_NORM:
        # Values are not changed and stay where they are.
        is_head = is_head & (is_value == 0)
        output_ptr += token * (NUM_GROUPS * (QUERIES + 1) * HEAD_DIM)
    else:
        places += tl.where(is_value, NUM_GROUPS, 0)
        output_ptr += token * (NUM_GROUPS * (QUERIES + 2) * HEAD_DIM)
    wanted = is_head & (pairs < HEAD_DIM // 2)
    inputs = qkv_ptr + token * (NUM_GROUPS * (QUERIES + 2) * HEAD_DIM) + slots * HEAD_DIM
    x_1 = tl.load(inputs + firsts, mask=wanted, other=0.0).to(tl.float32)
    x_2 = tl.load(inputs + seconds, mask=wanted, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(x_1 * x_1 + x_2 * x_2, 1)
        rstd = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        is_channel = pairs < HEAD_DIM // 2
        weight_1 = tl.load(weight_ptr + firsts, mask=is_channel, other=0.0).to(tl.float32)
        weight_2 = tl.load(weight_ptr + seconds, mask=is_channel, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight_1 += 1.0
            weight_2 += 1.0
        x_1 *= rstd * weight_1
        x_2 *= rstd * weight_2
    if HALF > 0:
        cos_sin_ptr += token * (2 * HALF)
        cos = tl.load(cos_sin_ptr + pairs, mask=pairs < HALF, other=1.0)
        sin = tl.load(cos_sin_ptr + HALF + pairs, mask=pairs < HALF, other=0.0)
        turns = (is_value == 0) & (pairs < HALF)
        turned = tl.where(turns, x_1 * cos - x_2 * sin, x_1)
        x_2 = tl.where(turns, x_2 * cos + x_1 * sin, x_2)
        x_1 = turned
    outputs = output_ptr + places * HEAD_DIM
    tl.store(outputs + firsts, x_1.to(output_ptr.dtype.element_ty), mask=wanted)
    tl.store(outputs + seconds, x_2.to(output_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def rotary_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [N, NUM_GROUPS, QUERIES + 2, HEAD_DIM]
    partial_ptr,  # [blocks, programs, HEAD_DIM] fp32; only with WITH_WEIGHTS
    grad_q_ptr,  # [N, NUM_GROUPS * QUERIES, HEAD_DIM]
    grad_k_ptr,  # [N, NUM_GROUPS, HEAD_DIM]
    grad_v_ptr,  # [N, NUM_GROUPS, HEAD_DIM]
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    qkv_ptr,  # [N, NUM_GROUPS, QUERIES + 2, HEAD_DIM]; only with HAS_NORM
    cos_sin_ptr,  # [N, 2 * HALF] fp32: cosines, then sines
    q_weight_ptr,  # [HEAD_DIM]; only with HAS_NORM
    k_weight_ptr,
    num_tokens,
    eps,
    NUM_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """The fused gradient of some tokens, and this program's part of the weights'."""
    TOKEN_SIZE: tl.constexpr = NUM_GROUPS * (QUERIES + 2) * HEAD_DIM
    block = tl.program_id(1)
    is_query, is_head, is_value, numbers, slots = heads_of(block, NUM_GROUPS, QUERIES, BLOCK_HEADS)
    pairs, firsts, seconds = channels_of(HEAD_DIM, HALF, VECTOR, BLOCK_PAIRS)
    # A gradient may hold head after head, each with all tokens.
    far_numbers = numbers.to(tl.int64)
    is_channel = pairs < HEAD_DIM // 2
    wanted, is_normed = is_head & is_channel, is_head & is_channel & (is_value == 0)
    if HAS_NORM:
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        weight_1 = tl.load(weight_ptr + firsts, mask=is_channel, other=0.0).to(tl.float32)
        weight_2 = tl.load(weight_ptr + seconds, mask=is_channel, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight_1 += 1.0
            weight_2 += 1.0
    if WITH_WEIGHTS:
        total_1 = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], tl.float32)
        total_2 = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], tl.float32)
    for number in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        # Not number.to(...): the interpreter counts in Python numbers.
        token = tl.full((), 0, tl.int64) + number
        if is_query:
            sources = grad_q_ptr + token * q_token_stride + far_numbers * q_head_stride
            grad_1 = tl.load(sources + firsts, mask=wanted, other=0.0).to(tl.float32)
            grad_2 = tl.load(sources + seconds, mask=wanted, other=0.0).to(tl.float32)
        else:
            sources = grad_k_ptr + token * k_token_stride + far_numbers * k_head_stride
            grad_1 = tl.load(sources + firsts, mask=is_normed, other=0.0).to(tl.float32)
            grad_2 = tl.load(sources + seconds, mask=is_normed, other=0.0).to(tl.float32)
            sources = grad_v_ptr + token * v_token_stride + far_numbers * v_head_stride
            is_plain = wanted & is_value
            grad_1 += tl.load(sources + firsts, mask=is_plain, other=0.0).to(tl.float32)
            grad_2 += tl.load(sources + seconds, mask=is_plain, other=0.0).to(tl.float32)
        if HALF > 0:
            cos = tl.load(cos_sin_ptr + token * (2 * HALF) + pairs, mask=pairs < HALF, other=1.0)
            sin = tl.load(
                cos_sin_ptr + token * (2 * HALF) + HALF + pairs, mask=pairs < HALF, other=0.0
            )
            turns = (is_value == 0) & (pairs < HALF)
            turned = tl.where(turns, grad_1 * cos + grad_2 * sin, grad_1)
            grad_2 = tl.where(turns, grad_2 * cos - grad_1 * sin, grad_2)
            grad_1 = turned
        if HAS_NORM:
            inputs = qkv_ptr + token * TOKEN_SIZE + slots * HEAD_DIM
            x_1 = tl.load(inputs + firsts, mask=is_normed, other=0.0).to(tl.float32)
            x_2 = tl.load(inputs + seconds, mask=is_normed, other=0.0).to(tl.float32)
            squares = tl.sum(x_1 * x_1 + x_2 * x_2, 1)
            rstd = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            x_1 *= rstd
            x_2 *= rstd
            if WITH_WEIGHTS:
                total_1 += tl.where(is_normed, grad_1 * x_1, 0.0)
                total_2 += tl.where(is_normed, grad_2 * x_2, 0.0)
            products = grad_1 * weight_1 * x_1 + grad_2 * weight_2 * x_2
            mean = (tl.sum(products, 1) / HEAD_DIM)[:, None]
            grad_1 = tl.where(is_normed, (grad_1 * weight_1 - x_1 * mean) * rstd, grad_1)
            grad_2 = tl.where(is_normed, (grad_2 * weight_2 - x_2 * mean) * rstd, grad_2)
        targets = grad_ptr + token * TOKEN_SIZE + slots * HEAD_DIM
        tl.store(targets + firsts, grad_1.to(grad_ptr.dtype.element_ty), mask=wanted)
        tl.store(targets + seconds, grad_2.to(grad_ptr.dtype.element_ty), mask=wanted)
    if WITH_WEIGHTS:
        row = block * tl.num_programs(0) + tl.program_id(0)
        partial_ptr += row.to(tl.int64) * HEAD_DIM
        tl.store(partial_ptr + firsts, tl.sum(total_1, 0)[None, :], mask=is_channel)
        tl.store(partial_ptr + seconds, tl.sum(total_2, 0)[None, :], mask=is_channel)


def launch_options(
    num_groups: int, queries: int, head_dim: int, half: int, warp_size: int
) -> dict[str, Any]:
    """How heads are cut into programs, and the layout of a token."""
    block_pairs = triton.next_power_of_2(head_dim // 2)
    block_heads = max(1, ELEMENTS_PER_PROGRAM // (2 * block_pairs))
    most_heads = triton.next_power_of_2(num_groups * max(2, queries))
    block_heads = min(block_heads, most_heads)
    num_warps = block_heads * 2 * block_pairs // (ELEMENTS_PER_THREAD * warp_size)
    # Triton 3.7 takes two registers more than four waves leave for the backward norm.
    hints = {"waves_per_eu": 4} if warp_size == CDNA_WARP_SIZE else {}
    return hints | {
        "NUM_GROUPS": num_groups,
        "QUERIES": queries,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "VECTOR": math.gcd(half, head_dim // 2, 8),
        "BLOCK_HEADS": block_heads,
        "BLOCK_PAIRS": block_pairs,
        "num_warps": max(1, num_warps),
    }


def num_blocks(num_groups: int, queries: int, block_heads: int) -> tuple[int, int]:
    """Programs of a token: for queries, for keys and values."""
    return triton.cdiv(num_groups * queries, block_heads), triton.cdiv(2 * num_groups, block_heads)


def queries_per_group(qkv: Tensor, num_groups: int, head_dim: int) -> int:
    """Queries that share a key, of a projection's output [..., heads * head_dim]."""
    size = num_groups * head_dim
    assert qkv.shape[-1] % size == 0 and head_dim % 2 == 0, (qkv.shape, num_groups, head_dim)
    return qkv.shape[-1] // size - 2


@operation("sft_fast::rotary")
def rotary_forward(
    qkv: Tensor,
    cos_sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_groups: int,
    head_dim: int,
    eps: float,
    is_zero_centered: bool,
) -> Tensor:
    """Heads one after the other: queries, keys, and without a norm the values.

    Args: as rotate_qkv.

    Returns: [..., heads, head_dim]. With a norm the values are not copied, because the input is
        kept anyway.
    """
    check_tensor(qkv, "queries and keys", LAYER_KEY)
    output = new_heads(qkv, q_weight, num_groups, head_dim)
    num_tokens = qkv.numel() // max(1, qkv.shape[-1])
    if num_tokens == 0:
        return output
    half = 0 if cos_sin is None else cos_sin.shape[-1] // 2
    queries = queries_per_group(qkv, num_groups, head_dim)
    options = launch_options(num_groups, queries, head_dim, half, warp_size(qkv))
    blocks = num_blocks(num_groups, queries, options["BLOCK_HEADS"])
    with torch.cuda.device_of(qkv):
        rotary_fwd_kernel[(num_tokens, sum(blocks))](
            output,
            qkv.contiguous(),
            None if cos_sin is None else cos_sin.contiguous(),
            q_weight,
            k_weight,
            eps,
            HAS_NORM=q_weight is not None,
            ZERO_CENTERED=is_zero_centered,
            **options,
        )
    return output


def new_heads(qkv: Tensor, q_weight: Tensor | None, num_groups: int, head_dim: int) -> Tensor:
    """Empty [..., heads, head_dim] for the output of the projection."""
    num_heads = qkv.shape[-1] // head_dim - (0 if q_weight is None else num_groups)
    return qkv.new_empty((*qkv.shape[:-1], num_heads, head_dim))


@rotary_forward.register_fake
def _(
    qkv: Tensor,
    cos_sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_groups: int,
    head_dim: int,
    eps: float,
    is_zero_centered: bool,
) -> Tensor:
    return new_heads(qkv, q_weight, num_groups, head_dim)


@operation("sft_fast::rotary_gradient", mutates_args=("q_total", "k_total"))
def rotary_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor | None,
    cos_sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_total: Tensor | None,
    k_total: Tensor | None,
    eps: float,
    is_zero_centered: bool,
) -> Tensor:
    """Gradient of the fused projection's output, and of the norms' weights.

    Args:
        grad_q: [..., queries, head_dim]; grad_k, grad_v: [..., groups, head_dim]; last stride 1.
        grad_k: [..., groups, head_dim].
        grad_v: like grad_k.
        qkv: the forward pass's input; None without a norm.
        cos_sin: fp32 [N, 2 * half], cosines, then sines; None = not rotated.
        q_weight: [head_dim]; None = no norm.
        k_weight: like q_weight.
        q_total: fp32 [head_dim], where the gradient of q_weight is added; None = frozen.
        k_total: like q_total.
        eps: of the norm.
        is_zero_centered: the factor is 1 + weight.

    Returns: [..., groups * (queries per group + 2) * head_dim].
    """
    num_groups, head_dim = grad_k.shape[-2:]
    grad = new_fused(grad_q, grad_k)
    num_tokens = grad_k.shape[:-2].numel()
    half = 0 if cos_sin is None else cos_sin.shape[-1] // 2
    queries = grad_q.shape[-2] // num_groups
    options = launch_options(num_groups, queries, head_dim, half, warp_size(grad_q))
    blocks = num_blocks(num_groups, queries, options["BLOCK_HEADS"])
    with_weights = q_total is not None or k_total is not None
    programs, partial = num_tokens, None
    if with_weights:
        programs = min(MAX_PROGRAMS, triton.cdiv(num_tokens, MIN_TOKENS_PER_PROGRAM))
        partial = grad_q.new_empty((sum(blocks), programs, head_dim), dtype=torch.float32)
    sources = [rows_of(tensor) for tensor in (grad_q, grad_k, grad_v)]
    strides = [stride for source in sources for stride in source.stride()[:2]]
    if num_tokens > 0:
        with torch.cuda.device_of(grad_q):
            rotary_bwd_kernel[(programs, sum(blocks))](
                grad,
                partial,
                *sources,
                *strides,
                None if qkv is None else qkv.contiguous(),
                None if cos_sin is None else cos_sin.contiguous(),
                q_weight,
                k_weight,
                num_tokens,
                eps,
                HAS_NORM=q_weight is not None,
                WITH_WEIGHTS=with_weights,
                ZERO_CENTERED=is_zero_centered,
                **options,
            )
    if partial is not None:
        for total, part in zip((q_total, k_total), partial.split(blocks), strict=True):
            if total is not None:
                add_column_sums(total, part)
    return grad


def rows_of(grad: Tensor) -> Tensor:
    """[tokens, heads, head_dim], copied only if it has no such view with last stride 1."""
    grad = grad.flatten(0, -3)
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def new_fused(grad_q: Tensor, grad_k: Tensor) -> Tensor:
    """Empty [..., heads * head_dim] for the gradient of the projection's output."""
    num_heads = grad_q.shape[-2] + 2 * grad_k.shape[-2]
    return grad_q.new_empty((*grad_q.shape[:-2], num_heads * grad_q.shape[-1]))


@rotary_backward.register_fake
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor | None,
    cos_sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_total: Tensor | None,
    k_total: Tensor | None,
    eps: float,
    is_zero_centered: bool,
) -> Tensor:
    return new_fused(grad_q, grad_k)


class RotateQkv(torch.autograd.Function):
    """Arguments as rotary_forward; returns queries, keys, values."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos_sin: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        num_groups: int,
        head_dim: int,
        eps: float,
        is_zero_centered: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [..., heads, head_dim]."""
        options = num_groups, head_dim, eps, is_zero_centered
        heads = rotary_forward(qkv, cos_sin, q_weight, k_weight, *options)
        has_norm = q_weight is not None
        ctx.save_for_backward(qkv if has_norm else None, cos_sin, q_weight, k_weight)
        ctx.eps, ctx.is_zero_centered = eps, is_zero_centered
        queries = num_groups * queries_per_group(qkv, num_groups, head_dim)
        if not has_norm:
            return heads.split([queries, num_groups, num_groups], dim=-2)
        query, key = heads.split([queries, num_groups], dim=-2)
        fused = qkv.detach().unflatten(-1, (num_groups, -1, head_dim))
        return query, key, fused[..., -1, :]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the projection's output and of the norms' weights [head_dim]."""
        qkv, cos_sin, q_weight, k_weight = ctx.saved_tensors
        weights = q_weight, k_weight
        totals = [
            gradient_total(weight) if is_needed else None
            for weight, is_needed in zip(weights, ctx.needs_input_grad[2:4], strict=True)
        ]
        options = ctx.eps, ctx.is_zero_centered
        grad = rotary_backward(grad_q, grad_k, grad_v, qkv, cos_sin, *weights, *totals, *options)
        weight_grads = map(total_gradient, weights, totals)
        return grad, None, *weight_grads, None, None, None, None


def rotate_qkv(
    qkv: Tensor,
    cos_sin: Tensor | None,
    num_groups: int,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    is_zero_centered: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As block_torch.rotate_qkv; the three are views of one or two buffers."""
    options = num_groups, head_dim, eps, is_zero_centered
    query, key, value = RotateQkv.apply(qkv, cos_sin, q_weight, k_weight, *options)
    return query, key, value
