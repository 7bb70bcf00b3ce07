"""Saves and loads of two ranks beside what the disk does with the same bytes, in one run.

    pytest benchmarks/bench_checkpoint_ranks.py --basetemp=FOLDER_ON_THE_DISK

Two gloo ranks save and load the bf16 weights and fp32 states of a model, the way a run does: found,
hashed, synced, agreed on. In the same rounds they write as many bytes with nothing but write and
fsync, and read them with nothing but read, from one rank and from both; the faster one is the speed
of the disk. Before each read that is measured the pages are given up (POSIX_FADV_DONTNEED), read
once without measuring, and given up again: the first read after a write is slower, plain or not.
`of_disk` is the disk's fastest round over ours, `median_of_disk` the same of medians; `profile`
holds the seconds that rank 0 spent, in the last round, in hashing, in the system's calls and in
waiting for the other rank. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_pool import RankPool
from tiny import make_config

ROUNDS = int(os.environ.get("SFT_FAST_BENCH_ROUNDS", "5"))
WORLD_SIZE = 2
BLOCK_BYTES = 16 << 20
GIB = 2**30
SHAPE = {
    "hidden_size": 1024,
    "num_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "ffn_hidden_size": 2816,
    "max_position_embeddings": 128,
}


def forget(folder: Path) -> None:
    """Gives up the pages of a folder's files, so that they are read from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_plainly(path: Path, num_bytes: int, block: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, num_bytes, len(block)):
            part = block[: num_bytes - begin]
            while part:
                part = part[file.write(part) :]
        os.fsync(file.fileno())


def read_plainly(path: Path, block: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):  # type: ignore[attr-defined]
            pass


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Timer:
    """Seconds between barriers, and what rank 0 spent them on."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.profile: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        import torch.distributed as dist

        dist.barrier()
        began = time.perf_counter()
        yield
        dist.barrier()
        self.times.setdefault(name, []).append(time.perf_counter() - began)

    @contextlib.contextmanager
    def profiled(self, name: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
        spent: dict[str, float] = {}

        def timed(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                began = time.perf_counter()
                try:
                    return call(*args, **options)
                finally:
                    spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - began

            return run

        from sft_fast.megatron.exchange import StoreExchange
        from sft_fast.runtime import manifest

        hasher = manifest.xxhash.xxh3_128

        class TimedHash:
            def __init__(self) -> None:
                self.inner = hasher()
                self.update = timed("hash", self.inner.update)
                self.hexdigest = self.inner.hexdigest

        patch.setattr(manifest.xxhash, "xxh3_128", TimedHash)
        patch.setattr(os, "fsync", timed("fsync", os.fsync))
        patch.setattr(
            StoreExchange, "all_gather", timed("wait for ranks", StoreExchange.all_gather)
        )
        for call in ("write", "preadv", "posix_fadvise"):
            patch.setattr(os, call, timed(call, getattr(os, call)))
        began, cpu, faults = time.perf_counter(), time.process_time(), page_faults()
        yield
        spent["all"] = time.perf_counter() - began
        spent["of a core"] = time.process_time() - cpu
        spent["page faults"] = page_faults() - faults
        self.profile[name] = {kind: round(seconds, 3) for kind, seconds in spent.items()}


def begin() -> tuple[Any, Any]:
    """A run at step 0 whose states are random numbers, and its config."""
    import torch

    from sft_fast.megatron.hf import RandomSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_shape

    config = make_config(model={"dtype": "bf16", "shape": SHAPE})
    ranks = init_parallel(config.parallel, config.train, config.seed)
    assert config.model.shape is not None
    architecture = architecture_from_shape(config.model.shape, 16384)
    run = build_run(config, architecture, RandomSource(architecture, 1), 9, ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    for tensor in states(run):
        tensor.normal_(generator=generator)
    return run, config


def states(run: Any) -> list[Any]:
    """The fp32 tensors of this rank's optimizer."""
    from sft_fast.megatron.optim import torch_adam_parts

    return [
        tensor
        for adam in torch_adam_parts(run.optimizer)
        for parameter, state in adam.state.items()
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
    ]


