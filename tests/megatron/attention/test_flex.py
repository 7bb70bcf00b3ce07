"""FlexAttention, held to dense attention."""

import numpy as np
import pytest
import torch


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 0.7), (20, 0.7)])
@pytest.mark.parametrize("has_prefixes", [False, True])
def test_flex_attention_sees_what_sdpa_sees(
    window: int | None, softcap: float | None, has_prefixes: bool
) -> None:
    """Forward only: it has no backward pass on a CPU."""
    from sft_fast.megatron.attention.context_parallel import segments
    from sft_fast.megatron.attention.dense import attend_sdpa
    from sft_fast.megatron.attention.flex import load_flex
    from sft_fast.megatron.attention.packed_samples import ScoreOptions

    query_lengths, cpu = np.array([5, 1, 40, 33, 2]), torch.device("cpu")
    key_lengths = query_lengths + ([3, 9, 0, 60, 1] if has_prefixes else 0)
    torch.manual_seed(0)
    query = torch.randn(query_lengths.sum(), 4, 16)
    key, value = torch.randn(2, key_lengths.sum(), 2, 16)
    samples = segments(query_lengths, key_lengths, cpu)
    scoring = ScoreOptions(0.3, window, softcap)
    expected = attend_sdpa(query, key, value, samples, scoring)
    output = load_flex()(query, key, value, samples, scoring)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
