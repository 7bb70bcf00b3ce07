"""Attention within samples: every backend is held to dense attention, or it is not used."""

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sft_fast.models.choices import AttentionBackend


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    from sft_fast.megatron.attention import backends

    chain = dict(backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", chain)
    yield chain


def shape(dtype: torch.dtype = torch.float32, kv_heads: int = 2, value_dim: int = 16) -> Any:
    from sft_fast.megatron.attention.self_test import AttentionShape

    return AttentionShape(torch.device("cpu"), dtype, 4, kv_heads, 16, value_dim)


def choose(name: str, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> Any:
    from sft_fast.megatron.attention.backends import choose_attention
    from sft_fast.megatron.attention.packed_samples import ScoreOptions

    return choose_attention(name, shape(dtype, kv_heads), [ScoreOptions(0.25)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cpu_backend_passes_its_own_test(dtype: torch.dtype, kv_heads: int) -> None:
    assert choose("auto", dtype, kv_heads).name == "sdpa"


def leaky(query: Tensor, key: Tensor, value: Tensor, samples: object, scoring: Any) -> Tensor:
    """Samples see the samples before them."""
    from sft_fast.megatron.attention.dense import dense_attention

    return dense_attention(query[:, None], key[:, None], value[:, None], scoring).squeeze(1)


def detached(query: Tensor, key: Tensor, value: Tensor, samples: object, scoring: Any) -> Tensor:
    """The right output with a wrong gradient."""
    from sft_fast.megatron.attention.dense import attend_sdpa

    return attend_sdpa(query, key.detach(), value, samples, scoring) + 0 * key.sum()


def broken(*args: object, **kwargs: object) -> Tensor:
    """A library's function that does not run on this device."""
    from sft_fast.megatron.attention.library_errors import noting_library

    with noting_library():
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
    from sft_fast.megatron.attention import backends, dense

    def missing() -> object:
        raise ImportError("No module named 'flash_attn'")

    chain.update(flash_attn=missing, aiter=lambda: leaky, torch_varlen=lambda: broken)
    monkeypatch.setattr(backends, "on_cpu_only", lambda device: False)
    choice = choose("auto")
    assert choice.name == "sdpa"
    text = str(choice)
    for reason in ("flash_attn: No module", "aiter: its output is off", "no kernel image"):
        assert reason in text
    chain["aiter"] = lambda: dense.attend_sdpa
    assert choose("auto").name == "aiter"


def test_a_varlen_library_gets_cumulative_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sft_fast.megatron.attention import backends, dense, packed_samples, self_test

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
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert causal and cu_seqlens_q.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        parts = zip(*(t[:, None].split(lengths) for t in (query, key, value)), strict=True)
        scoring = packed_samples.ScoreOptions(softmax_scale)
        outputs = [dense.dense_attention(*part, scoring) for part in parts]
        return torch.cat(outputs).squeeze(1), None

    library = SimpleNamespace(flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    assert choose("flash_attn").name == "flash_attn"
    scoring = packed_samples.ScoreOptions(0.3)
    self_test.check_attention(backends.BACKENDS["flash_attn"](), shape(value_dim=10), scoring)
    monkeypatch.setitem(sys.modules, "aiter", SimpleNamespace())
    with pytest.raises(ValueError, match="aiter has no flash_attn_varlen_func"):
        choose("aiter")


def test_transformer_engine_gets_cumulative_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that says no as the real one does, with an assertion."""
    from types import SimpleNamespace

    from sft_fast.megatron.attention import backends, dense, packed_samples, self_test

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
            scoring = packed_samples.ScoreOptions(self.scale, None if left < 0 else left + 1)
            lengths = options["cu_seqlens_q"].diff().tolist()
            assert options["max_seqlen_q"] == max(lengths)
            parts = zip(*(t[:, None].split(lengths) for t in (query, key, value)), strict=True)
            outputs = [dense.dense_attention(*part, scoring) for part in parts]
            return torch.cat(outputs).flatten(1)

    library = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=library))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", library)
    assert choose("transformer_engine").name == "transformer_engine"
    attend = backends.load_transformer_engine()
    for value_dim in (16, 12):
        scoring = packed_samples.ScoreOptions(0.3, 5)
        self_test.check_attention(attend, shape(value_dim=value_dim), scoring)
    with pytest.raises(ValueError, match="no bf16"):
        choose("transformer_engine", torch.bfloat16)
    with pytest.raises(backends.CannotUse, match="no soft cap"):
        attend(*3 * [torch.ones(1, 1, 1)], None, packed_samples.ScoreOptions(1.0, None, 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 0.7), (9, 0.7)])
@pytest.mark.parametrize("name", get_args(AttentionBackend)[1:])
def test_what_is_installed_computes_it_or_says_that_it_cannot(
    name: str, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    from sft_fast.megatron.attention import backends, packed_samples, self_test

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        attend = backends.BACKENDS[name]()
        scoring = packed_samples.ScoreOptions(64**-0.5, window, softcap)
        for value_dim in (64, 48):
            gpu_shape = self_test.AttentionShape(torch.device("cuda"), dtype, 8, 2, 64, value_dim)
            self_test.check_attention(attend, gpu_shape, scoring)
    except (ImportError, backends.CannotUse) as error:
        pytest.skip(str(error))


def test_auto_skips_what_cannot_do_the_layers(chain: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without soft caps, one that ignores windows, and one that has both."""
    from sft_fast.megatron.attention import backends, dense, packed_samples

    def no_window(query: Tensor, key: Tensor, value: Tensor, samples: Any, scoring: Any) -> Tensor:
        scoring = dataclasses.replace(scoring, window=None)
        return dense.attend_sdpa(query, key, value, samples, scoring)

    monkeypatch.setattr(backends, "on_cpu_only", lambda device: False)
    without_cap = backends.varlen_backend(broken, "scale", None)
    chain.update(flash_attn=lambda: without_cap, aiter=lambda: no_window)
    capped = packed_samples.ScoreOptions(0.25, 4096, 50.0)
    text = str(backends.choose_attention("auto", shape(), [capped]))
    assert text.startswith("sdpa")
    assert "not flash_attn: it has no soft cap" in text
    assert "not aiter: its output is off" in text
    assert "not torch_varlen: it has no soft cap" in text


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="flash3.*flash_attn.*sdpa"):
        choose("flash3")


def test_older_varlen_attention_gets_as_many_key_heads_as_query_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in with the signature of torch 2.11, which has no enable_gqa."""
    from sft_fast.megatron.attention import backends, dense, packed_samples, self_test

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
            dense.dense_attention(q, k, v, packed_samples.ScoreOptions(scale))
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(outputs).squeeze(1)

    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attend = backends.load_torch_varlen()
    self_test.check_attention(attend, shape(), packed_samples.ScoreOptions(0.25))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, AssertionError])
@pytest.mark.parametrize("name", ["sdpa", "flash_attn"])
def test_a_bug_of_ours_is_no_reason_to_pass_a_backend_over(
    chain: dict, monkeypatch: pytest.MonkeyPatch, error: type[Exception], name: str
) -> None:
    """It ends the run with its own traceback, named or with auto, around a library too."""
    from sft_fast.megatron.attention import backends

    def bug(*args: object) -> Tensor:
        raise error("ours")

    monkeypatch.setattr(backends, "on_cpu_only", lambda device: False)
    for other in set(chain) - {"sdpa"}:
        chain[other] = lambda: broken
    chain[name] = lambda: bug
    for asked in ("auto", name):
        with pytest.raises(error, match="^ours$"):
            choose(asked)


@pytest.mark.parametrize("error", [TypeError, ValueError, AssertionError])
def test_a_library_that_refuses_its_arguments_is_passed_over(
    chain: dict, error: type[Exception]
) -> None:
    from sft_fast.megatron.attention import backends

    def varlen(*args: object, **kwargs: object) -> Tensor:
        raise error("unexpected keyword")

    chain["flash_attn"] = lambda: backends.varlen_backend(varlen, "scale", None)
    with pytest.raises(ValueError, match="not flash_attn: unexpected keyword"):
        choose("flash_attn")


def test_a_library_whose_backward_pass_fails_is_passed_over(chain: dict) -> None:
    from sft_fast.megatron.attention import dense

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: Tensor) -> Tensor:
            return output.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise NotImplementedError("no backward pass on this device")

    def attend(query: Tensor, key: Tensor, value: Tensor, samples: Any, scoring: Any) -> Tensor:
        return ForwardOnly.apply(dense.attend_sdpa(query, key, value, samples, scoring))

    chain["flash_attn"] = lambda: attend
    with pytest.raises(ValueError, match="not flash_attn: no backward pass"):
        choose("flash_attn")
    chain["sdpa"] = lambda: attend
    with pytest.raises(NotImplementedError, match="no backward pass"):
        choose("sdpa")
