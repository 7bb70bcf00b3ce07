"""Context-parallel attention: each rank's share of many samples is that of the whole row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rank_pool import RankPool


def choice_of(chain: dict[str, str], cp_size: int) -> str:
    """What `auto` chooses among functions of this file, or the error."""
    from megatron.core import parallel_state

    from sft_fast.megatron.attention import backends, context_parallel
    from sft_fast.megatron.attention.packed_samples import ScoreOptions
    from sft_fast.megatron.attention.self_test import AttentionShape

    parallel_state.initialize_model_parallel(context_parallel_size=cp_size)
    group = context_parallel.ContextGroup(
        cp_size,
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_group(),
    )
    own = {name: attend for name, attend in globals().items() if name in chain.values()}
    original = dict(backends.BACKENDS)
    backends.BACKENDS.update({key: lambda v=own[v]: v for key, v in chain.items()})
    backends.on_cpu_only, on_cpu_only = (
        lambda device: False,
        backends.on_cpu_only,
    )
    shape = AttentionShape(torch.device("cpu"), torch.float32, 4, 2, 8, 6)

    def test(scoring: Any, attend: Any) -> None:
        context_parallel.check_context(group, shape, scoring, attend)

    try:
        return str(backends.choose_attention("auto", shape, [ScoreOptions(8**-0.5)], test))
    finally:
        backends.BACKENDS.update(original)
        backends.on_cpu_only = on_cpu_only


def top_left(query: Tensor, key: Tensor, value: Tensor, samples: Any, scoring: Any) -> Tensor:
    """The first query sees the first key, also where there are more keys."""
    from sft_fast.megatron.attention.dense import attend_sdpa
    from sft_fast.megatron.attention.packed_samples import pack_samples

    if samples.key_lengths is not None:
        starts = samples.cu_seqlens_kv[:-1].tolist()
        rows = [
            row
            for start, count in zip(starts, samples.seqlens, strict=True)
            for row in range(start, start + count)
        ]
        key, value = key[rows], value[rows]
        samples = pack_samples(samples.seqlens, samples.cu_seqlens_q)
    return attend_sdpa(query, key, value, samples, scoring)


def wrong_on_one_rank(*arguments: Any) -> Tensor:
    import torch.distributed as dist

    from sft_fast.megatron.attention.dense import attend_sdpa

    is_wrong = dist.get_rank() == 1 and arguments[3].key_lengths is not None
    return attend_sdpa(*arguments) * (2 if is_wrong else 1)


def test_a_backend_that_fails_in_context_is_passed_over_on_every_rank(rank_pool: RankPool) -> None:
    backends = {"flash_attn": "top_left", "aiter": "wrong_on_one_rank"}
    choices = rank_pool.run(2, choice_of, backends, 2)
    for choice in choices:
        assert choice.startswith("sdpa")
        for name in backends:
            assert f"not {name}: with parallel.context 2" in choice


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 0.8), (20, 0.8)])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_share_of_many_samples(cp_size: int, window: int | None, softcap: float | None) -> None:
    """Without communication: the segments' places among the gathered keys, and the attention."""
    from sft_fast.megatron.attention.context_parallel import ContextGroup, share_sequence
    from sft_fast.megatron.attention.dense import attend_sdpa
    from sft_fast.megatron.attention.packed_samples import ScoreOptions, pack_samples

    scoring = ScoreOptions(0.3, window, softcap)
    lengths = tuple(2 * cp_size * count for count in (1, 9, 2, 40))
    edges = torch.tensor((0, *lengths)).cumsum(0)
    torch.manual_seed(0)
    query = torch.randn(sum(lengths), 4, 8)
    key, value = (torch.randn(sum(lengths), 2, 8) for _ in range(2))
    whole = attend_sdpa(query, key, value, pack_samples(lengths, edges.int()), scoring)

    def tokens_of(rank: int) -> Tensor:
        """As micro_batch.SequenceLayout has it."""
        parts = [torch.arange(start, stop).chunk(2 * cp_size) for start, stop in
                 zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]  # fmt: skip
        return torch.cat([torch.cat([part[rank], part[-1 - rank]]) for part in parts])

    padding = torch.full((3, 2, 8), torch.nan)
    gathered = [
        torch.cat(
            [piece for rank in range(cp_size) for piece in (tensor[tokens_of(rank)], padding)]
        )
        for tensor in (key, value)
    ]
    num_tokens = sum(lengths) // cp_size + len(padding)
    for rank in range(cp_size):
        context: Any = ContextGroup(cp_size, rank, None)
        share = share_sequence(lengths, num_tokens, context, torch.device("cpu"))
        keys, values = (tensor[share.places] for tensor in gathered)
        own = tokens_of(rank)
        output = attend_sdpa(query[own], keys, values, share.segments, scoring)
        torch.testing.assert_close(output, whole[own])
        for part in (share.first, share.second):
            assert len(share.places[part].unique()) == len(part)
        assert len(share.first) + len(share.second) == len(share.places)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["flash_attn", "aiter", "torch_varlen", "sdpa"])
def test_the_share_of_many_samples_on_a_gpu(name: str) -> None:
    """Whether a library aligns queries with the last keys; bf16, output and gradients."""
    from sft_fast.megatron.attention.backends import BACKENDS
    from sft_fast.megatron.attention.context_parallel import ContextGroup, share_sequence
    from sft_fast.megatron.attention.packed_samples import ScoreOptions, pack_samples
    from sft_fast.megatron.attention.self_test import run_with_gradients

    try:
        attend = BACKENDS[name]()
    except ImportError as error:
        pytest.skip(str(error))
    cp_size, lengths, device = 4, (8, 72, 16, 640), torch.device("cuda")
    scoring = ScoreOptions(64**-0.5)
    edges = torch.tensor((0, *lengths), device=device).cumsum(0)
    torch.manual_seed(0)
    query, key, value, grad = (
        torch.randn(sum(lengths), heads, 64, device=device, dtype=torch.bfloat16)
        for heads in (4, 2, 2, 4)
    )
    whole = next(
        run_with_gradients(
            attend, [query, key, value, grad], pack_samples(lengths, edges.int()), scoring
        )
    )
    parts = [torch.arange(a, b).chunk(2 * cp_size) for a, b in
             zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]  # fmt: skip
    owned = [
        torch.cat([torch.cat([part[rank], part[-1 - rank]]) for part in parts]).to(device)
        for rank in range(cp_size)
    ]
    gathered = [tensor[torch.cat(owned)] for tensor in (key, value)]
    for rank, own in enumerate(owned):
        context: Any = ContextGroup(cp_size, rank, None)
        share = share_sequence(lengths, len(own), context, device)
        inputs = [query[own], *(tensor[share.places] for tensor in gathered), grad[own]]
        output, *gradients = run_with_gradients(attend, inputs, share.segments, scoring)
        torch.testing.assert_close(output, whole[own], rtol=2e-2, atol=2e-2)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
