"""What hashing costs a save, and how fast a checkpoint is written and verified.

Run: `pytest benchmarks/bench_checkpoint.py`. One rank's shards of a 1.25 GiB state are written as a
run writes them: hashed, synced, renamed. `extra_info` has the same without the hash, and peers that
write the same tensors to one file and sync it: safetensors and torch.save. Rounds of all of them
alternate, so that a disk that slows down slows all. The folder is pytest's (`--basetemp`); on a
memory file system (`--basetemp=/dev/shm/x`) nothing hides the hash.
"""

from __future__ import annotations

import operator
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lone_rank import LoneRank
from sft_fast.runtime import manifest
from sft_fast.runtime.manifest import find_damage, staged_directory

ROUNDS = 9
GIB = 2**30


class NoHash:
    """Stands in for the hash."""

    def update(self, data: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


@pytest.fixture(scope="module")
def snapshot() -> Any:
    """Weights and two moments, fp32, of 26 layers of hidden size 1024."""
    pytest.importorskip("megatron.core")
    from sft_fast.megatron.checkpoint.shards import Shard, Snapshot

    tensors = []
    for layer in range(26):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            shape = (1024, 4 * 1024)
            shard = Shard(f"{name}{layer}", (0, 0), shape, shape)
            tensors.append((shard, torch.randn(shape)))
    return Snapshot(tensors, {}, {"step": 1})


def save(snapshot: Any, folder: Path) -> None:
    from sft_fast.megatron.checkpoint.reading import check_complete
    from sft_fast.megatron.checkpoint.shards import write_snapshot

    with staged_directory(folder, LoneRank(), snapshot.num_bytes, check_complete) as stage:
        write_snapshot(snapshot, stage, 0)


def synced(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def save_one(folder: Path) -> None:
        folder.mkdir()
        write(folder / "file")
        manifest.sync(folder / "file")

    return save_one


def seconds(work: Callable[[Path], None], folder: Path) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    work(folder)
    return time.perf_counter() - begin


def test_save(
    benchmark: Any, snapshot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {shard.name: tensor for shard, tensor in snapshot.tensors}
    whole = tmp_path / "whole"
    save(snapshot, whole)
    assert find_damage(whole) == []
    read = safetensors.torch.load_file(whole / "rank_00000.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())

    def unhashed(folder: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(manifest.xxhash, "xxh3_128", NoHash)
            save(snapshot, folder)

    kinds: dict[str, Callable[[Path], None]] = {
        "hashed": lambda folder: save(snapshot, folder),
        "unhashed": unhashed,
        "safetensors": synced(lambda path: safetensors.torch.save_file(state, path)),
        "torch_save": synced(lambda path: torch.save(state, path)),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(ROUNDS):
        # Peers are slower and noisier; the two that are compared stand side by side.
        for name in kinds if number % 2 else reversed(kinds):
            times[name].append(seconds(kinds[name], tmp_path / "round"))
    fastest = {name: min(values) for name, values in times.items()}
    size = snapshot.num_bytes / GIB
    benchmark.extra_info |= {
        "gib": round(size, 3),
        "gib_per_s": {name: round(size / value, 3) for name, value in fastest.items()},
        "median_gib_per_s": {
            name: round(size / statistics.median(values), 3) for name, values in times.items()
        },
        # Of each round by itself: a disk's speed changes more between rounds than this is.
        "hash_cost": round(
            statistics.median(map(operator.truediv, times["hashed"], times["unhashed"])) - 1, 4
        ),
    }
    print(benchmark.extra_info)
    benchmark.pedantic(lambda: save(snapshot, tmp_path / "last"), rounds=1)


def test_verify(benchmark: Any, snapshot: Any, tmp_path: Path) -> None:
    """Reading everything again, as a run does before it resumes."""
    save(snapshot, tmp_path / "whole")
    began = time.perf_counter()
    assert find_damage(tmp_path / "whole") == []
    verify_s = time.perf_counter() - began
    benchmark.extra_info["gib_per_s"] = round(snapshot.num_bytes / GIB / verify_s, 3)
    print(benchmark.extra_info)
    benchmark.pedantic(lambda: find_damage(tmp_path / "whole"), rounds=1)
