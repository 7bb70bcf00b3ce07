"""The backends of attention within the samples of a pack, and the choice of one that works.

Every backend has the signature of `AttentionFn`. At start the first of the chain is chosen that
computes what dense attention computes, forward and backward: a library that is installed but broken
on this device is passed over, and the reason is told.
"""

import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sft_fast.errors import first_line
from sft_fast.megatron.attention.dense import attend_sdpa
from sft_fast.megatron.attention.flex import load_flex
from sft_fast.megatron.attention.library_errors import (
    CALL_ERRORS,
    LOAD_ERRORS,
    from_library,
    is_from_library,
)
from sft_fast.megatron.attention.packed_samples import (
    AttentionFn,
    PackedSamples,
    ScoreOptions,
    pack_samples,
)
from sft_fast.megatron.attention.self_test import AttentionShape, WrongResult, check_attention
from sft_fast.models.choices import AttentionBackend


class CannotUse(Exception):
    """A backend cannot be used in this run; the text says why."""


def varlen_backend(
    varlen: Callable[..., Any], scale_name: str, softcap_name: str | None, **options: Any
) -> AttentionFn:
    """Wraps a library's varlen function, which takes the samples as cumulative lengths.

    Args:
        varlen: (query, key, value, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, ...).
        scale_name: what it calls the factor of the scores.
        softcap_name: what it calls the soft cap; None = it has none.
        options: further arguments.
    """
    varlen = from_library(varlen)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        """[T, heads, head_dim]; see `AttentionFn`."""
        edges = samples.cu_seqlens_q, samples.cu_seqlens_kv  # int32 [samples + 1] each
        longest = samples.max_seqlen_q, samples.max_seqlen_kv
        given = options | {scale_name: scoring.scale}
        if scoring.window is not None:
            given["window_size"] = (scoring.window - 1, 0)
        if scoring.softcap is not None:
            if softcap_name is None:
                raise CannotUse("it has no soft cap of the attention scores")
            given[softcap_name] = scoring.softcap
        output = varlen(query, key, value, *edges, *longest, **given)
        return output[0] if isinstance(output, tuple) else output

    return widen_values(attend)


