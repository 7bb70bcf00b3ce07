"""Machines that are late, disagree, or have directories of their own."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rank_pool import RankPool
from sft_fast.config.schema import load_config
from sft_fast.config.sections import CheckpointConfig


def error_of(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def agree_on(facts: list[Mapping[str, str]]) -> str:
    from sft_fast.megatron.join import agree

    return error_of(agree, "settings", facts[dist.get_rank()], 30.0)


@pytest.mark.fault("F35")
def test_every_rank_names_what_differs_and_both_values(rank_pool: RankPool) -> None:
    first = {"optim.lr": "1e-05", "seed": "7"}
    assert rank_pool.run(2, agree_on, [first, first]) == ["", ""]
    said = rank_pool.run(2, agree_on, [first, {"optim.lr": "2e-05", "seed": "7", "new": "1"}])
    assert said[0] == said[1]
    assert "optim.lr: 1e-05 on rank 0 (" in said[0] and "); 2e-05 on rank 1 (" in said[0]
    assert "new: nothing on rank 0" in said[0] and "seed" not in said[0]


def share(folders: list[str]) -> str:
    from sft_fast.megatron import join

    join.SEEN_WITHIN_S = 0.3
    return error_of(join.check_is_shared, Path(folders[dist.get_rank()]), 30.0)


@pytest.mark.fault("F35")
def test_a_directory_that_is_not_shared_is_seen_at_the_start(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    assert rank_pool.run(2, share, [str(tmp_path), str(tmp_path / "a" / "..")]) == ["", ""]
    said = rank_pool.run(2, share, list(map(str, folders)))
    assert said[0].startswith("output_dir: ") and "for ranks 1 (" in said[0]
    assert "is another directory" in said[1]
    assert not [path for folder in folders for path in folder.iterdir()]


def look_for_checkpoints(folders: list[str]) -> str:
    from sft_fast.megatron.start import find_checkpoint

    folder = Path(folders[dist.get_rank()])
    return error_of(find_checkpoint, folder, CheckpointConfig(), False, print, {})


@pytest.mark.fault("F35")
def test_a_checkpoint_on_one_machine_only_is_an_error(rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints" / "step_00000002").mkdir(parents=True)
    said = rank_pool.run(2, look_for_checkpoints, [str(tmp_path / name) for name in "ab"])
    for text in said:
        assert "the machines disagree about the checkpoints" in text
        assert "how many: 1 on rank 0" in text and "step_00000002: " in text


@pytest.mark.fault("F35")
def test_who_has_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sft_fast.megatron import join
    from sft_fast.megatron.exchange import Ranks

    monkeypatch.setattr(join, "TELL_EVERY_S", 0.1)
    store = dist.HashStore()
    for rank in (1, 3):
        with pytest.raises(TimeoutError, match="have not joined"):
            join.wait_for_all(Ranks(store, rank, 5), 0.0)
    caplog.set_level(logging.WARNING)
    with pytest.raises(TimeoutError, match=r"ranks 2, 4 of 5 have not joined after \d s; is the"):
        join.wait_for_all(Ranks(store, 0, 5), 0.5)
    assert "waiting: ranks 2, 4 of 5" in caplog.text
    with pytest.raises(TimeoutError):
        join.wait_for_all(Ranks(store, 2, 5), 0.0)
    join.wait_for_all(Ranks(store, 4, 5), 0.0)


def test_spans() -> None:
    from sft_fast.megatron.join import spans

    assert spans([]) == "" and spans([3]) == "3"
    assert spans([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


@pytest.mark.fault("F35")
def test_settings_hold_all_but_what_belongs_to_one_machine(tmp_path: Path) -> None:
    from sft_fast.megatron.join import settings

    def differing(*overrides: str) -> set[str]:
        configs = (load_config(None, []), load_config(None, [*overrides]))
        first, other = (settings(config.model_dump()) for config in configs)
        return {key for key in first.keys() | other.keys() if first.get(key) != other.get(key)}

    assert differing("optim.lr=3e-5", "optim.weight_decay=0.3") == {
        "optim.lr",
        "optim.weight_decay",
    }
    assert differing(f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}") == set()
    plugin = tmp_path / "plugin.py"
    plugin.touch()
    assert f"contents of {plugin}" in differing(f"plugins=[{plugin}]")
    facts = settings(load_config(None, []).model_dump())
    assert {"torch", "megatron-core", "python", "sft_fast"} <= facts.keys()
