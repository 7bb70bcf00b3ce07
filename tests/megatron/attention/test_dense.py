"""PyTorch's dense attention over packed samples, held to its definition."""

import pytest
import torch


@pytest.mark.parametrize(("window", "softcap"), [(3, None), (33, None), (None, 0.7), (5, 0.7)])
def test_windows_and_soft_caps_as_they_are_defined(
    window: int | None, softcap: float | None
) -> None:
    from sft_fast.megatron.attention.dense import attend_sdpa
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


def test_a_little_padding_is_a_sample() -> None:
    from sft_fast.megatron.attention.packed_samples import pack_samples

    edges = torch.tensor([0, 5, 14], dtype=torch.int32)
    samples = pack_samples((5, 9), edges, num_tokens=16)
    assert samples.seqlens == (5, 9, 2)
    assert samples.cu_seqlens_q.tolist() == samples.cu_seqlens_kv.tolist() == [0, 5, 14, 16]
    assert samples.cu_seqlens_q.dtype == torch.int32 and samples.max_seqlen_q >= 9
    for num_tokens, cp_size in ((14, 1), (17, 1), (0, 1), (16, 2)):
        samples = pack_samples((5, 9), edges, cp_size=cp_size, num_tokens=num_tokens)
        assert samples.seqlens == (5, 9) and samples.cu_seqlens_q.equal(edges)


def test_nothing_crosses_from_sample_to_sample() -> None:
    from sft_fast.megatron.attention.dense import attend_sdpa
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
