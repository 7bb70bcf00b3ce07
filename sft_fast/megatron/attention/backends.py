"""Causal attention within the samples of a packed row: one function per library, one that works.

Every backend has the signature of `AttentionFn`. At start the first of the chain is chosen that
computes what plain attention computes, forward and backward: a library that is installed but broken
on this device is passed over, and the reason is told.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.megatron.attention.packed_samples import (
    AttentionFn,
    PackedSamples,
    ScoreOptions,
    pack_samples,
    size_class,
)

SELF_TEST_SEQLENS = (1, 70, 7, 33)
SELF_TEST_WINDOW = 20
SELF_TEST_SOFTCAP = 1.0


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scoring: ScoreOptions) -> Tensor:
    """Plain causal attention of [s, b, heads, head_dim] tensors; every column is one sample."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    length = query.shape[2]
    is_whole = scoring.window is None or scoring.window >= length
    mask = None if is_whole else window_mask(length, scoring.window, query.device)
    if scoring.softcap is None:
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_whole,
            scale=scoring.scale,
            enable_gqa=True,
        )
    else:
        if mask is None:
            mask = window_mask(length, None, query.device)
        output = capped_attention(query, key, value, mask, scoring)
    return output.permute(2, 0, 1, 3)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: which columns a row attends to."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: ScoreOptions
) -> Tensor:
    """Attention of [b, heads, s, head_dim] with a soft cap, which PyTorch's own has not; the
    weights are computed in fp32, and all of them are in memory."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scoring.scale
    assert scoring.softcap is not None
    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.masked_fill_(~mask, -math.inf).softmax(dim=-1)
    return weights.to(value.dtype) @ value


def attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
) -> Tensor:
    """PyTorch's dense attention over groups of similar samples; runs everywhere."""
    if samples.key_lengths is not None:
        return attend_prefixes(query, key, value, samples, scoring)
    groups, order = samples.groups
    outputs = []
    for rows in groups:
        index = rows.t().flatten().to(query.device, non_blocking=True)
        parts = [tensor.index_select(0, index) for tensor in (query, key, value)]
        columns = [part.unflatten(0, rows.t().shape) for part in parts]
        output = dense_attention(columns[0], columns[1], columns[2], scoring)
        outputs.append(output.transpose(0, 1).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order.to(query.device, non_blocking=True))


def attend_prefixes(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
) -> Tensor:
    """The same where samples have more keys than queries, under context parallelism."""
    outputs, order = [], []
    for members, query_rows, key_rows, mask in prefix_groups(samples, scoring.window):
        columns = [
            tensor.index_select(0, rows.flatten().to(query.device)).unflatten(0, rows.shape)
            for tensor, rows in ((query, query_rows), (key, key_rows), (value, key_rows))
        ]
        q, k, v = (column.transpose(1, 2) for column in columns)
        mask = mask.to(query.device)[:, None]
        if scoring.softcap is None:
            output = functional.scaled_dot_product_attention(
                q, k, v, mask, scale=scoring.scale, enable_gqa=True
            )
        else:
            output = capped_attention(q, k, v, mask, scoring)
        outputs.append(output.transpose(1, 2).flatten(0, 1)[members.to(query.device)])
        order.append(query_rows.flatten()[members])
    places = torch.cat(order).argsort().to(query.device)
    return torch.cat(outputs).index_select(0, places)


