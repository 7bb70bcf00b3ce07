"""A pool of gloo ranks that stay alive between tests, so that the heavy imports are paid once.

On a machine with a GPU for each rank, collectives of GPU tensors go through NCCL.
"""

import atexit
import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import warm_start

TIMEOUT_S = 300
MAX_THREADS = 150
STACKS_PLEASE = signal.SIGRTMIN
"""Asks a rank for the stacks of its threads, on stderr."""


def load_function(file: str, name: str) -> Callable[..., Any]:
    """Returns function `name` of the Python file `file`, imported once per process."""
    module_name = "rank_pool_target_" + Path(file).stem
    module = sys.modules.get(module_name)
    if module is None or module.__file__ != file:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(module, name)


def serve(rank: int, connection: Any) -> None:
    """Runs jobs on one rank until the parent closes the pipe."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    assert sys.__stderr__ is not None
    faulthandler.register(STACKS_PLEASE, file=sys.__stderr__)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        file, name, args, world_size, store = job
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        try:
            backend = "gloo"
            if torch.cuda.device_count() >= world_size:
                torch.cuda.set_device(rank)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=world_size
            )
            # A rank that is done at once must not leave while another still connects to it.
            dist.all_reduce(torch.zeros(1))
            result = load_function(file, name)(*args)
        except BaseException:  # noqa: B036 - the traceback of any failure belongs to the parent
            connection.send(("error", traceback.format_exc()))
            return
        finally:
            if "megatron.core.parallel_state" in sys.modules:
                sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
        # Only now may the parent delete the store's file: a group that is being destroyed opens it.
        connection.send(("ok", result))


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


class RankPool:
    """Starts ranks on demand; a failed rank takes the whole pool down with it."""

    def __init__(self, imports_ahead: bool = True) -> None:
        """Starts none yet.

        Args:
            imports_ahead: Ranks have imported megatron, and with it triton.
        """
        self.context = (
            warm_start.context() if imports_ahead else multiprocessing.get_context("spawn")
        )
        self.ranks: list[tuple[Any, Any]] = []
        atexit.register(self.close)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls the module-level `function(*args)` on ranks 0..world_size-1 of one gloo group.

        Returns each rank's result (anything picklable). The function finds its rank through
        torch.distributed; the process group is new for each call.
        """
        if 0 < num_gpus() < world_size:
            pytest.skip(f"needs {world_size} GPUs, or none: CUDA_VISIBLE_DEVICES=")
        # gloo groups outlive their job, each with threads that wake up; new ranks have none.
        if any(psutil.Process(rank.pid).num_threads() > MAX_THREADS for rank, _ in self.ranks):
            self.close()
        while len(self.ranks) < world_size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=serve, args=(len(self.ranks), theirs), daemon=False
            )
            process.start()
            theirs.close()
            self.ranks.append((process, ours))
        file = sys.modules[function.__module__].__file__
        # A rank may still hold the store's file when it has answered.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for _, connection in self.ranks[:world_size]:
                job = (file, function.__name__, args, world_size, f"{folder}/store")
                connection.send(job)
            return self.collect(world_size)

    def collect(self, world_size: int) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_S
        rank_of = {connection: rank for rank, (_, connection) in enumerate(self.ranks[:world_size])}
        while len(results) < world_size:
            waiting = [c for c, rank in rank_of.items() if rank not in results]
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            if not ready:
                silent = sorted(rank_of[connection] for connection in waiting)
                for rank in silent:
                    os.kill(self.ranks[rank][0].pid, STACKS_PLEASE)
                time.sleep(1)  # they write
                self.close()
                raise TimeoutError(
                    f"no answer in {TIMEOUT_S} s from ranks {silent}, whose stacks are on stderr; "
                    f"the others: {results}"
                )
            for connection in ready:
                status, value = connection.recv()
                if status == "error":
                    self.close()
                    raise AssertionError(f"rank {rank_of[connection]} failed:\n{value}")
                results[rank_of[connection]] = value
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, connection in self.ranks:
            connection.close()
            process.kill()
            process.join()
        self.ranks = []