def widen_values(attend: AttentionFn) -> AttentionFn:
    """Gives `attend` values as wide as the keys, with zeros, and takes them off its output."""

    def attend_widened(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        """[T, heads, value_dim]; see `AttentionFn`."""
        missing = key.shape[-1] - value.shape[-1]
        if not missing:
            return attend(query, key, value, samples, scoring)
        wide = functional.pad(value, (0, missing))
        return attend(query, key, wide, samples, scoring)[..., : value.shape[-1]]

    return attend_widened


def load_torch_varlen() -> AttentionFn:
    """Loads PyTorch's own varlen attention."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in known:
        options = {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        return varlen_backend(varlen_attn, "scale", None, **options, enable_gqa=True)
    attend = varlen_backend(varlen_attn, "scale", None, **options)
    return attend if shares_heads(attend) else repeat_heads(attend)


def shares_heads(attend: AttentionFn) -> bool:
    """Whether several query heads may share a key head; tried, for releases do not tell."""
    if not torch.cuda.is_available():
        return False
    device = torch.device("cuda", torch.cuda.current_device())
    edges = torch.tensor([0, 8], dtype=torch.int32, device=device)
    try:
        query, key, value = (
            torch.ones((8, heads, 64), dtype=torch.bfloat16, device=device, requires_grad=True)
            for heads in (4, 2, 2)
        )
        attend(query, key, value, pack_samples((8,), edges), ScoreOptions(1.0)).sum().backward()
    except (RuntimeError, ValueError):
        return False
    return key.grad is not None and key.grad.shape == key.shape


def repeat_heads(attend: AttentionFn) -> AttentionFn:
    """Gives `attend` a copy of its keys and values for every query head."""

    def attend_repeated(
        query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scoring: ScoreOptions
    ) -> Tensor:
        """[T, heads, head_dim]; see `AttentionFn`."""
        count = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(count, dim=1) for tensor in (key, value))
        return attend(query, key, value, samples, scoring)

    return attend_repeated


def load_flash_attn(module: str, softcap_name: str) -> AttentionFn:
    """Loads the varlen function of flash-attn, or of `module` with the same signature."""
    varlen = getattr(importlib.import_module(module), "flash_attn_varlen_func", None)
    if varlen is None:
        raise ImportError(f"{module} has no flash_attn_varlen_func")
    return varlen_backend(varlen, "softmax_scale", softcap_name, causal=True)


def load_transformer_engine() -> AttentionFn:
    """Loads Transformer Engine's attention over packed tokens, its format "thd"."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")

    @cache
    @from_library
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
        """[T, heads, head_dim]; see `AttentionFn`."""
        if scoring.softcap is not None:
            raise CannotUse("it has no soft cap of the attention scores")
        is_prefix = samples.key_lengths is not None
        module = attention(query.shape[1], key.shape[1], query.shape[2], scoring.scale)
        output = from_library(module)(
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
        return output.view(query.shape)

    return widen_values(attend)


BACKENDS: dict[AttentionBackend, Callable[[], AttentionFn]] = {
    "flash_attn": lambda: load_flash_attn("flash_attn", "softcap"),
    "aiter": lambda: load_flash_attn("aiter", "logits_soft_cap"),
    "torch_varlen": load_torch_varlen,
    # Not earlier: on ROCm its packed attention was reported to hang, which no test at start ends.
    "transformer_engine": load_transformer_engine,
    "flex": load_flex,
    "sdpa": lambda: attend_sdpa,
}
"""In the order in which `auto` tries them on a GPU."""


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of a run, and why the ones before it are not used."""

    name: str
    attend: AttentionFn
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(self.passed_over)
        return f"{self.name} ({reasons})" if reasons else self.name


def on_cpu_only(device: torch.device) -> bool:
    """Whether no backend but sdpa could run, so that nothing else need be imported."""
    return device.type == "cpu"


def choose_attention(
    name: AttentionBackend,
    shape: AttentionShape,
    scorings: Collection[ScoreOptions],
    further_test: Callable[[ScoreOptions, AttentionFn], None] | None = None,
) -> AttentionChoice:
    """Returns the backend `name`, or with `auto` the first that passes the self-test.

    Args:
        name: of `model.attention`.
        shape: of the queries and keys of this rank.
        scorings: what the layers need.
        further_test: raises WrongResult for one that is not wanted either.

    Raises:
        ValueError: the named backend is missing, cannot do it or computes something else.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"model.attention is {name!r}; expected one of auto, {', '.join(BACKENDS)}"
        )
    candidates = [name]
    if name == "auto":
        candidates = ["sdpa"] if on_cpu_only(shape.device) else list(BACKENDS)
    passed_over: list[str] = []
    for candidate in candidates:
        try:
            attend = load_and_test(candidate, shape, scorings, further_test)
        except CannotUse as error:
            passed_over.append(f"not {candidate}: {error}")
        else:
            return AttentionChoice(candidate, attend, tuple(passed_over))
    raise ValueError(f"model.attention: {'; '.join(passed_over)}")


def load_and_test(
    name: AttentionBackend,
    shape: AttentionShape,
    scorings: Collection[ScoreOptions],
    further_test: Callable[[ScoreOptions, AttentionFn], None] | None,
) -> AttentionFn:
    """The backend `name`; arguments as for `choose_attention`.

    Raises:
        CannotUse: it is missing or broken, cannot do it, or computes something else.
    """
    try:
        attend = BACKENDS[name]()
    except LOAD_ERRORS as error:
        raise CannotUse(first_line(error)) from error
    try:
        # In the same order on every rank.
        for scoring in dict.fromkeys(scorings):
            check_attention(attend, shape, scoring)
            if further_test is not None:
                further_test(scoring, attend)
    except (CannotUse, WrongResult) as error:
        raise CannotUse(str(error)) from error
    except CALL_ERRORS as error:
        # Ours are bugs, and sdpa is ours.
        if name == "sdpa" or not is_from_library(error):
            raise
        raise CannotUse(first_line(error)) from error
    return attend