def work(folder: str, num_rounds: int) -> tuple[dict[str, list[float]], dict[str, Any], int]:
    """What each of both ranks does.

    Returns: kind -> seconds of each round, profiles, bytes of the checkpoint.
    """
    import torch
    import torch.distributed as dist

    from sft_fast.megatron.checkpoint.load import load_checkpoint, newest_whole_checkpoint
    from sft_fast.megatron.checkpoint.save import CheckpointWriter
    from sft_fast.megatron.checkpoint.state import sharded_state
    from sft_fast.megatron.checkpoint.train_state import TrainState
    from sft_fast.runtime.phases import Phases
    from sft_fast.runtime.run_files import list_checkpoints

    run, config = begin()
    rank, timer, target = dist.get_rank(), Timer(), Path(folder)
    plain = target / "plain"
    noise = np.random.default_rng(rank).integers(0, 256, BLOCK_BYTES, np.uint8)
    block = memoryview(noise)
    num_bytes = 0

    def save() -> None:
        writer = CheckpointWriter(target, config.checkpoint, print, run.copier, Phases.unwatched())
        state = sharded_state(run.model, run.optimizer, run.schedule)
        writer.save(TrainState(0, {}), state, is_last=True)

    def load() -> None:
        found = newest_whole_checkpoint(list_checkpoints(target), print, 600.0)
        assert found is not None
        load_checkpoint(found, run.model, run.optimizer, run.schedule)

    def clear() -> None:
        dist.barrier()
        if rank == 0:
            for path in (*target.glob("step_*"), plain):
                shutil.rmtree(path, ignore_errors=True)
            plain.mkdir(parents=True)
        os.sync()
        dist.barrier()

    def forget_all() -> None:
        dist.barrier()
        if rank == 0:
            for path in (*target.glob("step_*"), plain):
                forget(path)
        dist.barrier()

    def read_ahead_of_time(path: Path | None) -> None:
        """A read that is not measured: the first one after a write is slower, plain or not."""
        forget_all()
        if path is not None:
            read_plainly(path, block)
        forget_all()

    def one_round(patch: pytest.MonkeyPatch) -> None:
        nonlocal num_bytes
        clear()
        with timer.measure("save"), timer.profiled("save", patch):
            save()
        patch.undo()
        num_bytes = sum(path.stat().st_size for path in target.glob("step_*/*"))
        kept = [tensor.clone() for tensor in states(run)]
        for tensor in states(run):
            tensor.zero_()
        read_ahead_of_time(next(target.glob(f"step_*/rank_{rank:05d}*")))
        with timer.measure("load"), timer.profiled("load", patch):
            load()
        patch.undo()
        assert all(map(torch.equal, states(run), kept)), "what was loaded is not what was saved"
        del kept
        for writers in (1, WORLD_SIZE):
            clear()
            share, path = num_bytes // writers, plain / str(rank)
            with timer.measure(f"write by {writers}"):
                if rank < writers:
                    write_plainly(path, share, block)
            read_ahead_of_time(path if rank < writers else None)
            with timer.measure(f"read by {writers}"):
                if rank < writers:
                    read_plainly(path, block)

    for _ in range(num_rounds):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            one_round(patch)
    clear()
    return timer.times, timer.profile, num_bytes


def of_disk(times: dict[str, float]) -> dict[str, float]:
    """The disk's time, by one rank or both, over ours."""
    return {
        name: round(min(times[f"{plain} by {n}"] for n in (1, WORLD_SIZE)) / times[name], 3)
        for name, plain in (("save", "write"), ("load", "read"))
    }


def test_of_disk(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    pool = RankPool()
    try:
        times, profile, num_bytes = pool.run(WORLD_SIZE, work, str(tmp_path), ROUNDS)[0]
    finally:
        pool.close()
    size = num_bytes / GIB
    fastest = {name: min(values) for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info |= {
        "gib": round(size, 3),
        "gib_per_s": {name: round(size / value, 3) for name, value in fastest.items()},
        "median_gib_per_s": {name: round(size / value, 3) for name, value in medians.items()},
        "of_disk": of_disk(fastest),
        "median_of_disk": of_disk(medians),
        "profile": profile,
    }
    print(benchmark.extra_info)
    benchmark.pedantic(lambda: None, rounds=1)