def prefix_groups(
    samples: PackedSamples, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Samples of similar size, on the CPU.

    Yields:
        Places of own rows in the flattened query rows; query rows int64 [n, q] and key rows
        [n, k], where a shorter sample repeats its first row; bool mask [n, q, k].
    """
    assert samples.key_lengths is not None
    lengths = torch.tensor([samples.seqlens, samples.key_lengths])
    starts = lengths.cumsum(1) - lengths
    classes = torch.tensor([[size_class(n) for n in row.tolist()] for row in lengths])
    for pair in classes.unique(dim=1).t():
        chosen = (classes == pair[:, None]).all(0)
        queries, keys = lengths[:, chosen, None]
        steps = [torch.arange(int(length.max())) for length in (queries, keys)]
        is_own = steps[0] < queries
        query_rows = starts[0, chosen, None] + torch.where(is_own, steps[0], 0)
        key_rows = starts[1, chosen, None] + torch.where(steps[1] < keys, steps[1], 0)
        last_key = (keys - queries + steps[0]).clamp(max=keys - 1)[..., None]
        mask = steps[1] <= last_key
        if window is not None:
            mask &= steps[1] > last_key - window
        yield is_own.flatten().nonzero()[:, 0], query_rows, key_rows, mask


def varlen_backend(
    varlen: Callable[..., Any], scale_name: str, softcap_name: str | None, **options: Any
) -> AttentionFn:
    """Wraps a library's varlen function, which takes the samples as cumulative lengths.

    Args:
        scale_name, softcap_name: what the function calls them; None = it has no soft cap.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        edges = samples.cu_seqlens_q, samples.cu_seqlens_kv
        longest = samples.max_seqlen_q, samples.max_seqlen_kv
        given = options | {scale_name: scoring.scale}
        if scoring.window is not None:
            given["window_size"] = (scoring.window - 1, 0)
        if scoring.softcap is not None:
            if softcap_name is None:
                raise NotImplementedError("it has no soft cap of the attention scores")
            given[softcap_name] = scoring.softcap
        output = varlen(query, key, value, *edges, *longest, **given)
        return output[0] if isinstance(output, tuple) else output

    return attend


def load_torch_varlen() -> AttentionFn:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in known:
        options = {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        return varlen_backend(varlen_attn, "scale", None, **options, enable_gqa=True)
    # Older releases want as many heads of keys as of queries.
    return repeat_heads(varlen_backend(varlen_attn, "scale", None, **options))


def repeat_heads(attend: AttentionFn) -> AttentionFn:
    """Gives `attend` a copy of its keys and values for every query head."""

    def attend_repeated(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        count = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(count, dim=1) for tensor in (key, value))
        return attend(query, key, value, samples, scoring)

    return attend_repeated


def load_flash_attn(module: str, softcap_name: str) -> AttentionFn:
    varlen = getattr(importlib.import_module(module), "flash_attn_varlen_func", None)
    if varlen is None:
        raise ImportError(f"{module} has no flash_attn_varlen_func")
    return varlen_backend(varlen, "softmax_scale", softcap_name, causal=True)


def load_transformer_engine() -> AttentionFn:
    engine: Any = importlib.import_module("transformer_engine.pytorch")

    @cache
    def attention(heads: int, kv_heads: int, head_dim: int, scale: float) -> Any:
        return engine.DotProductAttention(
            heads,
            head_dim,
            num_gqa_groups=kv_heads,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            softmax_scale=scale,
        )

    def attend(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        if scoring.softcap is not None:
            raise NotImplementedError("it has no soft cap of the attention scores")
        is_prefix = samples.key_lengths is not None
        module = attention(query.shape[1], key.shape[1], query.shape[2], scoring.scale)
        output = module(
            query,
            key,
            value,
            qkv_format="thd",
            cu_seqlens_q=samples.cu_seqlens_q,
            cu_seqlens_kv=samples.cu_seqlens_kv,
            max_seqlen_q=samples.max_seqlen_q,
            max_seqlen_kv=samples.max_seqlen_kv,
            attn_mask_type="padding_causal_bottom_right" if is_prefix else "padding_causal",
            window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
        )
        return output.view_as(query)

    return attend


def load_flex() -> AttentionFn:
    """FlexAttention, compiled; imported when it is tried."""
    module: Any = importlib.import_module("sft_fast.megatron.attention.flex")
    return module.load_flex()


BACKENDS: dict[str, Callable[[], AttentionFn]] = {
    "flash_attn": lambda: load_flash_attn("flash_attn", "softcap"),
    "aiter": lambda: load_flash_attn("aiter", "logits_soft_cap"),
    "torch_varlen": load_torch_varlen,
    # Not earlier: on ROCm its packed attention was reported to hang, which no test at start ends.
    "transformer_engine": load_transformer_engine,
    "flex": load_flex,
    "sdpa": lambda: attend_sdpa,
}
"""In the order in which `auto` tries them on a GPU."""
BROKEN = (
    *(ImportError, OSError, AttributeError),  # built for another torch, or a file is missing
    *(RuntimeError, NotImplementedError, ValueError, TypeError),
    AssertionError,  # how Transformer Engine says that it cannot, or that its parts do not fit
)
"""What a library that cannot be used raises, as it is imported or called."""


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of a run, and why the ones before it are not."""

    name: str
    attend: AttentionFn
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(self.passed_over)
        return f"{self.name} ({reasons})" if reasons else self.name


def on_cpu_only(device: torch.device) -> bool:
    """True where no backend but sdpa could run, so that nothing else need be imported."""
    return device.type == "cpu"


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scorings: Collection[ScoreOptions] = (),
    further_test: Callable[[ScoreOptions, AttentionFn], None] | None = None,
) -> AttentionChoice:
    """Returns the backend `name`, or with `auto` the first that passes the self-test.

    Args:
        scorings: what the layers need; none = plain causal attention.
        further_test: raises ValueError for one that is not wanted either.

    Raises:
        ValueError: the named backend is missing, cannot do it or computes something else.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"model.attention is {name!r}; expected one of auto, {', '.join(BACKENDS)}"
        )
    candidates = [name]
    if name == "auto":
        candidates = ["sdpa"] if on_cpu_only(device) else list(BACKENDS)
    passed_over: list[str] = []
    for candidate in candidates:
        try:
            attend = BACKENDS[candidate]()
            # In the same order on every rank.
            for scoring in dict.fromkeys(scorings) or [ScoreOptions(1.0 / math.sqrt(head_dim))]:
                check_attention(attend, device, dtype, num_heads, num_kv_heads, head_dim, scoring)
                if further_test is not None:
                    further_test(scoring, attend)
            return AttentionChoice(candidate, attend, tuple(passed_over))
        except BROKEN as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            passed_over.append(f"not {candidate}: {first_line}")
    raise ValueError(f"model.attention: {'; '.join(passed_over)}")


def check_attention(
    attend: AttentionFn,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scoring: ScoreOptions,
) -> None:
    """Compares output and gradients with dense attention of each sample alone.

    The error against fp32 may be twice that of dense attention in the same dtype. A window and a
    soft cap are made small, so that they matter to the short test samples.

    Raises:
        ValueError: the error is larger.
    """
    edges = torch.tensor((0, *SELF_TEST_SEQLENS), dtype=torch.int32, device=device)
    samples = pack_samples(SELF_TEST_SEQLENS, edges.cumsum(0, dtype=torch.int32))
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(SELF_TEST_SEQLENS)
    scoring = replace(
        scoring,
        window=scoring.window and min(scoring.window, SELF_TEST_WINDOW),
        softcap=scoring.softcap and min(scoring.softcap, SELF_TEST_SOFTCAP),
    )
    inputs = [
        torch.randn(num_tokens, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]

    def alone(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        parts = (tensor.unsqueeze(1).split(SELF_TEST_SEQLENS) for tensor in (query, key, value))
        outputs = [dense_attention(q, k, v, scoring) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs).squeeze(1)

    truth = list(run_with_gradients(alone, [part.float() for part in inputs], samples, scoring))
    plain = run_with_gradients(alone, inputs, samples, scoring)
    found = run_with_gradients(attend, inputs, samples, scoring)
    names = ("output", "query gradient", "key gradient", "value gradient")
    for what, expected, same_dtype, got in zip(names, truth, plain, found, strict=True):
        limit = 2 * float((same_dtype.float() - expected).abs().max()) + 1e-5
        error = float((got.float() - expected).abs().max())
        if not error <= limit:  # also true for NaN
            raise ValueError(f"its {what} is off by {error:.2g}, more than {limit:.2g}")


def run_with_gradients(
    attend: AttentionFn, inputs: list[Tensor], samples: PackedSamples, scoring: ScoreOptions
) -> Iterator[Tensor]:
    """Yields the output [tokens, heads, head_dim] and the gradients of query, key and value."""
    *leaves, grad_output = [tensor.detach().clone() for tensor in inputs]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query, key, value = leaves
    output = attend(query, key, value, samples, scoring)
    yield output.detach()
    yield from torch.autograd.grad(output, leaves, grad_output)
