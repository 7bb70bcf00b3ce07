"""Attention within samples: every backend is held to dense attention, or it is not used."""

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    from sft_fast.megatron.attention import backends

    chain = dict(backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", chain)
    yield chain


def choose(name: str, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> object:
    from sft_fast.megatron.attention.backends import choose_attention

    return choose_attention(name, torch.device("cpu"), dtype, 4, kv_heads, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cpu_backend_passes_its_own_test(dtype: torch.dtype, kv_heads: int) -> None:
    assert choose("auto", dtype, kv_heads).name == "sdpa"


def leaky(query: Tensor, key: Tensor, value: Tensor, samples: object, scoring: Any) -> Tensor:
    """Samples see the samples before them."""
    from sft_fast.megatron.attention.backends import dense_attention

    return dense_attention(query[:, None], key[:, None], value[:, None], scoring).squeeze(1)


def detached(query: Tensor, key: Tensor, value: Tensor, samples: object, scoring: Any) -> Tensor:
    """The right output with a wrong gradient."""
    from sft_fast.megatron.attention.backends import attend_sdpa

    return attend_sdpa(query, key.detach(), value, samples, scoring) + 0 * key.sum()


def broken(*args: object) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (leaky, "its output is off"),
        (detached, "its key gradient is off"),
        (broken, "no kernel image"),
    ],
)
def test_a_backend_that_computes_something_else_is_refused(
    chain: dict, backend: object, reason: str
) -> None:
    chain["flash_attn"] = lambda: backend
    with pytest.raises(ValueError, match=reason):
        choose("flash_attn")


@pytest.mark.parametrize(
    "error", [OSError("libcudart.so"), AssertionError("found two wheels"), AttributeError("no _C")]
)
def test_auto_passes_over_a_broken_installation(
    chain: dict, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from sft_fast.megatron.attention import backends

    def load() -> object:
        raise error

    monkeypatch.setattr(backends, "on_cpu_only", lambda device: False)
    for name in set(chain) - {"sdpa"}:
        chain[name] = load
    choice = choose("auto")
    assert choice.name == "sdpa" and f"not transformer_engine: {error}" in choice.passed_over


def test_auto_takes_the_first_that_works_and_says_why(
    chain: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_fast.megatron.attention import backends

    def missing() -> object:
        raise ImportError("No module named 'flash_attn'")

    chain.update(flash_attn=missing, aiter=lambda: leaky, torch_varlen=lambda: broken)
    monkeypatch.setattr(backends, "on_cpu_only", lambda device: False)
    choice = choose("auto")
    assert choice.name == "sdpa"
    text = str(choice)
    for reason in ("flash_attn: No module", "aiter: its output is off", "no kernel image"):
        assert reason in text
    chain["aiter"] = lambda: backends.attend_sdpa
    assert choose("auto").name == "aiter"


def test_a_varlen_library_gets_cumulative_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sft_fast.megatron.attention import backends

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, None]:
        assert causal and cu_seqlens_q.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        parts = zip(*(t[:, None].split(lengths) for t in (query, key, value)), strict=True)
        scoring = backends.ScoreOptions(softmax_scale)
        outputs = [backends.dense_attention(*part, scoring) for part in parts]
        return torch.cat(outputs).squeeze(1), None

    library = SimpleNamespace(flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    assert choose("flash_attn").name == "flash_attn"
    monkeypatch.setitem(sys.modules, "aiter", SimpleNamespace())
    with pytest.raises(ValueError, match="aiter has no flash_attn_varlen_func"):
        choose("aiter")


def test_transformer_engine_gets_cumulative_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that says no as the real one does, with an assertion."""
    from types import SimpleNamespace

    from sft_fast.megatron.attention import backends

    class DotProductAttention:
        def __init__(self, num_attention_heads: int, kv_channels: int, **options: Any):
            self.shape = num_attention_heads, options["num_gqa_groups"], kv_channels
            self.scale = options["softmax_scale"]
            assert options["attention_dropout"] == 0.0

        def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            assert (query.shape[1], key.shape[1], query.shape[2]) == self.shape
            assert query.dtype != torch.bfloat16, "no bf16"
            assert options["qkv_format"] == "thd"
            assert options["attn_mask_type"] == "padding_causal"
            left, right = options["window_size"]
            assert right == 0
            scoring = backends.ScoreOptions(self.scale, None if left < 0 else left + 1)
            lengths = options["cu_seqlens_q"].diff().tolist()
            assert options["max_seqlen_q"] == max(lengths)
            parts = zip(*(t[:, None].split(lengths) for t in (query, key, value)), strict=True)
            outputs = [backends.dense_attention(*part, scoring) for part in parts]
            return torch.cat(outputs).flatten(1)

    library = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=library))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", library)
    assert choose("transformer_engine").name == "transformer_engine"
    attend = backends.load_transformer_engine()
    check = backends.check_attention
    check(attend, torch.device("cpu"), torch.float32, 4, 2, 16, backends.ScoreOptions(0.3, 5))
    with pytest.raises(ValueError, match="no bf16"):
        choose("transformer_engine", torch.bfloat16)
    with pytest.raises(NotImplementedError, match="no soft cap"):
        attend(*3 * [torch.ones(1, 1, 1)], None, backends.ScoreOptions(1.0, None, 1.0))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 0.7), (20, 0.7)])
@pytest.mark.parametrize("has_prefixes", [False, True])
def test_flex_attention_sees_what_sdpa_sees(
    window: int | None, softcap: float | None, has_prefixes: bool
) -> None:
    """Forward only: it has no backward pass on a CPU."""
    from sft_fast.megatron.attention import backends
    from sft_fast.megatron.attention.context_parallel import segments

    query_lengths, cpu = np.array([5, 1, 40, 33, 2]), torch.device("cpu")
    key_lengths = query_lengths + ([3, 9, 0, 60, 1] if has_prefixes else 0)
    torch.manual_seed(0)
    query = torch.randn(query_lengths.sum(), 4, 16)
    key, value = torch.randn(2, key_lengths.sum(), 2, 16)
    samples = segments(query_lengths, key_lengths, cpu)
    scoring = backends.ScoreOptions(0.3, window, softcap)
    expected = backends.attend_sdpa(query, key, value, samples, scoring)
    output = backends.load_flex()(query, key, value, samples, scoring)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 0.7), (9, 0.7)])
@pytest.mark.parametrize("name", ["transformer_engine", "flash_attn", "torch_varlen", "flex"])
def test_what_is_installed_computes_it_or_says_that_it_cannot(
    name: str, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    from sft_fast.megatron.attention import backends

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        attend = backends.BACKENDS[name]()
        scoring = backends.ScoreOptions(64**-0.5, window, softcap)
        device = torch.device("cuda")
        backends.check_attention(attend, device, dtype, 8, 2, 64, scoring)
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("window", "softcap"), [(3, None), (33, None), (None, 0.7), (5, 0.7)])
def test_windows_and_soft_caps_as_they_are_defined(
    window: int | None, softcap: float | None
) -> None:
    from sft_fast.megatron.attention.backends import attend_sdpa
    from sft_fast.megatron.attention.packed_samples import ScoreOptions, pack_samples

    seqlens = (5, 1, 40, 33, 2)
    edges = torch.tensor((0, *seqlens)).cumsum(0)
    torch.manual_seed(0)
    query, key, value = (torch.randn(81, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    samples = pack_samples(seqlens, edges.int())
    output = attend_sdpa(query, key, value, samples, ScoreOptions(0.3, window, softcap))
    sample = torch.arange(81)[:, None] >= edges[1:-1]
    for row, head in ((80, 0), (78, 3), (60, 1), (6, 2), (0, 0)):
        first = int(edges[sample[row].sum()])
        first = first if window is None else max(first, row - window + 1)
        scores = key[first : row + 1, head // 2] @ query[row, head] * 0.3
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        expected = scores.softmax(0) @ value[first : row + 1, head // 2]
        torch.testing.assert_close(output[row, head], expected, atol=1e-6, rtol=1e-6)


def test_auto_skips_what_cannot_do_the_layers(chain: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without soft caps, one that ignores windows, and one that has both."""
    from sft_fast.megatron.attention import backends

    def no_window(query: Tensor, key: Tensor, value: Tensor, samples: Any, scoring: Any) -> Tensor:
        scoring = dataclasses.replace(scoring, window=None)
        return backends.attend_sdpa(query, key, value, samples, scoring)

    monkeypatch.setattr(backends, "on_cpu_only", lambda device: False)
    without_cap = backends.varlen_backend(broken, "scale", None)
    chain.update(flash_attn=lambda: without_cap, aiter=lambda: no_window)
    capped = backends.ScoreOptions(0.25, 4096, 50.0)
    arguments = "auto", torch.device("cpu"), torch.float32, 4, 2, 16
    text = str(backends.choose_attention(*arguments, [capped]))
    assert text.startswith("sdpa")
    assert "not flash_attn: it has no soft cap" in text
    assert "not aiter: its output is off" in text
    assert "not torch_varlen: it has no soft cap" in text


def test_nothing_crosses_from_sample_to_sample() -> None:
    from sft_fast.megatron.attention.backends import attend_sdpa
    from sft_fast.megatron.attention.packed_samples import ScoreOptions, pack_samples

    seqlens = (5, 1, 40, 33, 2)
    edges = torch.tensor((0, *seqlens)).cumsum(0).int()
    samples = pack_samples(seqlens, edges)
    torch.manual_seed(0)
    query, key, value = (torch.randn(81, 2, 8, requires_grad=True) for _ in range(3))
    output = attend_sdpa(query, key, value, samples, ScoreOptions(0.3))
    output[edges[2] : edges[3]].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad[edges[2] : edges[3]].any()
        tensor.grad[edges[2] : edges[3]] = 0
        assert not tensor.grad.any()


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="flash3.*flash_attn.*sdpa"):
        choose("flash3")


def test_older_varlen_attention_gets_as_many_key_heads_as_query_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in with the signature of torch 2.11, which has no enable_gqa."""
    from sft_fast.megatron.attention import backends

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: object = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert query.shape[1] == key.shape[1] == value.shape[1] and window_size == (-1, 0)
        assert scale is not None
        parts = (
            tensor.unsqueeze(1).tensor_split(cu_seq_q[1:-1].long())
            for tensor in (query, key, value)
        )
        outputs = [
            backends.dense_attention(q, k, v, backends.ScoreOptions(scale))
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(outputs).squeeze(1)

    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attend = backends.load_torch_varlen()
    scoring = backends.ScoreOptions(8**-0.5)
    backends.check_attention(attend, torch.device("cpu"), torch.float32, 4, 2, 8, scoring)
