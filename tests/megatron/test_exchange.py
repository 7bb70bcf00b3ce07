"""What ranks tell each other through the store."""

import pytest
import torch.distributed as dist

from rank_pool import RankPool


def test_the_store_does_not_grow_with_every_save(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast.megatron.exchange import StoreExchange

    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    sizes = []
    for save in range(20):
        exchange = StoreExchange("save", 5.0)
        for phase in ("size", "begin", "written", "complete"):
            assert exchange.all_gather(phase, save) == [save]
        sizes.append(store.num_keys())
    assert sizes[-1] == sizes[1], sizes


def converse() -> list[list[int]]:
    from sft_fast.megatron.exchange import StoreExchange

    rank, answers = dist.get_rank(), []
    for save in range(5):
        exchange = StoreExchange("save", 30.0)
        answers += [exchange.all_gather(phase, 10 * save + rank) for phase in ("a", "b")]
    return answers


def test_every_rank_hears_all_of_every_phase(rank_pool: RankPool) -> None:
    expected = [[10 * save, 10 * save + 1] for save in range(5) for _ in "ab"]
    assert rank_pool.run(2, converse) == [expected, expected]
