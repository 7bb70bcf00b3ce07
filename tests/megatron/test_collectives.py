"""Collectives of one tensor, by names that torch does not call deprecated."""

import warnings

import pytest

from rank_pool import RankPool


def exchange() -> tuple[list[float], list[float]]:
    """What a rank gets of [rank, rank + 10] gathered, and of the sum of them scattered."""
    import torch
    import torch.distributed as dist

    from sft_fast.megatron.collectives import all_gather_single, reduce_scatter_single

    own = torch.tensor([0.0, 10.0]) + dist.get_rank()
    everything, share = torch.empty(4), torch.empty(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_gather_single(everything, own)
        reduce_scatter_single(share, own)
    return everything.tolist(), share.tolist()


def test_they_gather_and_sum_without_a_warning(rank_pool: RankPool) -> None:
    gathered = [0.0, 10.0, 1.0, 11.0]
    assert rank_pool.run(2, exchange) == [(gathered, [1.0]), (gathered, [21.0])]


@pytest.mark.parametrize("name", ["all_gather_single", "reduce_scatter_single"])
def test_new_names_are_used_where_torch_has_them(name: str) -> None:
    import torch.distributed as dist

    from sft_fast.megatron import collectives

    if not hasattr(dist, name):
        pytest.skip("an older torch")
    assert getattr(collectives, name) is getattr(dist, name)
